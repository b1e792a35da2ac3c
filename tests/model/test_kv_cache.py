"""Decoding with a cache equals reading the whole text at once, and copies no cache to do so."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.model.attention.form import PLAIN, AttentionForm
from ivl_jax.model.decoder import (
    build_decoder,
    forward,
    hidden_states,
    logits_from_hidden,
    stack_layers,
)
from ivl_jax.model.kv_cache import init_cache, layer_capacity
from tests.jaxprs import products_in
from tests.model.families import FAMILIES, VOCAB, WINDOW, random_params, tiny_arch, tokens

ROWS, LENGTH, CAPACITY = 3, 48, 50
PROMPTS = (30, 17, 1)  # One longer than the window, one shorter, one of a single token.


class Reader:
    """Reads rows of a text in chunks, each row at its own place."""

    def __init__(
        self,
        name: str,
        *,
        scan_layers: bool = False,
        rows: int = ROWS,
        attention: AttentionForm = PLAIN,
    ):
        arch = tiny_arch(name)
        params = random_params(arch)
        self.text = tokens(rows, LENGTH)
        at = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32)[None], (rows, 1))
        plain = build_decoder(arch)
        self.expected = np.asarray(forward(plain, params, jnp.asarray(self.text), positions=at))
        self.graphdef = build_decoder(arch, scan_layers=scan_layers, attention=attention)
        self.params = stack_layers(params) if scan_layers else params
        self.cache = init_cache(
            arch, batch_size=rows, capacity=CAPACITY, dtype=jnp.float32, scan_layers=scan_layers
        )

    def read(
        self, chunk: np.ndarray, starts: np.ndarray, *, lengths: np.ndarray | None = None
    ) -> np.ndarray:
        at = jnp.asarray(starts[:, None] + np.arange(chunk.shape[1]), jnp.int32)
        hidden, cache = hidden_states(
            self.graphdef,
            self.params,
            jnp.asarray(chunk),
            positions=at,
            cache=self.cache,
            prompt_lengths=None if lengths is None else jnp.asarray(lengths, jnp.int32),
        )
        assert cache is not None
        self.cache = cache
        return np.asarray(logits_from_hidden(self.graphdef, self.params, hidden))

    def read_text(self, starts: np.ndarray, width: int) -> None:
        """The next `width` tokens of every row's own text, checked."""
        columns = starts[:, None] + np.arange(width)
        got = self.read(np.take_along_axis(self.text, columns, axis=1), starts)
        rows = np.arange(len(starts))[:, None]
        np.testing.assert_allclose(got, self.expected[rows, columns], atol=5e-5)

    def prefill(self, *, begins_rows: bool = False) -> np.ndarray:
        """Reads ragged prompts, padded on the right with rubbish; returns their lengths."""
        lengths = np.asarray(PROMPTS)
        prompt = self.text[:, : lengths.max()].copy()
        prompt[np.arange(lengths.max())[None] >= lengths[:, None]] = VOCAB - 1
        starts = np.zeros(len(lengths), np.int32)
        got = self.read(prompt, starts, lengths=lengths if begins_rows else None)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(got[row, :length], self.expected[row, :length], atol=5e-5)
        return lengths


@pytest.mark.parametrize("name", FAMILIES)
def test_ragged_prefill_and_decoding_equal_reading_at_once(name):
    reader = Reader(name)
    at = reader.prefill()
    for width in (1, 1, 5, 1, 9, 1):
        reader.read_text(at, width)
        at = at + width
    assert at.max() == LENGTH > WINDOW


@pytest.mark.parametrize("name", ["qwen2_window", "gemma3"])
def test_a_scanned_decoder_reads_through_its_stacked_cache_alike(name):
    reader = Reader(name, scan_layers=True)
    at = reader.prefill()
    for width in (1, 4, 1):
        reader.read_text(at, width)
        at = at + width


BLOCKED = AttentionForm("blocked", block=8)
BEGINNINGS = list(
    itertools.product(["llama3", "gemma2", "gemma3"], [False, True], [PLAIN, BLOCKED])
)
QUICK_BEGINNINGS = [("llama3", False, PLAIN), ("gemma2", False, BLOCKED), ("gemma3", True, BLOCKED)]


@pytest.mark.parametrize(
    ("name", "scan_layers", "attention"),
    [
        case if case in QUICK_BEGINNINGS else pytest.param(*case, marks=pytest.mark.slow)
        for case in BEGINNINGS
    ],
    ids=str,
)
def test_prompts_that_begin_rows_are_read_without_the_cache_and_kept_in_it(
    name, scan_layers, attention
):
    reader = Reader(name, scan_layers=scan_layers, attention=attention)
    # What an earlier row left there must not be seen.
    reader.cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), reader.cache)
    at = reader.prefill(begins_rows=True)
    reader.cache = jax.tree.map(jnp.nan_to_num, reader.cache)
    for width in (1, 5, 1):
        reader.read_text(at, width)
        at = at + width


