"""Long prompts are read block by block, and running rows generate between two blocks."""

import dataclasses
import itertools

import jax
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.decoding.capacity import EngineLimits
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.prompt_groups import PromptGroup, next_group
from ivl_jax.sharding import make_mesh
from tests.decoding.anew import random_map
from tests.decoding.conftest import make_value, small_value
from tests.decoding.tiny import language_model, tiny_arch

BLOCK = 64
LONG = "The big dog ran to the park and it was " * 16  # more than three blocks
SHORT = "Once upon a time"
LIMITS = EngineLimits(max_rows=4, least_rows=4, least_capacity=384, prefill_block=BLOCK)


@pytest.fixture(scope="module")
def composed(small):
    return compose(small, small_value(small, 0), strengths=[0.3])


def with_programs(model, **changes):
    """The model with other programs; a change is given the program and its arguments."""

    def changed(name):
        program = getattr(model.programs, name)
        return lambda *arguments, **named: changes[name](program, *arguments, **named)

    programs = model.programs._replace(**{name: changed(name) for name in changes})
    return dataclasses.replace(model, programs=programs)


def recording(model):
    """The model, and the names of the programs that it runs from now on, with their arguments."""
    calls = []

    def record(name):
        def call(program, *arguments, **named):
            calls.append((name, arguments, named))
            return program(*arguments, **named)

        return call

    names = ("prefill", "read_block", "decode_chunk", "read_base", "decode_step")
    return with_programs(model, **{name: record(name) for name in names}), calls


def finish(engine, ended):
    while not engine.idle:
        ended |= {one.id: one.generation for one in engine.step(max_tokens=4) if one.generation}
    return ended


def in_one_piece(model, prepared):
    """What each prompt gets where all are read at once; batches of the same shape."""
    engine = model.engine(dataclasses.replace(LIMITS, prefill_block=None))
    ids = [engine.submit(prompt) for prompt in prepared]
    ended = finish(engine, {})
    return [ended[request] for request in ids]


