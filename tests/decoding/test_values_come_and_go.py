"""Only value networks that running requests use are computed; they come and go while rows run."""

import dataclasses
import gc
import weakref

import jax
import numpy as np
import pytest

from ivl_jax.decoding import engine_model
from ivl_jax.decoding.capacity import BatchShape, CapacityPlanner, EngineLimits, Need, Waiting
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.engine_model import EngineValue
from ivl_jax.sharding import bytes_per_device, make_mesh
from tests.decoding.anew import random_map
from tests.decoding.conftest import small_value
from tests.decoding.tiny import language_model

PROMPTS = ["Once upon a time", "The big dog ran", "Lily said", "A"]


@pytest.fixture(scope="module")
def values(small):
    return [small_value(small, 0), small_value(small, 1, width=24)]


@pytest.fixture(scope="module")
def both(small, values):
    return compose(small, *values, strengths=[0.3, -0.2])


def alone(small, values, strengths, prompt, **options):
    """The tokens of a prompt under the value networks that it uses, composed by themselves."""
    used = [(value, alpha) for value, alpha in zip(values, strengths, strict=True) if alpha]
    model = compose(small, *[v for v, _ in used], strengths=[alpha for _, alpha in used])
    return model.generate(prompt, **options).token_ids


def as_engine_value(model, strength=1.0):
    """The only value network of a model, as an engine adds it."""
    own = model.own_vocabularies[0]
    return EngineValue(model.composition.values[0], model.params.values[0], "added", own, strength)


def finish(engine, ended):
    while not engine.idle:
        ended |= {one.id: one.generation for one in engine.step(max_tokens=3) if one.generation}
    return ended


@pytest.fixture
def runs(monkeypatch):
    """The numbers of value networks that each program was built for, as they run."""
    calls, build = [], engine_model.build_programs

    def building(composition, proposer=None):
        programs = build(composition, proposer)

        def recording(name, program):
            def call(*arguments, **named):
                calls.append((name, len(composition.values)))
                return program(*arguments, **named)

            return call

        recorded = ("prefill", "decode_chunk", "decode_step")
        return programs._replace(
            **{name: recording(name, getattr(programs, name)) for name in recorded}
        )

    monkeypatch.setattr(engine_model, "build_programs", building)
    return calls


def test_requests_of_other_values_share_a_batch_and_give_what_each_alone_gives(small, values, both):
    asked = [(0.3, 0.0), (0.0, 0.0), (0.0, -0.2), (0.1, 0.2)]
    engine, ended, ids, seen = both.engine(EngineLimits(max_rows=4)), {}, [], set()
    for prompt, strengths in zip(PROMPTS, asked, strict=True):
        (prepared,) = both.prepare([prompt], strengths=strengths, max_new_tokens=24)
        ids.append(engine.submit(prepared))
        ended |= {one.id: one.generation for one in engine.step(max_tokens=2) if one.generation}
        seen.add(engine.shape.values)
    finish(engine, ended)
    for request, prompt, strengths in zip(ids, PROMPTS, asked, strict=True):
        expected = alone(small, values, strengths, prompt, max_new_tokens=24)
        assert ended[request].token_ids == expected, strengths
    # The first value joined with the first request, the second one with the third.
    assert {(0,), (0, 1)} <= seen


def test_a_value_that_no_running_request_uses_is_not_computed(both, runs):
    engine, ended = both.engine(EngineLimits(max_rows=4, least_rows=4)), {}
    (plain,) = both.prepare(["Once"], strengths=(0.0, 0.0), max_new_tokens=30)
    (short,) = both.prepare(["Lily"], strengths=(0.0, 0.5), max_new_tokens=4)
    engine.submit(plain)
    for _ in range(2):  # the prompt, then two tokens
        engine.step(max_tokens=2)
    assert engine.shape.values == ()
    engine.submit(short)
    finish(engine, ended)
    assert {count for name, count in runs if name == "prefill"} == {0, 1}
    steps = [count for name, count in runs if name == "decode_chunk"]
    # One value while the short request runs, none before and after it.
    assert steps[0] == steps[-1] == 0
    assert 1 in steps


def test_a_value_added_while_rows_run_changes_none_of_them(small, values):
    first, second = values
    model = compose(small, first, strengths=[0.3])
    engine, ended = model.engine(EngineLimits(max_rows=3)), {}
    other = compose(small, second, strengths=[0.4])
    (new,) = other.prepare([PROMPTS[1]], strengths=(0.4,), max_new_tokens=12)
    (running,) = model.prepare([PROMPTS[0]], max_new_tokens=40)
    old_id = engine.submit(running)
    engine.step(max_tokens=2)
    with pytest.raises(ValueError, match="there is none at \\[5\\]"):
        engine.submit(new._replace(values=(5,)))
    engine.add_value(5, as_engine_value(other))
    with pytest.raises(ValueError, match="place 5 is taken"):
        engine.add_value(5, as_engine_value(other))
    new_id = engine.submit(new._replace(values=(5,)))
    engine.step(max_tokens=2)
    with pytest.raises(ValueError, match="place 5 is used by 1 request"):
        engine.remove_value(5)
    finish(engine, ended)
    assert ended[old_id].token_ids == alone(small, [first], [0.3], PROMPTS[0], max_new_tokens=40)
    assert ended[new_id].token_ids == alone(small, [second], [0.4], PROMPTS[1], max_new_tokens=12)


