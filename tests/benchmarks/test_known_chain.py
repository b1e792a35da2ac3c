"""Weights of a known greedy text: the share of proposals kept is what it was set to."""

import numpy as np
import pytest

from benchmarks.composed import composed, random_weights, with_draft
from benchmarks.known_chain import chain_weights, cycle, followers
from tests.decoding.tiny import tiny_arch

ROWS = 200
ARCH = tiny_arch(width=64, heads=2, kv_heads=2, rows=ROWS, context=256)


@pytest.mark.parametrize("agreement", [1.0, 0.8, 0.5])
def test_followers_agree_with_the_cycle_in_the_share_asked_for(agreement):
    order = cycle(ROWS)
    expected, found = followers(order), followers(order, agreement=agreement)
    assert expected[order].tolist() == np.roll(order, -1).tolist()
    assert np.mean(found == expected) == pytest.approx(agreement, abs=0.01)
    assert sorted(found) == list(range(ROWS))


@pytest.mark.slow
def test_greedy_text_follows_the_chain_and_the_drafts_agreement_is_what_is_kept():
    order = cycle(ROWS)
    plain = composed(
        chain_weights(ARCH, followers(order), seed=0), random_weights(ARCH, seed=1), strengths=[0.1]
    )
    draft = chain_weights(ARCH, followers(order, agreement=0.8), seed=2)
    drafted = with_draft(plain, draft, length=3)
    prompts = np.full((1, 16), 5, np.int32)
    prompts[0, -1] = order[0]
    expected = order[np.arange(101)].tolist()
    tokens, state = drafted.decode_to_end(drafted.prefill(prompts, 100))
    assert tokens[0, 15:].tolist() == expected
    assert plain.decode(plain.prefill(prompts, 100))[0, 15:].tolist() == expected
    # A proposal is verified where those before it were accepted: not every one of the stretch.
    share = int(state.speculation.accepted[0]) / int(state.speculation.proposed[0])
    assert share == pytest.approx(0.8, abs=0.06)