def test_running_rows_generate_between_two_blocks_and_all_texts_are_those_of_one_piece(composed):
    model, calls = recording(composed)
    running = model.prepare([SHORT, "Lily"], max_new_tokens=60)
    (long,) = model.prepare([LONG], max_new_tokens=12, log_probs=2)
    blocks = -(-len(long.token_ids) // BLOCK)
    assert blocks > 3
    engine, ended = model.engine(LIMITS), {}
    ids = [engine.submit(prompt) for prompt in running]
    engine.step(max_tokens=1)
    ids.append(engine.submit(long))
    calls.clear()
    tokens, steps = [], 0
    while not any(name == "read_block" for name, *_ in calls):  # a free row waits a little
        engine.step(max_tokens=1)
    while sum(name == "read_block" for name, *_ in calls) < blocks:
        for one in engine.step(max_tokens=16):
            tokens.append((one.id, len(one.token_ids)))
        steps += 1
    first = next(place for place, (name, *_) in enumerate(calls) if name == "read_block")
    between = [name for name, *_ in calls[first:]]
    # A block, a token for every running row, a block, a token, …
    assert between == ["read_block", "decode_chunk"] * (blocks - 1) + ["read_block"]
    read = [arguments[2].shape[0] for name, arguments, _ in calls if name == "read_block"]
    assert set(read) == {1}
    assert {named["width"] for name, _, named in calls if name == "read_block"} == {BLOCK}
    each = [sum(count for request, count in tokens if request == one) for one in ids[:2]]
    assert each == [blocks - 1, blocks - 1]
    finish(engine, ended)
    found = [ended[request] for request in ids]
    expected = in_one_piece(composed, [*running, long])
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    chosen = [
        [one.log_prob for one in generation.log_probs] for generation in (found[2], expected[2])
    ]
    assert chosen[0] == pytest.approx(chosen[1], abs=1e-4)


def values_that_differ(small, folder):
    return compose(
        small, small_value(small, 0), small_value(small, 1, width=24), strengths=[0.3, 0.2]
    )


def a_draft(small, folder):
    return compose(small, small_value(small, 0), strengths=[0.3], draft=small, draft_length=3)


def schemes_that_read_the_base(small, folder):
    tiny = tiny_arch(width=16, heads=2, kv_heads=1, layers=1, rows=512, context=512)
    cascade = make_value(small, seed=0, connection="cascade", arch=tiny)
    arch = dataclasses.replace(tiny, base_hidden_size=small.arch.hidden_size)
    hidden = make_value(small, seed=1, connection="hidden", arch=arch)
    shape = hidden.params["base_projection"]["kernel"].shape  # a fresh one adds nothing
    projection = {"kernel": 0.2 * jax.random.normal(jax.random.key(2), shape)}
    hidden = dataclasses.replace(hidden, params={**hidden.params, "base_projection": projection})
    return compose(small, cascade, hidden, strengths=[0.5, 0.5])


def ngrams(small, folder):
    return compose(small, small_value(small, 0), strengths=[0.3], draft="ngram")


def another_vocabulary(small, folder):
    base, shared = (language_model(folder, seed=seed, context=448) for seed in (0, 1))
    mapped = language_model(family_folder("S"), seed=2, context=448)
    maps = [random_map(base, mapped), None]
    return compose(base, mapped, shared, strengths=[1.0, -0.5], maps=maps)


def on_a_mesh(small, folder):
    mesh = make_mesh(data=2, fsdp=1, tensor=4)
    return compose(small, small_value(small, 0), strengths=[0.3], mesh=mesh)


@pytest.mark.parametrize(
    ("make", "strengths"),
    [
        (values_that_differ, [None, (0.0, 0.4), (0.1, 0.0)]),
        pytest.param(
            schemes_that_read_the_base,
            [None, (0.4, 0.4), (0.5, 0.0)],
            marks=pytest.mark.slow,
        ),
        (a_draft, [None, (0.0,), (0.5,)]),
        pytest.param(ngrams, [None, (0.0,), (0.5,)], marks=pytest.mark.slow),
        (another_vocabulary, [(0.0, -0.5), (0.7, -0.5), (1.0, 0.0)]),
        pytest.param(on_a_mesh, [None, (0.0,), (0.5,)], marks=pytest.mark.slow),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_every_network_reads_its_blocks(small, stories260k_dir, make, strengths):
    model, calls = recording(make(small, stories260k_dir))
    options = [{"max_new_tokens": 24, "strengths": each} for each in strengths]
    prepared = model.prepare([SHORT, LONG, LONG[4:]], options)
    expected = in_one_piece(model, prepared)
    calls.clear()
    engine, ended = model.engine(LIMITS), {}
    ids = [engine.submit(prompt) for prompt in prepared[:1]]
    engine.step(max_tokens=1)
    ids += [engine.submit(prompt) for prompt in prepared[1:]]
    finish(engine, ended)
    for request, one in zip(ids, expected, strict=True):
        assert ended[request].token_ids == one.token_ids
    # What the base has begun for the running rows is used after the block, not begun again.
    names = [name for name, *_ in calls if name in ("read_base", "decode_step")]
    assert ("read_base", "read_base") not in itertools.pairwise(names)


def test_a_logit_bias_counts_from_the_first_token_after_the_blocks(composed):
    model, calls = recording(composed)
    options = [{"max_new_tokens": 40}, {"max_new_tokens": 8, "logit_bias": {300: 100}}]
    prepared = model.prepare([SHORT, LONG], options)
    expected = in_one_piece(model, prepared)
    calls.clear()
    engine, ended = model.engine(LIMITS), {}
    ids = [engine.submit(prepared[0])]
    engine.step(max_tokens=1)
    ids.append(engine.submit(prepared[1]))
    finish(engine, ended)
    assert [ended[one].token_ids for one in ids] == [one.token_ids for one in expected]
    assert ended[ids[1]].token_ids == (300,) * 8
    # The rows that are read keep no bias between blocks: one program reads them all.
    states = [arguments[1] for name, arguments, _ in calls if name == "read_block"]
    assert [state.requests.sampling.bias for state in states] == [None] * len(states)


def test_a_request_that_is_being_read_can_be_cancelled_and_can_fail_in_one_piece(composed):
    fails = False

    def failing(program, *arguments, **named):
        if fails:
            raise MemoryError("a block")
        return program(*arguments, **named)

    model = with_programs(composed, read_block=failing)
    (short,) = model.prepare([SHORT], max_new_tokens=40)
    (long,) = model.prepare([LONG], max_new_tokens=5)
    engine, ended = model.engine(LIMITS), {}
    # Nothing else runs: it is read block by block all the same, without a step in between.
    request = engine.submit(long)
    assert engine.step() == []
    assert engine.running == 1
    assert engine.cancel(request)
    assert engine.idle
    first = engine.submit(short)
    engine.step(max_tokens=1)
    second = engine.submit(long)
    while engine.waiting:
        engine.step(max_tokens=1)
    fails = True
    engine.step(max_tokens=1)  # the running row's turn
    with pytest.raises(MemoryError, match="a block"):
        engine.step(max_tokens=1)
    assert (engine.lost, engine.running) == ((second,), 1)
    fails = False
    third = engine.submit(long)
    finish(engine, ended)
    expected = in_one_piece(composed, [short, long])
    assert [ended[one].token_ids for one in (first, third)] == [one.token_ids for one in expected]


def test_a_row_whose_value_goes_while_a_long_prompt_is_read_changes_nothing(small):
    model = values_that_differ(small, None)
    options = [{"max_new_tokens": 6, "strengths": (0.3, 0.0)}, {"strengths": (0.0, 0.2)}]
    prepared = model.prepare([SHORT, LONG], [options[0], {**options[1], "max_new_tokens": 9}])
    engine, ended = model.engine(LIMITS), {}
    ids = [engine.submit(prompt) for prompt in prepared]
    while engine.running < 2:
        engine.step(max_tokens=1)
    # The value that only the running row uses is in the batch; that of the long prompt is not.
    assert engine.shape is not None
    assert engine.shape.values == (0,)
    with pytest.raises(ValueError, match="used by 1 request"):
        engine.remove_value(1)
    finish(engine, ended)
    assert [ended[one].token_ids for one in ids] == [
        one.token_ids for one in in_one_piece(model, prepared)
    ]


@pytest.mark.parametrize(
    ("widths", "rows", "block", "expected"),
    [
        ([16, 16, 16], 4, None, PromptGroup(3, 4)),
        ([16] * 9, 4, None, PromptGroup(4, 4)),
        ([500, 16], 1, None, PromptGroup(1, 1)),
        ([16, 16, 64], 4, 64, PromptGroup(2, 4)),
        ([32, 16, 16], 4, 64, PromptGroup(2, 2)),
        ([64, 16], 4, 64, PromptGroup(1, 1)),
        ([16, 96], 4, 64, PromptGroup(1, 4)),
        ([16] * 9, 2, 64, PromptGroup(4, 4)),
        ([16] * 31, 4, 512, PromptGroup(16, 16)),
        ([16] * 15 + [512], 4, 512, PromptGroup(8, 8)),
        ([64] * 31, 4, 512, PromptGroup(8, 8)),
        ([64] * 7, 4, 512, PromptGroup(4, 4)),
        ([96, 16], 4, 64, PromptGroup(1, 1, in_blocks=True)),
    ],
)
def test_no_group_of_prompts_is_larger_than_a_block(widths, rows, block, expected):
    group = next_group(widths, rows=rows, block=block)
    assert group == expected
    if block is not None and not group.in_blocks:
        assert group.rows * max(widths[: group.size]) <= block


def test_prompts_that_fit_a_block_are_read_at_once_where_nothing_runs(composed):
    model, calls = recording(composed)
    engine = model.engine(LIMITS)
    for prompt in model.prepare([SHORT] * 4, max_new_tokens=3):
        engine.submit(prompt)
    finish(engine, {})
    assert [name for name, *_ in calls][:2] == ["prefill", "decode_chunk"]
    # With a long one among them, the others begin first and generate while it is read.
    calls.clear()
    for prompt in model.prepare([SHORT, LONG, SHORT], max_new_tokens=40):
        engine.submit(prompt)
    finish(engine, {})
    names = [name for name, *_ in calls]
    assert names[:4] == ["prefill", "decode_chunk", "read_block", "decode_chunk"]
    assert names.count("prefill") == 2
    stalls = [pair for pair in itertools.pairwise(names) if "decode_chunk" not in pair]
    assert stalls == []


def test_a_block_that_a_ring_cannot_take_is_refused():
    with pytest.raises(ValueError, match="prefill_block must be ≥ 64, got 63"):
        EngineLimits(prefill_block=63)
