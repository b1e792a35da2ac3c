"""Prompts are admitted to a running batch in place, and the other rows never notice."""

import jax
import numpy as np

from ivl_jax.decoding.device.finish import FinishReason
from ivl_jax.decoding.programs import build_programs
from tests.decoding.tiny import make_requests, random_prompts, tiny_composition

CAPACITY = 48
PROMPTS = random_prompts([5, 16, 9])
NOTHING = np.zeros(3, bool)


def prefill(new_tokens, prompts=PROMPTS):
    composition, params = tiny_composition()
    padded, requests = make_requests(prompts, new_tokens=new_tokens)
    return build_programs(composition).prefill(params, padded, requests, capacity=CAPACITY)


def decode(state, tokens=99, enough=3):
    composition, params = tiny_composition()
    chunk = build_programs(composition).decode_chunk
    return chunk(params, state, np.int32(tokens), NOTHING, np.int32(enough))


def admit(state, prompts, new_tokens, rows):
    composition, params = tiny_composition()
    padded, requests = make_requests(prompts, new_tokens=new_tokens, width=16)
    programs = build_programs(composition)
    admitted = programs.prefill(params, padded, requests, capacity=17)
    return programs.place(state, admitted, np.asarray(rows, np.int32))


def texts(state):
    assert not (np.asarray(state.finish) == FinishReason.RUNNING).any()
    pairs = zip(np.asarray(state.tokens), np.asarray(state.lengths), strict=True)
    return [row[:length].tolist() for row, length in pairs]


def test_admitted_rows_are_as_if_alone_and_the_others_as_if_undisturbed():
    expected = texts(decode(prefill([20, 3, 20])))
    later = random_prompts([16, 3, 7], seed=1)
    alone = texts(decode(prefill([30, 12, 1], later)))
    state = decode(prefill([20, 3, 20]), tokens=6)
    assert np.asarray(state.finish).tolist() == [0, FinishReason.LENGTH, 0]
    # The second prompt goes nowhere, as one does that only fills the group.
    state = admit(state, later[:2], [30, 12], rows=[1, 3])
    assert np.asarray(state.lengths).tolist() == [5 + 7, 16 + 1, 9 + 7]
    state = decode(state)
    assert texts(state) == [expected[0], alone[0], expected[2]]
    # Two more, into rows that held longer texts.
    state = admit(state, later[1:], [12, 1], rows=[1, 2])
    assert texts(decode(state)) == [expected[0], alone[1], alone[2]]


def test_a_row_without_room_for_a_token_ends_at_once():
    state = admit(decode(prefill([20, 3, 20]), tokens=6), [[5] * 16, [4]], [0, 1], rows=[1, 3])
    assert (int(state.lengths[1]), int(state.finish[1])) == (16, FinishReason.LENGTH)


def test_what_a_row_held_never_reaches_the_prompt_that_takes_its_place():
    """A masked slot still counts 0 times what is in it: a NaN that was left there would show."""
    prompts = [[5] * 7]
    alone = texts(decode(prefill([30, 1, 1], [*prompts, [3], [3]])))[0]
    state = decode(prefill([20, 3, 20]), tokens=6)
    caches = jax.tree.map(lambda leaf: leaf.at[1].set(np.nan), state.caches)
    state = admit(state._replace(caches=caches), prompts, [30], rows=[1])
    assert texts(decode(state))[1] == alone


def test_a_chunk_ends_as_soon_as_enough_rows_are_done():
    state, lengths = prefill([20, 3, 9]), []
    for enough in (1, 2, 3):
        state = decode(state, enough=enough)
        lengths.append((np.asarray(state.lengths) - [5, 16, 9]).tolist())
    assert lengths == [[3, 3, 3], [9, 3, 9], [20, 3, 9]]


def test_caches_are_overwritten_in_place():
    """Admitting copies nothing that grows with the batch: the state's buffers are its result's."""
    composition, params = tiny_composition()
    programs = build_programs(composition)
    padded, requests = make_requests(random_prompts([5] * 64), new_tokens=20)
    state = programs.prefill.eval_shape(params, padded, requests, capacity=CAPACITY)
    late, asked = make_requests(random_prompts([8]), new_tokens=20)
    rows = np.asarray([7], np.int32)
    admitted = programs.prefill.eval_shape(params, late, asked, capacity=9)
    memory = programs.place.lower(state, admitted, rows).compile().memory_analysis()
    caches = jax.tree.leaves(state.caches)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in caches)
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 4
