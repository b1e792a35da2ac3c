"""Requests come and go while others are decoded, and each gets the text it would get alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.decoding.capacity import EngineLimits, RequestTooLargeError
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.programs import Programs
from ivl_jax.decoding.requests import GenerationOptions
from tests.decoding.conftest import make_value
from tests.decoding.tiny import plain_logits, tiny_arch

PROMPTS = ["Once upon a time", "", "The big dog ran to the park and it was", "Lily said", "A"]


def small_value(small, **changes):
    arch = tiny_arch(width=16, heads=2, kv_heads=1, layers=1, rows=512, context=512)
    return make_value(small, arch=arch, **changes)


@pytest.fixture(scope="module")
def composed(small):
    return compose(small, small_value(small), strengths=[0.3])


def run(engine, ended, *, max_tokens=4):
    """Decode until nothing is left; add what has ended, by id."""
    while not engine.idle:
        take(engine, ended, max_tokens=max_tokens)
    return ended


def take(engine, ended, *, max_tokens=4):
    """One step; add what has ended."""
    progress = engine.step(max_tokens=max_tokens)
    ended.update({one.id: one.generation for one in progress if one.generation is not None})
    return progress


@pytest.mark.parametrize("temperature", [0.0, 1.5], ids=["greedy", "sampled"])
def test_requests_that_come_while_others_decode_give_what_each_alone_gives(composed, temperature):
    each = [
        GenerationOptions(max_new_tokens=20, temperature=temperature, seed=3),
        GenerationOptions(max_new_tokens=70, temperature=temperature, strengths=(-0.2,)),
        GenerationOptions(max_new_tokens=25, temperature=temperature, stop=("e",)),
        GenerationOptions(
            max_new_tokens=9, temperature=temperature, stop_ids=tuple(range(300, 320))
        ),
        GenerationOptions(
            max_new_tokens=30,
            temperature=temperature,
            top_k=9,
            seed=8,
            logit_bias=dict.fromkeys(range(300, 312), 8.0),
        ),
    ]
    prepared = composed.prepare(PROMPTS, each)
    alone = [next(iter(composed.generate_prepared([prompt]))) for prompt in prepared]
    engine = composed.engine(EngineLimits(max_rows=3))
    ids, ended, pieces = [], {}, dict.fromkeys(range(5), "")
    for prompt in prepared:
        ids.append(engine.submit(prompt))
        for one in take(engine, ended, max_tokens=3):
            pieces[one.id] += one.piece
    assert engine.running > 1
    while not engine.idle:
        for one in take(engine, ended):
            pieces[one.id] += one.piece
    assert [ended[request] for request in ids] == alone
    assert [pieces[request] for request in ids] == [generation.text for generation in alone]
    # Nothing to do: nothing is held.
    assert engine.shape is None


def test_a_step_of_no_tokens_is_refused_instead_of_waited_for(composed):
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        next(composed.stream("Once", chunk_tokens=0))


def test_a_cancelled_request_frees_its_row_and_is_not_heard_of_again(composed):
    options = GenerationOptions(max_new_tokens=24)
    prepared = composed.prepare(PROMPTS, options)
    alone = [composed.generate([prompt], options)[0] for prompt in PROMPTS]
    engine, ended, heard = composed.engine(EngineLimits(max_rows=2)), {}, []
    ids = [engine.submit(prompt) for prompt in prepared]
    for _ in range(3):
        heard += [one.id for one in take(engine, ended)]
    assert (engine.running, engine.waiting) == (2, 3)
    assert engine.cancel(ids[0])  # it runs
    assert (engine.running, engine.waiting) == (1, 3)
    assert engine.cancel(ids[3])  # it waits
    assert not engine.cancel(ids[0])
    assert not engine.cancel(ids[3])
    take(engine, ended)
    # The third begins at once, in the row that was left.
    assert (engine.running, engine.waiting) == (2, 1)
    before = set(heard)
    assert run(engine, ended) == {ids[place]: alone[place] for place in (1, 2, 4)}
    assert before == {ids[0], ids[1]}
    assert not engine.cancel(ids[1])
    engine.submit(prepared[0])
    assert engine.cancel(5)
    assert engine.idle


def test_rows_that_run_wait_for_one_group_of_prompts_at_most(recorded):
    model, calls = recorded
    options = GenerationOptions(max_new_tokens=40)
    engine = model.engine(EngineLimits(max_rows=8, least_rows=8))
    for prompt in model.prepare(PROMPTS[:2], options):
        engine.submit(prompt)
    engine.step()
    for prompt in model.prepare(PROMPTS[:3] * 2, options):
        engine.submit(prompt)
    run(engine, {})
    work = [
        (name, arguments) for name, arguments, _ in calls if name in ("prefill", "decode_chunk")
    ]
    names = [name for name, _ in work]
    assert names.count("prefill") == 7
    # Between two prefills the running rows get at least one token.
    for name, following in itertools.pairwise(names[1:]):
        assert (name, following) != ("prefill", "prefill")
    # One prompt at a time beside running rows: an eighth of the batch.
    assert {len(arguments[1]) for name, arguments in work[1:] if name == "prefill"} == {1}


def test_requests_beyond_the_limits_are_refused_before_anything_is_computed(composed):
    def fail(*_, **__):
        pytest.fail("something was computed")

    fail.eval_shape = composed.programs.empty.eval_shape
    broken = dataclasses.replace(composed, programs=Programs(*[fail] * len(Programs._fields)))
    (short,) = broken.prepare(["One"], GenerationOptions(max_new_tokens=30))
    (long,) = broken.prepare(["One"], GenerationOptions(max_new_tokens=300))
    engine = broken.engine(EngineLimits(max_capacity=100))
    engine.submit(short)
    with pytest.raises(RequestTooLargeError, match="more than the engine's max_capacity of 100"):
        engine.submit(long)
    shape = composed.programs.empty.eval_shape(rows=1, capacity=64, stop_ids=8)
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shape.caches))
    engine = broken.engine(EngineLimits(max_cache_bytes=one))
    engine.submit(short)
    with pytest.raises(RequestTooLargeError, match=f"max_cache_bytes of {one:,}"):
        engine.submit(long)
    assert engine.waiting == 1
    with pytest.raises(RequestTooLargeError, match="max_cache_bytes"):
        broken.engine(EngineLimits(max_cache_bytes=one - 1)).submit(short)


def test_a_request_that_does_not_fit_with_the_others_waits_its_turn(composed):
    options = [GenerationOptions(max_new_tokens=n) for n in (20, 20, 110, 20)]
    prepared = composed.prepare(PROMPTS[:4], options)
    alone = [composed.generate([p], o)[0] for p, o in zip(PROMPTS, options, strict=False)]
    shape = composed.programs.empty.eval_shape(rows=2, capacity=64, stop_ids=8)
    most = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shape.caches))
    engine, ended, order = composed.engine(EngineLimits(max_cache_bytes=most)), {}, []
    ids = [engine.submit(prompt) for prompt in prepared]
    while not engine.idle:
        order += [one.id for one in take(engine, ended) if one.generation is not None]
        if engine.shape is not None:
            assert engine.shape.rows * engine.shape.capacity <= 2 * 64
    assert [ended[request] for request in ids] == alone
    # Nobody overtakes the long one.
    assert order.index(ids[2]) < order.index(ids[3])


@pytest.fixture(scope="module")
def with_draft(small):
    return compose(small, small_value(small), strengths=[0.3], draft=small, draft_length=3)


@pytest.mark.parametrize(
    ("which", "rows"), [("composed", 2), pytest.param("with_draft", 5, marks=pytest.mark.slow)]
)
def test_log_probabilities_are_those_of_teacher_forcing(request, which, rows):
    model = request.getfixturevalue(which)
    # Rows that ask for none, for their own, and for the likeliest; sampling changes none of them.
    asked = [2, None, 0, 5, 1]
    each = [
        GenerationOptions(max_new_tokens=6 + 5 * i, log_probs=top, temperature=i % 2 * 0.9, top_k=5)
        for i, top in enumerate(asked)
    ]
    together = model.generate(PROMPTS, each, batch_size=rows)
    for prompt, top, generation in zip(PROMPTS, asked, together, strict=True):
        if top is None:
            assert generation.log_probs is None
            continue
        ids = model.encode(prompt)
        text = [*ids, *generation.token_ids]
        logits = plain_logits(model.composition, model.params, text, model.strengths)
        expected = np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))[len(ids) - 1 : -1]
        base = plain_logits(model.composition, model.params, text, [0.0] * len(model.strengths))
        base = np.asarray(jax.nn.log_softmax(jnp.asarray(base), axis=-1))[len(ids) - 1 :]
        alone = [base[place, token] for place, token in enumerate(generation.token_ids)]
        found = [scores.base_log_prob for scores in generation.log_probs]
        np.testing.assert_allclose(found, alone, atol=1e-3)
        assert len(generation.log_probs) == len(generation.token_ids)
        for row, token, found in zip(
            expected, generation.token_ids, generation.log_probs, strict=True
        ):
            assert found.log_prob == pytest.approx(row[token], abs=1e-3)
            assert len(found.top) == top
            np.testing.assert_allclose(
                [log_prob for _, log_prob in found.top], -np.sort(-row)[:top], atol=1e-3
            )
            np.testing.assert_allclose(
                [row[token_id] for token_id, _ in found.top], -np.sort(-row)[:top], atol=1e-3
            )


def test_log_probabilities_reach_the_caller_with_their_tokens(composed):
    (prompt,) = composed.prepare([""], GenerationOptions(max_new_tokens=20, log_probs=1))
    engine, tokens, log_probs, last = composed.engine(), [], [], None
    engine.submit(prompt)
    while not engine.idle:
        for one in engine.step(max_tokens=3):
            assert len(one.token_ids) == len(one.log_probs) <= 3
            tokens += one.token_ids
            log_probs += one.log_probs
            last = one.generation
    assert tuple(tokens) == last.token_ids
    assert tuple(log_probs) == last.log_probs
    # Greedy: each token is the likeliest itself.
    assert [found.top[0][0] for found in log_probs] == tokens
    assert [found.top[0][1] for found in log_probs] == [found.log_prob for found in log_probs]


@pytest.mark.parametrize(
    "draft", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "draft"]
)
def test_a_nan_in_one_values_weights_ends_its_row_alone_and_names_it(small, draft):
    value = small_value(small)
    healthy = compose(small, value, strengths=[0.3])
    options = GenerationOptions(max_new_tokens=20)
    first, second, third, _ = free = healthy.generate(PROMPTS[:4], options)
    others = {token for g in (second, third) for token in g.token_ids}
    others |= {token for prompt in PROMPTS[:4] for token in healthy.encode(prompt)}
    place, token = next((i, t) for i, t in enumerate(first.token_ids) if i >= 4 and t not in others)
    other = small_value(small, seed=1)
    embedding = other.params["embed_tokens"]["embedding"].at[token].set(jnp.nan)
    broken = dataclasses.replace(
        other, params={**other.params, "embed_tokens": {"embedding": embedding}}
    )
    more = {"draft": small, "draft_length": 3} if draft else {}
    # Too small a strength to move a logit, but not one that leaves the network out.
    model = compose(small, value, broken, strengths=[0.3, 1e-12], **more)
    # Both rows of the batch, then the row that has failed: a prompt that is itself unreadable, and
    # one that is as good as any.
    found = model.generate([*PROMPTS[:2], [5, token], PROMPTS[2]], options, batch_size=2)
    assert found[1] == second
    assert found[3] == third
    assert (found[0].finish_reason, found[0].token_ids) == ("error", first.token_ids[: place + 1])
    assert (found[2].finish_reason, found[2].token_ids) == ("error", ())
    for generation in (found[0], found[2]):
        assert "value network 2" in generation.error
        assert "value network 1" not in generation.error
        assert "not finite" in generation.error
    assert {g.error for g in (*free, found[1], found[3])} == {None}


def test_a_failed_step_names_what_is_lost_and_the_others_are_decoded(composed):
    """A failure while new prompts are read costs these alone; one while decoding, all that run."""
    options = GenerationOptions(max_new_tokens=12)
    prepared = composed.prepare(PROMPTS[:3], options)
    alone = [composed.generate([prompt], options)[0] for prompt in PROMPTS[:3]]
    fails = {"prefill": False, "decode_chunk": False}

    def failing(name):
        def run(*arguments, **more):
            if fails[name]:
                raise MemoryError(name)
            return getattr(composed.programs, name)(*arguments, **more)

        return run

    programs = composed.programs._replace(**{name: failing(name) for name in fails})
    engine = dataclasses.replace(composed, programs=programs).engine(EngineLimits(max_rows=4))
    ended = {}
    first = engine.submit(prepared[0])
    take(engine, ended, max_tokens=2)
    second = engine.submit(prepared[1])
    fails["prefill"] = True
    # The running row waits for a free row's worth of steps at most, then the prompt is read.
    with pytest.raises(MemoryError, match="prefill"):
        run(engine, ended, max_tokens=2)
    assert (engine.lost, engine.running) == ((second,), 1)
    fails["prefill"] = False
    third = engine.submit(prepared[2])
    assert run(engine, ended) == {first: alone[0], third: alone[2]}
    fourth = engine.submit(prepared[1])
    take(engine, ended)
    fails["decode_chunk"] = True
    with pytest.raises(MemoryError, match="decode_chunk"):
        take(engine, ended)
    assert engine.lost == (fourth,)
    assert engine.idle
    fails["decode_chunk"] = False
    fifth = engine.submit(prepared[1])
    assert run(engine, {})[fifth] == alone[1]


def test_a_batch_that_cannot_grow_costs_the_newcomer_alone(composed):
    options = GenerationOptions(max_new_tokens=12)
    prepared = composed.prepare(PROMPTS[:3], options)
    alone = [composed.generate([prompt], options)[0] for prompt in PROMPTS[:3]]
    fails = []

    def empty(*arguments, **more):
        if fails:
            raise MemoryError("no room for a row more")
        return composed.programs.empty(*arguments, **more)

    programs = composed.programs._replace(empty=empty)
    engine = dataclasses.replace(composed, programs=programs).engine(EngineLimits(max_rows=4))
    first = engine.submit(prepared[0])
    take(engine, {}, max_tokens=2)
    assert engine.shape.rows == 1
    second, third = engine.submit(prepared[1]), engine.submit(prepared[2])
    fails.append(True)
    with pytest.raises(MemoryError, match="no room for a row more"):
        take(engine, {}, max_tokens=2)
    assert (engine.lost, engine.running, engine.waiting) == ((second,), 1, 1)
    fails.clear()
    assert run(engine, {}) == {first: alone[0], third: alone[2]}


def test_strengths_for_other_networks_than_there_are_are_refused_on_arrival(composed):
    (prompt,) = composed.prepare(["One"], GenerationOptions(max_new_tokens=5))
    wrong = prompt._replace(options=dataclasses.replace(prompt.options, strengths=(0.1, 0.2)))
    with pytest.raises(ValueError, match="expected 1, one per value network, got 2"):
        composed.engine().submit(wrong)
