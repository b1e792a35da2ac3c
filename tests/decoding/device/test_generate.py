import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.decoding.device.finish import FinishReason
from ivl_jax.decoding.device.generate import read_tokens
from ivl_jax.decoding.device.sampling import sample_tokens
from ivl_jax.decoding.programs import build_programs
from tests.decoding.tiny import (
    VOCAB,
    assert_is_teacher_forced_arg_max,
    make_requests,
    plain_logits,
    random_prompts,
    tiny_composition,
)

CAPACITY = 64


def decode(composition, params, prompts, *, chunk=1000, capacity=CAPACITY, **options):
    """Generated ids of each row, and its finish reason."""
    programs = build_programs(composition)
    padded, requests = make_requests(prompts, **{"width": 20, **options})
    state = programs.prefill(params, padded, requests, capacity=capacity)
    nothing = jnp.zeros(len(prompts), bool)
    while np.any(np.asarray(state.finish) == FinishReason.RUNNING):
        state = programs.decode_chunk(params, state, np.int32(chunk), nothing)
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    generated = [
        tokens[row, len(prompt) : lengths[row]].tolist() for row, prompt in enumerate(prompts)
    ]
    return generated, [FinishReason(int(code)) for code in state.finish]


@pytest.mark.parametrize(
    ("connections", "strengths"),
    [
        pytest.param((), (), marks=pytest.mark.slow),
        (("residual",), (1.0,)),
        (("residual",), (-0.5,)),
        (("cascade",), (1.0,)),
        pytest.param(("cascade_no_text",), (1.0,), marks=pytest.mark.slow),
        (("hidden",), (1.0,)),
        (("linear",), (1.0,)),
        (("residual", "cascade"), (0.7, -0.3)),
        pytest.param(("linear", "residual"), (0.7, -0.3), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_cached_composed_greedy_is_the_teacher_forced_arg_max(connections, strengths, seed):
    composition, params = tiny_composition(connections, seed=seed)
    prompts = random_prompts([5, 1, 12], seed)
    generated, _ = decode(composition, params, prompts, new_tokens=30, strengths=strengths)
    for prompt, own in zip(prompts, generated, strict=True):
        assert len(own) == 30
        assert_is_teacher_forced_arg_max(composition, params, prompt, own, strengths)


def test_a_head_of_several_depths_decodes_as_it_reads_whole_texts():
    composition, params = tiny_composition(("residual",), depths=2)
    assert composition.values[0].arch.head_depths == 2
    prompts = random_prompts([5, 1, 12])
    generated, _ = decode(composition, params, prompts, new_tokens=30)
    for prompt, own in zip(prompts, generated, strict=True):
        assert_is_teacher_forced_arg_max(composition, params, prompt, own, (1.0,))


def test_a_bfloat16_base_composes_with_a_float32_value_in_float32():
    composition, params = tiny_composition(base_dtype="bfloat16")
    programs = build_programs(composition)
    padded, requests = make_requests(random_prompts([5, 9]), new_tokens=10)
    state = programs.prefill(params, padded, requests, capacity=CAPACITY)
    assert state.caches.base.keys[0].dtype == jnp.bfloat16
    assert state.caches.values[0].keys[0].dtype == jnp.float32
    state = programs.decode_chunk(params, state, np.int32(20), jnp.zeros(2, bool))
    assert state.lengths.tolist() == [15, 19]
    read = jax.jit(read_tokens, static_argnums=0)
    positions = jnp.asarray([[4], [8]], jnp.int32)
    tokens = jnp.take_along_axis(state.tokens, positions, axis=1)
    logits, _, _ = read(
        composition, params, state, tokens, positions=positions, wanted=jnp.zeros_like(tokens)
    )
    assert logits.dtype == jnp.float32


def test_ragged_prompts_in_a_batch_equal_each_prompt_alone():
    composition, params = tiny_composition()
    prompts = random_prompts([3, 17, 1])
    together, _ = decode(composition, params, prompts, new_tokens=25)
    for row, prompt in enumerate(prompts):
        alone, _ = decode(composition, params, [prompt], new_tokens=25, width=17)
        assert together[row] == alone[0]


def test_sampled_rows_in_a_batch_equal_each_row_alone():
    composition, params = tiny_composition()
    prompts = random_prompts([3, 17, 1])
    options = {"new_tokens": 25, "temperature": 1.3, "top_k": 20, "seed": 5}
    together, _ = decode(composition, params, prompts, **options)
    for row, prompt in enumerate(prompts):
        alone, _ = decode(composition, params, [prompt], rows=[row], **options)
        assert together[row] == alone[0]
    assert decode(composition, params, prompts, **options)[0] == together
    assert decode(composition, params, prompts, **{**options, "seed": 6})[0] != together


def test_the_nth_sampled_token_is_drawn_from_the_plain_logits_with_index_n():
    composition, params = tiny_composition()
    prompts = random_prompts([3, 17, 1])
    options = {"new_tokens": 12, "temperature": 1.3, "top_k": 20, "seed": 5}
    generated, _ = decode(composition, params, prompts, **options)
    _, requests = make_requests(prompts, **options)
    for index in range(12):
        logits = [
            plain_logits(composition, params, [*prompt, *own[:index]], (1.0,))[-1]
            for prompt, own in zip(prompts, generated, strict=True)
        ]
        drawn = sample_tokens(
            jnp.asarray(logits), requests.sampling, requests.keys, jnp.full(3, index, jnp.int32)
        )
        assert drawn.tolist() == [own[index] for own in generated]


def test_the_size_of_a_chunk_changes_nothing():
    composition, params = tiny_composition()
    prompts = random_prompts([4, 11, 1])
    options = {"new_tokens": [30, 7, 9], "temperature": 0.8}
    whole = decode(composition, params, prompts, **options)
    for chunk in (1, 3, 8):
        assert decode(composition, params, prompts, chunk=chunk, **options) == whole


def test_strength_zero_is_exactly_the_base_and_each_row_has_its_own_strength():
    composition, params = tiny_composition()
    alone, alone_params = tiny_composition(())
    prompts = random_prompts([6, 6, 6])
    prompts = [prompts[0]] * 3
    padded, requests = make_requests(prompts, new_tokens=20)
    requests = requests._replace(strengths=jnp.asarray([[0.0], [1.0], [-1.0]], jnp.float32))
    programs = build_programs(composition)
    state = programs.prefill(params, padded, requests, capacity=CAPACITY)
    state = programs.decode_chunk(params, state, np.int32(99), jnp.zeros(3, bool))
    rows = np.asarray(state.tokens)[:, 6:26].tolist()
    (base_row, *_), _ = decode(alone, alone_params, prompts, new_tokens=20, strengths=())
    assert rows[0] == base_row
    assert len({tuple(row) for row in rows}) == 3
    for row, strength in zip(rows, (0.0, 1.0, -1.0), strict=True):
        assert_is_teacher_forced_arg_max(composition, params, prompts[0], row, (strength,))


def test_padding_tokens_are_never_generated_and_values_never_read_what_they_do_not_know():
    # 64 rows sampled hot: the base has 44 output rows, 40 of them real; the value has 38 rows.
    composition, params = tiny_composition()
    prompts = [[token % VOCAB, 39, 7] for token in range(64)]
    generated, _ = decode(composition, params, prompts, new_tokens=10, temperature=50.0)
    seen = {token for row in generated for token in row}
    assert max(seen) == VOCAB - 1
    assert {7, 37, 38, 39} <= seen


def test_rows_end_at_their_stop_id_or_their_limit_and_say_which():
    composition, params = tiny_composition()
    prompts = random_prompts([5, 8])
    free, reasons = decode(composition, params, prompts, new_tokens=[20, 6])
    assert reasons == [FinishReason.LENGTH, FinishReason.LENGTH]
    assert [len(row) for row in free] == [20, 6]
    stop = next(token for token in free[0] if token not in free[1])
    ended, reasons = decode(composition, params, prompts, new_tokens=[20, 6], stop_ids=(stop,))
    assert ended == [free[0][: free[0].index(stop) + 1], free[1]]
    assert reasons == [FinishReason.EOS, FinishReason.LENGTH]


def test_a_row_without_room_generates_nothing():
    composition, params = tiny_composition()
    generated, reasons = decode(composition, params, random_prompts([5, 5]), new_tokens=[0, 2])
    assert [len(row) for row in generated] == [0, 2]
    assert reasons[0] == FinishReason.LENGTH


def test_a_chunk_ends_early_when_every_row_is_done():
    composition, params = tiny_composition()
    programs = build_programs(composition)
    padded, requests = make_requests(random_prompts([4, 4]), new_tokens=1000)
    state = programs.prefill(params, padded, requests, capacity=CAPACITY)
    both = jnp.ones(2, bool)
    # A loop that does not end early would run for years.
    after = programs.decode_chunk(params, state, np.int32(2**31 - 1), both)
    assert after.lengths.tolist() == [5, 5]
    assert after.finish.tolist() == [FinishReason.STOP_STRING] * 2


def test_rolling_a_row_back_is_setting_a_smaller_length():
    composition, params = tiny_composition()
    programs = build_programs(composition)
    prompts = random_prompts([6, 9])
    padded, requests = make_requests(prompts, new_tokens=30)
    nothing = jnp.zeros(2, bool)
    state = programs.prefill(params, padded, requests, capacity=CAPACITY)
    state = programs.decode_chunk(params, state, np.int32(12), nothing)
    expected = np.asarray(state.tokens)
    ends = np.asarray(state.lengths)
    state = state._replace(lengths=state.lengths - jnp.asarray([7, 2], jnp.int32))
    state = state._replace(tokens=state.tokens.at[0, 12:].set(1).at[1, 20:].set(1))
    state = programs.decode_chunk(params, state, np.int32(7), nothing)
    assert (np.asarray(state.tokens)[0, : ends[0]] == expected[0, : ends[0]]).all()
    assert (np.asarray(state.tokens)[1, : ends[1]] == expected[1, : ends[1]]).all()


def test_reading_several_tokens_at_once_gives_their_plain_logits():
    # What verifying a draft needs: T > 1 tokens a row, each row at its own position.
    composition, params = tiny_composition()
    texts = random_prompts([20, 20])
    starts = (4, 9)
    padded, requests = make_requests(
        [text[:start] for text, start in zip(texts, starts, strict=True)], new_tokens=30
    )
    state = build_programs(composition).prefill(params, padded, requests, capacity=CAPACITY)
    positions = jnp.asarray([[start + t for t in range(5)] for start in starts], jnp.int32)
    tokens = jnp.take_along_axis(jnp.asarray(texts, jnp.int32), positions, axis=1)
    wanted = jnp.tile(jnp.arange(5, dtype=jnp.int32)[None], (2, 1))
    read = jax.jit(read_tokens, static_argnums=0)
    logits, _, _ = read(composition, params, state, tokens, positions=positions, wanted=wanted)
    for row, start in enumerate(starts):
        plain = plain_logits(composition, params, texts[row][: start + 5], (1.0,))[start:]
        np.testing.assert_allclose(logits[row, :, :VOCAB], plain[:, :VOCAB], atol=2e-4)


def test_decoding_donates_the_caches_and_updates_them_in_place():
    composition, params = tiny_composition()
    programs = build_programs(composition)
    padded, requests = make_requests(random_prompts([4] * 4), new_tokens=1000)
    state = programs.prefill(params, padded, requests, capacity=4096)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.caches))
    nothing = jnp.zeros(4, bool)
    compiled = programs.decode_chunk.lower(params, state, np.int32(4), nothing).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4
    old = state.caches.base.keys[0]
    programs.decode_chunk(params, state, np.int32(4), nothing)
    assert old.is_deleted()
