"""A run traces its step once; another run of equal shapes finds it compiled."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ivl_jax.config import StepConfig
from ivl_jax.training.loop import run
from tests.training.runs import records

_TRACED = "/jax/core/compile/jaxpr_trace_duration"
_HIT = "/jax/compilation_cache/cache_hits"
_MISS = "/jax/compilation_cache/cache_misses"


@contextmanager
def counted():
    """Counts traces by the traced function's name, and hits and misses of the compile cache."""
    counts = Counter()

    def trace(event, duration, *, fun_name="", **_):
        if event == _TRACED:
            counts[fun_name] += 1

    def look_up(event, **_):
        counts[event] += 1

    jax.monitoring.register_event_duration_secs_listener(trace)
    jax.monitoring.register_event_listener(look_up)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(trace)
        jax.monitoring.unregister_event_listener(look_up)


@pytest.fixture
def empty_cache(tmp_path):
    """A persistent compile cache of its own that keeps every program."""
    changes = {
        "jax_compilation_cache_dir": str(tmp_path / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()  # what other tests compiled is not in it
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_a_run_traces_its_step_once_and_the_next_run_finds_it_compiled(
    tiny_config, tmp_path, empty_cache
):
    first = replace(tiny_config, step=StepConfig(max_steps=0, epochs=2.0, batch_size=4))
    with counted() as counts:
        result = run(first)
    steps = [record["step"] for record in records(result.run_dir) if "loss" in record]
    assert len(steps) >= 10
    assert counts["step"] == 1
    assert counts["evaluate"] == 1

    jax.clear_caches()  # as in a new process
    with counted() as again:
        run(replace(first, run_dir=str(tmp_path / "again")))
    assert again["step"] == 1
    assert again[_HIT] > 0
    assert again[_MISS] == 0