def test_a_removed_value_frees_its_arrays_and_its_place(small, values):
    engine = compose(small, values[0], strengths=[0.3]).engine()
    added = compose(small, small_value(small, 2), strengths=[1.0])
    (prompt,) = added.prepare([PROMPTS[2]], max_new_tokens=5)
    engine.add_value(1, as_engine_value(added))
    engine.submit(prompt._replace(values=(1,)))
    finish(engine, {})
    array = weakref.ref(jax.tree.leaves(added.params.values)[0])
    del added
    engine.remove_value(1)
    gc.collect()
    assert array() is None
    with pytest.raises(ValueError, match="there is no value network at place 1"):
        engine.remove_value(1)
    # Another one of the same architecture, so of the same programs, takes its place.
    third = small_value(small, 3)
    another = compose(small, third, strengths=[1.0])
    engine.add_value(1, as_engine_value(another))
    request = engine.submit(prompt._replace(values=(1,)))
    found = finish(engine, {})[request].token_ids
    assert found == alone(small, [third], [1.0], PROMPTS[2], max_new_tokens=5)


@pytest.mark.slow
def test_a_row_that_leaves_a_mapped_value_out_does_not_wait_for_the_host(stories260k_dir, runs):
    from ivl_jax.assets import family_folder

    base, shared = (language_model(stories260k_dir, seed=seed) for seed in (0, 1))
    mapped = language_model(family_folder("S"), seed=2)
    one_map = random_map(base, mapped)
    model = compose(base, mapped, shared, strengths=[1.0, -0.5], maps=[one_map, None])
    asked = [(0.0, -0.5), (1.0, 0.0), (0.7, -0.5)]
    engine, ended, ids = model.engine(EngineLimits(max_rows=4)), {}, []
    for prompt, strengths in zip(PROMPTS, asked, strict=False):
        (prepared,) = model.prepare([prompt], strengths=strengths, max_new_tokens=16)
        ids.append(engine.submit(prepared))
        for _ in range(2):
            ended |= {one.id: one.generation for one in engine.step(max_tokens=2) if one.generation}
    finish(engine, ended)
    # Before the mapped value joined, several tokens were decoded at a time.
    assert ("decode_chunk", 1) in runs
    expected = [
        compose(base, shared, strengths=[-0.5]),
        compose(base, mapped, strengths=[1.0], maps=[one_map]),
        compose(base, mapped, shared, strengths=[0.7, -0.5], maps=[one_map, None]),
    ]
    for request, prompt, each in zip(ids, PROMPTS, expected, strict=False):
        assert ended[request].token_ids == each.generate(prompt, max_new_tokens=16).token_ids


def test_a_plan_counts_the_caches_of_the_values_that_it_lets_in():
    def cache_bytes(shape: BatchShape) -> int:
        return shape.rows * shape.capacity * (1 + len(shape.values))

    planner = CapacityPlanner(
        EngineLimits(max_rows=4, max_cache_bytes=4 * 64 * 2), 512, 1, cache_bytes=cache_bytes
    )
    first, second = Need(40, values=(0,)), Need(40, values=(1,))
    waiting = Waiting()
    for need in (first, second, first):
        waiting.add(need)
    order = [first, second, first]
    plan = planner.plan([], waiting, lambda count: order[:count], current=None)
    # Three rows are four, and would hold caches of two value networks: 4 · 64 · 3 bytes.
    assert (plan.admitted, plan.shape.values) == (2, (0, 1))
    assert cache_bytes(plan.shape) <= 4 * 64 * 2
    # Those of value networks that waiting requests alone use are not in the batch.
    tight = dataclasses.replace(planner, limits=EngineLimits(max_rows=4, max_cache_bytes=128))
    plan = tight.plan([first], waiting, lambda count: order[:count], current=plan.shape)
    assert (plan.admitted, plan.shape.values) == (0, (0,))


def test_values_that_join_on_a_mesh_are_sharded_as_those_that_were_there(small, values, both):
    sharded = compose(
        small, *values, strengths=[0.3, -0.2], mesh=make_mesh(data=2, fsdp=2, tensor=2)
    )
    programs = sharded.programs
    sizes = {"capacity": 64, "mapped_capacity": 0}
    begun = programs.empty(rows=8, stop_ids=8, **sizes)
    alphas, (none, joined) = programs.value_caches(np.ones((8, 2), np.float32), which=(1,), **sizes)
    assert none is None
    assert alphas.sharding == begun.requests.strengths.sharding
    shardings = [
        [leaf.sharding for leaf in jax.tree.leaves(cache)]
        for cache in (joined, begun.caches.values[1])
    ]
    assert shardings[0] == shardings[1]
    # Two devices of `tensor` share one kv head: each holds half of the rows of its quarter.
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(joined))
    assert set(bytes_per_device(joined).values()) == {whole // 8}
    asked = [(0.0, 0.0), (0.3, 0.0), (0.3, -0.2)]
    engine, ended, ids, seen = sharded.engine(EngineLimits(max_rows=8, least_rows=8)), {}, [], []
    for prompt, strengths in zip(PROMPTS, asked, strict=False):
        (prepared,) = sharded.prepare([prompt], strengths=strengths, max_new_tokens=12)
        ids.append(engine.submit(prepared))
        for _ in range(2):  # the prompt, then a token for all rows
            ended |= {one.id: one.generation for one in engine.step(max_tokens=1) if one.generation}
        seen.append(engine.shape.values)
    assert seen == [(), (0,), (0, 1)]
    finish(engine, ended)
    for request, prompt, strengths in zip(ids, PROMPTS, asked, strict=False):
        expected = both.generate(prompt, strengths=strengths, max_new_tokens=12).token_ids
        assert ended[request].token_ids == expected, strengths
