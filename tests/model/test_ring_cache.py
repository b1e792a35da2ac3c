"""A ring of the window holds all that a sliding layer's queries ever see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.config import LONGEST_DRAFT
from ivl_jax.decoding.device.proposals import BLOCK_WIDTHS
from ivl_jax.decoding.speculative.draft_proposer import CATCH_UP
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import build_decoder, forward, hidden_states, logits_from_hidden
from ivl_jax.model.kv_cache import LOOKAHEAD, init_cache
from tests.model.families import CONFIGS, VOCAB, WINDOW, random_params, tiny_arch, tokens

LENGTH, CAPACITY = 420, 448
RING = 128  # WINDOW + LOOKAHEAD, in whole tiles


def long_arch(name):
    return dataclasses.replace(tiny_arch(name), max_position_embeddings=CAPACITY)


@functools.cache
def expected(name, rows):
    """Logits of whole texts, each read at once."""
    arch, text = long_arch(name), tokens(rows, LENGTH)
    at = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32)[None], (rows, 1))
    run = jax.jit(functools.partial(forward, build_decoder(arch)))
    return text, np.asarray(run(random_params(arch), jnp.asarray(text), positions=at))


class Reader:
    """Reads rows of long texts through rings."""

    def __init__(self, name, rows=3):
        self.arch = long_arch(name)
        self.text, self.expected = expected(name, rows)
        self.cache = init_cache(
            self.arch, batch_size=rows, capacity=CAPACITY, dtype=jnp.float32, rings=True
        )
        graphdef, params = build_decoder(self.arch), random_params(self.arch)

        @jax.jit
        def run(chunk, starts, cache, lengths):
            at = starts[:, None] + jnp.arange(chunk.shape[1], dtype=jnp.int32)[None]
            hidden, cache = hidden_states(
                graphdef, params, chunk, positions=at, cache=cache, prompt_lengths=lengths
            )
            return logits_from_hidden(graphdef, params, hidden), cache

        self.run = run

    def read(self, chunk, starts, lengths=None):
        logits, self.cache = self.run(
            jnp.asarray(chunk, jnp.int32),
            jnp.asarray(starts, jnp.int32),
            self.cache,
            None if lengths is None else jnp.asarray(lengths, jnp.int32),
        )
        return np.asarray(logits)

    def read_text(self, starts, width):
        columns = starts[:, None] + np.arange(width)
        got = self.read(np.take_along_axis(self.text, columns, axis=1), starts)
        rows = np.arange(len(starts))[:, None]
        np.testing.assert_allclose(got, self.expected[rows, columns], atol=1e-4)

    def begin(self, lengths, width):
        """Reads ragged prompts in one bucket, padded with rubbish."""
        prompts = self.text[:, :width].copy()
        prompts[np.arange(width)[None] >= lengths[:, None]] = VOCAB - 1
        got = self.read(prompts, np.zeros(len(lengths)), lengths)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(got[row, :length], self.expected[row, :length], atol=1e-4)


def slots_of(name, capacity):
    cache = init_cache(
        long_arch(name), batch_size=1, capacity=capacity, dtype=jnp.float32, rings=True
    )
    return [keys.shape[2] for keys in cache.keys]


def test_sliding_layers_hold_their_window_and_not_the_context():
    kinds = long_arch("gemma3").layer_types
    rings = [RING if kind == "sliding_attention" else CAPACITY for kind in kinds]
    assert 0 < kinds.count("sliding_attention") < len(kinds)
    assert WINDOW + LOOKAHEAD <= RING < CAPACITY
    assert slots_of("gemma3", CAPACITY) == rings
    assert slots_of("gemma3", RING - 1) == [RING - 1] * len(kinds)
    assert slots_of("llama3", CAPACITY) == [CAPACITY] * long_arch("llama3").num_hidden_layers


def test_a_long_context_costs_its_full_layers():
    """Gemma 3's shapes: of six layers five have a window of 512."""
    kinds = [*["sliding_attention"] * 5, "full_attention"]
    changed = {"num_hidden_layers": 6, "layer_types": kinds, "sliding_window": 512}
    arch = ArchConfig.from_hf(CONFIGS["gemma3"] | changed)

    def size(*, rings):
        make = functools.partial(
            init_cache, arch, batch_size=1, capacity=32_768, dtype=jnp.bfloat16, rings=rings
        )
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(make)))

    assert size(rings=True) / size(rings=False) == (5 * 640 / 32_768 + 1) / 6


def test_no_proposal_reaches_beyond_what_a_ring_keeps():
    widest = max(LONGEST_DRAFT + 1, *BLOCK_WIDTHS, CATCH_UP)
    assert widest + 1 <= LOOKAHEAD  # the token before is read again


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_prompts_longer_than_the_ring_and_ragged_are_continued(name):
    reader = Reader(name)
    at = np.array([300, 40, 129])
    reader.begin(at, 320)
    for width in (1, 8, 1, 60):
        reader.read_text(at, width)
        at = at + width


def test_rows_wrap_at_their_own_positions():
    reader = Reader("gemma3")
    at = np.array([1, 100, 120])
    reader.begin(at, 120)
    for _ in range(9):
        reader.read_text(at, 33)
        at = at + 33
    assert (at > 2 * RING).all()


def test_rejected_tokens_overwrite_nothing_that_is_seen_again():
    reader = Reader("gemma3")
    at = np.array([130, 200, 380])
    reader.begin(at, 384)
    for kept in (1, 3, 30):
        junk = np.full((3, LONGEST_DRAFT + 1), VOCAB - 2)
        reader.read(junk, at)
        reader.read_text(at, kept)
        reader.read(np.full((3, CATCH_UP), VOCAB - 2), at + kept)
        reader.read_text(at - 1, 2)
        at = at + np.array([kept, kept, 0])


def test_a_ring_shorter_than_window_and_lookahead_would_show(monkeypatch):
    """What the margin is for: the same reads through a ring of just the window fail."""
    monkeypatch.setattr("ivl_jax.model.kv_cache.LOOKAHEAD", 0)
    monkeypatch.setattr("ivl_jax.model.kv_cache._RING_MULTIPLE", 1)
    jax.clear_caches()
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_rejected_tokens_overwrite_nothing_that_is_seen_again()
    jax.clear_caches()