def test_prompts_that_begin_rows_have_no_scores_over_the_capacity():
    arch = tiny_arch("llama3")
    graphdef, params = build_decoder(arch), random_params(arch)
    cache = init_cache(arch, batch_size=2, capacity=CAPACITY, dtype=jnp.float32)
    text = jnp.ones((2, LENGTH - 1), jnp.int32)
    at = jnp.tile(jnp.arange(LENGTH - 1, dtype=jnp.int32)[None], (2, 1))

    def multiplied(lengths):
        jaxpr = jax.make_jaxpr(
            lambda: hidden_states(
                graphdef, params, text, positions=at, cache=cache, prompt_lengths=lengths
            )
        )()
        factors = (factor for product in products_in(jaxpr.jaxpr) for factor in product.invars)
        return {size for factor in factors for size in factor.aval.shape}

    assert CAPACITY in multiplied(None)
    assert CAPACITY not in multiplied(jnp.full(2, LENGTH - 1))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_writing_head_by_head_keeps_the_same_slots(scan_layers):
    by_slot, by_head = (
        Reader("llama3", scan_layers=scan_layers, attention=AttentionForm(writes_by_head=by_head))
        for by_head in (False, True)
    )
    for reader in (by_slot, by_head):
        reader.read(reader.text[:, :3], np.array([0, 7, CAPACITY - 1]))
    for one, other in zip(
        jax.tree.leaves(by_slot.cache), jax.tree.leaves(by_head.cache), strict=True
    ):
        assert np.any(one)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_a_smaller_position_rolls_a_row_back(name):
    reader = Reader(name)
    at = reader.prefill()
    rejected = np.full((ROWS, 6), VOCAB - 2, np.int32)
    reader.read(rejected, at)
    reader.read_text(at - np.array([3, 0, 0]), 5)


def test_tokens_beyond_the_capacity_are_dropped_and_harm_nothing():
    reader = Reader("llama3")
    reader.read_text(np.zeros(ROWS, np.int32), LENGTH)
    full = np.full(ROWS, CAPACITY, np.int32)
    before = jax.tree.map(np.asarray, reader.cache)
    reader.read(np.zeros((ROWS, 2), np.int32), full)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(reader.cache), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_cache_of_one_row_and_one_token_is_written():
    reader = Reader("llama3", rows=1)
    for position in range(4):
        reader.read_text(np.array([position]), 1)


def test_segment_ids_with_a_cache_are_refused():
    arch = tiny_arch("llama3")
    cache = init_cache(arch, batch_size=1, capacity=8, dtype=jnp.float32)
    ones = jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="segment_ids"):
        hidden_states(
            build_decoder(arch),
            random_params(arch),
            ones,
            positions=ones,
            segment_ids=ones,
            cache=cache,
        )


def test_a_cache_has_a_slot_for_every_position_of_every_layer():
    arch = tiny_arch("gemma3")
    cache = init_cache(arch, batch_size=2, capacity=7, dtype=jnp.bfloat16)
    assert [layer.shape for layer in cache.keys] == [(2, 2, 7, 16)] * 3
    assert cache.values[0].dtype == jnp.bfloat16
    stacked = init_cache(arch, batch_size=2, capacity=7, dtype=jnp.bfloat16, scan_layers=True)
    assert stacked.keys.shape == (3, 2, 2, 7, 16)
    assert layer_capacity(cache, 1) == layer_capacity(stacked, 1) == 7


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_decode_step_writes_donated_caches_in_place(rows, scan_layers):
    """A step is bound by the bytes it moves: a copied cache would double them."""
    arch, capacity = tiny_arch("llama3"), 4096
    graphdef = build_decoder(arch, scan_layers=scan_layers)
    params = random_params(arch)
    params = stack_layers(params) if scan_layers else params
    cache = init_cache(
        arch, batch_size=rows, capacity=capacity, dtype=jnp.float32, scan_layers=scan_layers
    )

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params, tokens, positions, cache):
        hidden, cache = hidden_states(graphdef, params, tokens, positions=positions, cache=cache)
        return logits_from_hidden(graphdef, params, hidden), cache

    one = jnp.ones((rows, 1), jnp.int32)
    compiled = step.lower(params, one, one, cache).compile()
    memory = compiled.memory_analysis()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    layer_bytes = cache_bytes / (2 * arch.num_hidden_layers)
    assert memory.alias_size_in_bytes == cache_bytes
    # A scanned layer takes a slice of the stack; an unrolled one reads its own arrays, and its
    # scores and softmax take half of what they take.
    assert memory.temp_size_in_bytes < (2.8 if scan_layers else 0.8) * layer_bytes
    if not scan_layers:
        shape = f"{rows},{arch.num_key_value_heads},{capacity},{arch.head_dim}"
        assert not re.findall(rf"= f32\[{shape}\]\S* (copy|transpose)\(", compiled.as_text())
