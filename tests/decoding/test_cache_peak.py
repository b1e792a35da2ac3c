"""Caches stay below their limit at every moment: while rows move, and while prompts are read."""

import gc

import jax
import pytest

from ivl_jax.decoding.capacity import (
    BatchShape,
    CapacityPlanner,
    EngineLimits,
    Need,
    RequestTooLargeError,
    Waiting,
)
from ivl_jax.decoding.compose import compose
from tests.decoding.conftest import small_value

LONG = "The big dog ran to the park and it was " * 8


def planner(most, **limits):
    return CapacityPlanner(
        EngineLimits(max_rows=8, max_cache_bytes=most, **limits),
        512,
        1,
        cache_bytes=lambda shape: shape.rows * shape.capacity,
    )


@pytest.mark.parametrize(("most", "admitted"), [((4 + 8 + 1) * 64, 1), ((4 + 6) * 64, 0)])
def test_a_batch_grows_only_where_old_and_new_fit_together(most, admitted):
    waiting, need = Waiting(), Need(64)
    waiting.add(need)
    current = BatchShape(4, 64, 0, 1)
    plan = planner(most).plan([need] * 4, waiting, lambda count: [need], current=current)
    assert plan.admitted == admitted
    assert admitted or plan.shape == current
    # Where nothing runs, the old batch goes first.
    assert planner(64).plan([], waiting, lambda count: [need], current=current).admitted == 1


def test_a_prompt_read_in_blocks_needs_room_beside_its_batch():
    need = Need(64, in_blocks=True)
    with pytest.raises(RequestTooLargeError, match="take 128 bytes on each device"):
        planner(64 + 63).check(need, tokens=50)
    planner(64 + 64).check(need, tokens=50)


def test_the_caches_on_the_device_never_exceed_the_limit(small, monkeypatch):
    model = compose(small, small_value(small, 0), strengths=[0.3])
    engine = model.engine(EngineLimits(max_rows=4, prefill_block=64))
    most = 5 * engine._parts.cache_bytes(BatchShape(1, 256, 0, 8, values=(0,)))
    engine = model.engine(EngineLimits(max_rows=4, prefill_block=64, max_cache_bytes=most))
    gc.collect()
    before, peaks = {id(array) for array in jax.live_arrays()}, []

    def measure():
        caches = [one for one in jax.live_arrays() if one.ndim == 4 and id(one) not in before]
        peaks.append(sum(one.nbytes for one in caches))

    from ivl_jax.decoding import batch

    for name in ("_resize", "_join", "read_block"):
        run = getattr(batch.RowBatch, name)

        def measured(self, *given, _run=run, **named):
            programs = self._model.programs

            def place(state, others, rows):
                measure()
                return programs.place(state, others, rows)

            self._model = self._model._replace(programs=programs._replace(place=place))
            try:
                return _run(self, *given, **named)
            finally:
                self._model = self._parts.part(self.shape.values)

        monkeypatch.setattr(batch.RowBatch, name, measured)
    texts = ["One", "Two", LONG, "Once upon", LONG, "Lily"]
    prepared = model.prepare(texts, max_new_tokens=40)
    ids, ended = [], {}
    for prompt in prepared:
        ids.append(engine.submit(prompt))
        ended |= {one.id: one.generation for one in engine.step(max_tokens=4) if one.generation}
    while not engine.idle:
        ended |= {one.id: one.generation for one in engine.step(max_tokens=4) if one.generation}
    assert peaks
    assert max(peaks) <= most
    for request, prompt in zip(ids, texts, strict=True):
        assert ended[request].token_ids == model.generate(prompt, max_new_tokens=40).token_ids
