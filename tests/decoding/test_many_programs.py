"""Clients choose the shapes of programs: a process keeps no more than the system has room for."""

import jax
import jax.monitoring
import pytest

from ivl_jax import compiled_programs
from ivl_jax.compiled_programs import ProgramLimit, mappings
from ivl_jax.decoding import engine
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from tests.decoding.conftest import make_value
from tests.decoding.tiny import tiny_arch

pytestmark = pytest.mark.skipif(mappings() is None, reason="the system tells no mappings")


@pytest.fixture
def composed(stories):
    arch = tiny_arch(width=16, heads=2, kv_heads=1, layers=1, rows=512, context=512)
    return compose(stories, make_value(stories, arch=arch), strengths=[0.3])


def texts(model):
    """Texts of requests of several shapes, the last of which begin while others run."""
    running, ended = model.engine(), {}
    for length in (3, 40, 90):
        for log_probs in (None, 2):
            options = GenerationOptions(max_new_tokens=length, log_probs=log_probs)
            for prompt in model.prepare([[5] * length, "Once"], options):
                running.submit(prompt)
            for one in running.step(max_tokens=4):
                ended[one.id] = one.generation
    while not running.idle:
        ended |= {one.id: one.generation for one in running.step(max_tokens=4)}
    return {request: generation.text for request, generation in ended.items()}


def test_programs_are_dropped_before_they_take_all_mappings(composed, monkeypatch, caplog):
    caplog.set_level("INFO")
    limit = ProgramLimit()
    monkeypatch.setattr(engine, "program_limit", lambda: limit)
    jax.clear_caches()  # of other tests in this process
    expected, all_kept = texts(composed), mappings()
    jax.clear_caches()
    least = mappings()
    # Beside what there is without programs, half of what the programs above have taken.
    monkeypatch.setattr(compiled_programs, "most_mappings", lambda: all_kept + least)
    monkeypatch.setattr(limit, "_most", (least + all_kept) // 2)
    jax.monitoring.register_event_duration_secs_listener(limit.listen)
    try:
        assert texts(composed) == expected
    finally:
        jax.monitoring.unregister_event_duration_listener(limit.listen)
    assert "dropped the compiled programs" in caplog.text
    assert mappings() < all_kept
