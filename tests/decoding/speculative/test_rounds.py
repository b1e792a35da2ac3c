"""A draft changes the speed and nothing else: tokens, ends, samples' distribution, memory."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.composed.network import DraftArrays
from ivl_jax.config import StrengthPolicy
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.device.finish import FinishReason
from ivl_jax.decoding.device.proposals import LONGEST
from ivl_jax.decoding.programs import build_programs
from ivl_jax.decoding.requests import GenerationOptions, PromptTooLongError
from ivl_jax.decoding.speculative import rounds
from ivl_jax.decoding.speculative.draft_length import (
    block_width,
    choose_length,
    round_costs,
)
from ivl_jax.decoding.speculative.draft_proposer import DRAFT_PROPOSER
from ivl_jax.tokenizer import describe_tokenizer, load_tokenizer
from ivl_jax.tokenizer_agreement import TokenizerMismatchError
from tests.decoding.conftest import make_value
from tests.decoding.speculative.test_acceptance import assert_drawn_from
from tests.decoding.tiny import (
    NEAR_TIE,
    VOCAB,
    assert_is_teacher_forced_arg_max,
    language_model,
    make_requests,
    plain_logits,
    policy_logits,
    random_prompts,
    tiny_arch,
    tiny_composition,
    tiny_network,
)

CAPACITY = 64
PROMPTS = random_prompts([5, 1, 12])
NEW_TOKENS = [30, 12, 41]


def drafted(length, *, likeness):
    """The tiny composition with a draft: the base itself under noise, or a stranger."""
    composition, params = tiny_composition()
    if likeness is None:
        # A stranger of other widths, which lacks a token and pads its vocabulary otherwise.
        network, draft = tiny_network(
            tiny_arch(width=16, heads=2, kv_heads=1, layers=1, rows=VOCAB + 1),
            77,
            vocab_size=VOCAB - 1,
        )
    else:
        keys = iter(jax.random.split(jax.random.key(5), 100))
        network, draft = composition.base, params.base
        draft = jax.tree.map(
            lambda leaf: leaf + likeness * jax.random.normal(next(keys), leaf.shape), draft
        )
    return (
        dataclasses.replace(composition, draft=network, draft_length=length),
        params._replace(draft=DraftArrays(draft, jnp.zeros(0, jnp.int32))),
    )


def run(composition, params, prompts=PROMPTS, *, chunk=1000, change=None, **options):
    """Generated ids of each row, why each ended, and the last state."""
    programs = build_programs(composition)
    padded, requests = make_requests(
        prompts, **{"width": 20, "new_tokens": NEW_TOKENS[: len(prompts)], **options}
    )
    state = programs.prefill(params, padded, requests, capacity=CAPACITY)
    nothing = np.zeros(len(prompts), bool)
    while np.any(np.asarray(state.finish) == FinishReason.RUNNING):
        state = programs.decode_chunk(params, state, np.int32(chunk), nothing)
        state = state if change is None else change(state)
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    generated = [tokens[row, len(p) : lengths[row]].tolist() for row, p in enumerate(prompts)]
    return generated, [FinishReason(int(code)) for code in state.finish], state


@pytest.fixture(scope="module")
def plain():
    generated, reasons, _ = run(*tiny_composition())
    return generated, reasons


def eager(*_, **__):
    """Costs by which proposing always pays, unless nothing is ever kept."""
    return np.linspace(1.0, 1.1, LONGEST + 1, dtype=np.float32)


@pytest.mark.parametrize(
    ("length", "likeness"),
    [pytest.param(4, 0.02, marks=pytest.mark.slow), (0, None)],
    ids=str,
)
def test_greedy_tokens_and_ends_are_those_of_plain_decoding(plain, length, likeness, monkeypatch):
    monkeypatch.setattr(rounds, "round_costs", eager)
    composition, params = drafted(length, likeness=likeness)
    generated, reasons, state = run(composition, params)
    for prompt, own in zip(PROMPTS, generated, strict=True):
        assert_is_teacher_forced_arg_max(composition, params, prompt, own, (1.0,))
    # No near-tie lies on these paths.
    assert (generated, reasons) == plain
    assert run(composition, params, chunk=7)[:2] == plain
    proposed, accepted = map(np.asarray, state.speculation[1:3])
    assert (proposed >= accepted).all()
    assert accepted.min() > 0
    assert (proposed > accepted).any()


def test_a_draft_that_is_the_base_is_kept_whole_and_saves_its_share_of_rounds():
    composition, params = drafted(4, likeness=0.0)
    rounds = []
    programs = build_programs(composition)
    padded, requests = make_requests(PROMPTS[:1], new_tokens=31, width=20)
    state = programs.prefill(params, padded, requests, capacity=CAPACITY)
    while int(state.finish[0]) == FinishReason.RUNNING:
        state = programs.decode_chunk(params, state, np.int32(1), np.zeros(1, bool))
        rounds.append(int(state.lengths[0]))
    # The first token is the prompt's; then four proposals and one more in each round.
    assert np.diff([6, *rounds]).tolist() == [5] * 6
    assert int(state.speculation.proposed[0]) == int(state.speculation.accepted[0]) == 24


def test_a_stop_id_within_a_block_ends_the_row_there(plain):
    composition, params = drafted(4, likeness=0.02)
    free = plain[0]
    stop = free[0][8]
    ended, reasons, state = run(composition, params, stop_ids=(stop,))
    assert (ended, reasons) == run(*tiny_composition(), stop_ids=(stop,))[:2]
    assert ended[0] == free[0][: free[0].index(stop) + 1]
    assert reasons[0] == FinishReason.EOS
    assert np.asarray(state.speculation.accepted)[0] <= len(ended[0]) - 1


def test_a_draft_changes_no_token_of_rows_with_a_logit_bias(plain):
    free = plain[0]
    biases = [{free[0][8]: -100.0}, {}, {9: 3.0, 11: 3.0}]
    generated, reasons, state = run(*drafted(4, likeness=0.02), biases=biases)
    assert (generated, reasons) == run(*tiny_composition(), biases=biases)[:2]
    assert free[0][8] not in generated[0]
    assert generated[1] == free[1]
    assert generated[2] != free[2]
    assert np.asarray(state.speculation.accepted).min() > 0


def test_a_draft_changes_no_token_of_rows_with_a_strength_policy(plain):
    free = plain[0]
    policies = [StrengthPolicy("entropy", 0.5), None, StrengthPolicy("kl", 0.5)]
    generated, reasons, state = run(*drafted(4, likeness=0.02), policies=policies)
    composition, params = tiny_composition()
    assert (generated, reasons) == run(composition, params, policies=policies)[:2]
    same = [own == other for own, other in zip(generated, free, strict=True)]
    assert same == [False, True, False]
    for prompt, own, policy in zip(PROMPTS, generated, policies, strict=True):
        logits = policy_logits(composition, params, [*prompt, *own], (1.0,), policy)
        for index, token in enumerate(own):
            row = logits[len(prompt) - 1 + index]
            assert row.max() - row[token] < NEAR_TIE
    assert np.asarray(state.speculation.accepted).min() > 0


def test_a_row_that_the_host_ends_stays_as_it_is():
    composition, params = drafted(4, likeness=0.02)
    programs = build_programs(composition)
    padded, requests = make_requests(PROMPTS, new_tokens=NEW_TOKENS, width=20)
    state = programs.prefill(params, padded, requests, capacity=CAPACITY)
    state = programs.decode_chunk(params, state, np.int32(4), np.zeros(3, bool))
    lengths = np.asarray(state.lengths)
    state = programs.decode_chunk(params, state, np.int32(4), np.asarray([True, False, False]))
    assert int(state.finish[0]) == FinishReason.STOP_STRING
    after = np.asarray(state.lengths)
    assert after[0] == lengths[0]
    assert (after[1:] >= np.minimum(lengths[1:] + 4, [13, 53])).all()


def test_a_draft_that_has_fallen_behind_reads_what_it_missed():
    composition, params = drafted(4, likeness=0.02)

    def forget(state):
        """The draft has read the prompt alone."""
        speculation = state.speculation
        draft = speculation.proposer
        seen = jnp.array(state.requests.prompt_lengths)  # a buffer of its own, to be donated
        kept = jnp.arange(CAPACITY)[None, None, :, None] < seen[:, None, None, None]
        cache = jax.tree.map(lambda array: jnp.where(kept, array, 7.0), draft.cache)
        draft = draft._replace(cache=cache, lengths=seen)
        return state._replace(speculation=speculation._replace(proposer=draft))

    expected, _, state = run(composition, params, chunk=9)
    found, _, after = run(composition, params, chunk=9, change=forget)
    assert found == expected
    assert after.speculation.accepted.tolist() == state.speculation.accepted.tolist()


def test_whole_texts_are_sampled_with_the_probability_that_the_composition_gives_them():
    composition, params = drafted(2, likeness=0.05)
    prompt, rows = PROMPTS[0], 3000
    options = {"new_tokens": 4, "temperature": 3.0, "top_k": 2}
    generated, _, state = run(composition, params, [prompt] * rows, width=5, **options)
    learned = state.speculation
    assert 0.2 < float(learned.accepted.sum() / learned.proposed.sum()) < 0.95

    # The first token comes with the prompt; each later one is one of the two likeliest.
    def continued(text):
        logits = plain_logits(composition, params, [*prompt, *text], (1.0,))[-1].astype(float)
        best = np.argsort(-logits)[:2]
        odds = np.exp((logits[best] - logits[best[0]]) / 3.0)
        return zip(best.tolist(), odds / odds.sum(), strict=True)

    first = generated[0][0]
    probabilities = {(first,): 1.0}
    for _ in range(3):
        probabilities = {
            (*text, token): own * share
            for text, own in probabilities.items()
            for token, share in continued(text)
        }
    texts = list(probabilities)
    index = {text: number for number, text in enumerate(texts)}
    begun = [row for row in generated if row[0] == first]
    assert len(begun) > 1000
    drawn = [index[tuple(row)] for row in begun]
    assert_drawn_from(drawn, np.asarray(list(probabilities.values())))


def test_caches_are_donated_and_updated_in_place_at_every_block_width():
    composition, params = drafted(0, likeness=0.02)
    programs = build_programs(composition)
    padded, requests = make_requests(PROMPTS, new_tokens=NEW_TOKENS, width=20)
    state = programs.prefill(params, padded, requests, capacity=4096)
    caches = (state.caches.base, state.caches.values, state.speculation.proposer.cache)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    nothing = np.zeros(3, bool)
    memory = programs.decode_chunk.lower(params, state, np.int32(4), nothing).compile()
    memory = memory.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    # What is temporary holds masks and scores over the slots of eight tokens; a copy is as large.
    assert memory.temp_size_in_bytes < cache_bytes


def test_proposing_stops_where_it_does_not_pay_and_grows_where_it_does():
    composition, params = drafted(0, likeness=0.02)
    costs = round_costs(composition, params, DRAFT_PROPOSER, batch=1)
    assert costs[0] == 1
    assert (np.diff(costs) > 0).all()
    dear = np.asarray([1.0, *itertools.repeat(9.0, LONGEST)], np.float32)
    one = jnp.ones(2)

    def chosen(costs, kept, running=(True, True)):
        running = jnp.asarray(running)
        rows = jnp.asarray(kept) * one * 50
        counts = {"proposed": 50 * one, "accepted": rows, "available": jnp.full(2, LONGEST)}
        return int(choose_length(costs, **counts, running=running))

    assert chosen(dear, 1.0) == 0
    cheap = 1 + 0.2 * np.arange(LONGEST + 1, dtype=np.float32)
    lengths = [chosen(cheap, kept) for kept in (0.0, 0.5, 0.8, 1.0)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, LONGEST)
    # A row that is done says nothing of the others.
    assert chosen(cheap, [0.0, 1.0], (False, True)) == LONGEST
    assert [block_width(count) for count in range(LONGEST + 1)] == [1, 2, 4, 4, 8, 8, 8, 8]


# Texts.


def greedy(tokens, **changes):
    return GenerationOptions(max_new_tokens=tokens, **changes)


@pytest.fixture(scope="module")
def with_draft(stories, value):
    """Its own base is the draft: the value alone decides, so nearly everything is kept."""
    return compose(stories, value, strengths=[0.3], draft=stories, draft_length=3)


@pytest.mark.slow
def test_texts_with_a_draft_are_those_without(composed, with_draft):
    prompts = ["Once upon a time", "", "The big dog", "Lily said"]
    (free,) = composed.generate([""], greedy(40))
    options = [
        greedy(30),
        greedy(40, stop=(free.text[21:33],)),
        greedy(11),
        greedy(20, strengths=(0.0,)),
    ]
    expected = composed.generate(prompts, options)
    found = with_draft.generate(prompts, options)
    assert found == expected
    assert expected[1].finish_reason == "stop_string"
    assert all(g.accepted_tokens == g.proposed_tokens > 0 for g in found)
    assert expected[0].proposed_tokens == 0
    # Two rows, refilled as they end.
    assert with_draft.generate(prompts, options, batch_size=2) == expected
    *pieces, last = with_draft.stream(prompts[0], options[0])
    assert "".join(pieces) == last.text == expected[0].text
    assert len(pieces) > 3


def test_a_draft_of_another_tokenizer_is_refused_with_both_names(stories, gpt2_tokenizer_dir):
    tokenizer = load_tokenizer(gpt2_tokenizer_dir)
    other = dataclasses.replace(
        stories, path="small", tokenizer=tokenizer, tokenizer_info=describe_tokenizer(tokenizer)
    )
    with pytest.raises(TokenizerMismatchError, match="the draft small") as caught:
        compose(stories, draft=other)
    assert stories.path in str(caught.value)
    assert "family" in str(caught.value)


def test_only_values_that_read_the_text_alone_can_be_drafted_for(stories):
    value = make_value(stories, connection="cascade")
    with pytest.raises(ValueError, match=r"connection cascade.*leave the draft out"):
        compose(stories, value, draft=stories)


def test_the_drafts_context_counts_and_is_named(stories, stories260k_dir):
    draft = language_model(stories260k_dir, seed=0, context=50)
    with pytest.raises(PromptTooLongError, match=r"50 tokens \(that of the draft"):
        compose(stories, draft=draft).generate([[5] * 51])
