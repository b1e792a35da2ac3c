"""Decoding through rings of a sliding window gives the text and the logits of whole caches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.composed.network import DraftArrays
from ivl_jax.decoding.device.finish import FinishReason
from ivl_jax.decoding.device.generate import widest_block
from ivl_jax.decoding.programs import build_programs
from ivl_jax.model import kv_cache
from ivl_jax.model.network import build_network
from tests.decoding.tiny import (
    assert_is_teacher_forced_arg_max,
    make_requests,
    random_prompts,
    tiny_composition,
)

WINDOW, RING, CAPACITY, WIDTH = 24, 128, 448, 320
PROMPTS = random_prompts([300, 40, 129])
NEW_TOKENS = [120, 180, 60]


@functools.cache
def sliding(*, draft_length=None):
    """The tiny composition, its first layers with a window; perhaps a noisy copy as the draft."""
    composition, params = tiny_composition()

    def slide(network):
        arch = network.arch
        kinds = ("sliding_attention", *["full_attention"] * (arch.num_hidden_layers - 1))
        arch = dataclasses.replace(arch, layer_types=kinds, sliding_window=WINDOW)
        return dataclasses.replace(network, arch=arch, graphdef=build_network(arch))

    base, values = slide(composition.base), tuple(map(slide, composition.values))
    composition = dataclasses.replace(composition, base=base, values=values)
    if draft_length is None:
        return composition, params
    keys = iter(jax.random.split(jax.random.key(5), 100))
    draft = jax.tree.map(
        lambda leaf: leaf + 0.02 * jax.random.normal(next(keys), leaf.shape), params.base
    )
    return (
        dataclasses.replace(composition, draft=base, draft_length=draft_length),
        params._replace(draft=DraftArrays(draft, jnp.zeros(0, jnp.int32))),
    )


def prefill(prompts, new_tokens, *, capacity=CAPACITY, width=WIDTH, **options):
    composition, params = sliding(**options)
    padded, requests = make_requests(prompts, new_tokens=new_tokens, width=width)
    program = build_programs(composition).prefill
    return program(params, padded, requests, capacity=capacity, top_log_probs=1)


def decode(state, *, tokens=999, **options):
    composition, params = sliding(**options)
    nothing = np.zeros(len(state.lengths), bool)
    return build_programs(composition).decode_chunk(params, state, np.int32(tokens), nothing)


def texts(state):
    assert not (np.asarray(state.finish) == FinishReason.RUNNING).any()
    pairs = zip(np.asarray(state.tokens), np.asarray(state.lengths), strict=True)
    return [row[:length].tolist() for row, length in pairs]


@pytest.fixture(scope="module")
def ringed():
    return decode(prefill(PROMPTS, NEW_TOKENS))


def test_sliding_layers_take_the_memory_of_their_window(ringed):
    base, (value,) = ringed.caches
    assert [keys.shape[2] for keys in base.keys] == [RING, CAPACITY]
    assert [keys.shape[2] for keys in value.keys] == [RING]


def test_text_and_log_probabilities_are_those_of_whole_caches(ringed, monkeypatch):
    monkeypatch.setattr(kv_cache, "_ring_slots", lambda window: CAPACITY)
    build_programs.cache_clear()
    whole = decode(prefill(PROMPTS, NEW_TOKENS))
    build_programs.cache_clear()
    assert [keys.shape[2] for keys in whole.caches.base.keys] == [CAPACITY, CAPACITY]
    assert texts(ringed) == texts(whole)
    for one, other in zip(ringed.log_probs, whole.log_probs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_text_is_the_teacher_forced_arg_max(ringed):
    composition, params = sliding()
    for prompt, text in zip(PROMPTS, texts(ringed), strict=True):
        own = text[len(prompt) :]
        assert_is_teacher_forced_arg_max(composition, params, prompt, own, (1.0,))


def test_prompts_that_are_read_in_blocks_give_the_same_text(ringed):
    composition, params = sliding()
    programs = build_programs(composition)
    padded, requests = make_requests(PROMPTS, new_tokens=NEW_TOKENS, width=WIDTH)
    block = widest_block(composition, 512)
    assert block == kv_cache.LOOKAHEAD
    state = programs.empty(rows=3, capacity=CAPACITY, stop_ids=8, top_log_probs=1)
    for start in range(0, WIDTH, block):
        is_last = np.bool_(start + block >= WIDTH)
        state = programs.read_block(
            params, state, padded, requests, (), np.int32(start), is_last, width=block
        )
    state = decode(state)
    assert texts(state) == texts(ringed)
    for one, other in zip(state.log_probs, ringed.log_probs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.slow
def test_proposals_that_are_rejected_change_no_text(ringed):
    state = prefill(PROMPTS, NEW_TOKENS, draft_length=5)
    assert [keys.shape[2] for keys in state.speculation.proposer.cache.keys] == [RING, CAPACITY]
    state = decode(state, draft_length=5)
    assert texts(state) == texts(ringed)
    proposed, accepted = (np.asarray(each) for each in state.speculation[1:3])
    assert (accepted > 0).all()
    assert (proposed > accepted).all()


@pytest.mark.slow
def test_rows_are_refilled_and_batches_grow_and_shrink(ringed):
    programs = build_programs(sliding()[0])
    state = decode(prefill([[5] * 40, PROMPTS[1], [5] * 200], [1, 180, 2]), tokens=30)
    for prompt, new_tokens, row, width in (
        (PROMPTS[0], 120, 0, WIDTH),
        (PROMPTS[2], 60, 2, 160),
    ):
        admitted = prefill([prompt], [new_tokens], capacity=width + 1, width=width)
        state = programs.place(state, admitted, np.asarray([row], np.int32))
        state = decode(state, tokens=7)
    assert texts(decode(state)) == texts(ringed)
    # A short row moves to a batch below the ring's length, and back to a large one.
    size = {"rows": 1, "stop_ids": 8, "top_log_probs": 1}
    state = decode(prefill([PROMPTS[1]], [180], width=64), tokens=20)
    for capacity in (100, CAPACITY):
        state = programs.place(programs.empty(capacity=capacity, **size), state, np.asarray([0]))
        state = decode(state, tokens=20)
    assert texts(decode(state)) == [texts(ringed)[1]]
