"""Requests choose among exponentially many sets of value networks; what they leave is bounded."""

import functools
import gc
import itertools
import weakref

import pytest

from ivl_jax.decoding import engine_model
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.engine_model import EngineValue
from ivl_jax.decoding.programs import build_programs
from tests.decoding.conftest import make_value
from tests.decoding.tiny import tiny_arch


@pytest.fixture
def parts(stories):
    """A base with six value networks of two architectures; nothing runs."""
    archs = [
        tiny_arch(width=width, heads=2, kv_heads=1, layers=1, rows=512, context=512)
        for width in (8, 40)
    ]
    model = compose(stories, *[make_value(stories, arch=arch) for arch in archs])
    engine = model.engine()
    for place in range(2, 6):
        one = place % 2
        network, arrays = model.composition.values[one], model.params.values[one]
        engine.add_value(place, EngineValue(network, arrays, f"value {place}", None, 1.0))
    return engine._parts


@pytest.fixture
def few_programs(monkeypatch):
    """As `build_programs`, but of few compositions, so that other tests keep theirs."""
    assert build_programs.cache_info().maxsize < 1000
    monkeypatch.setattr(engine_model, "MOST_SETS", 8)
    few = functools.lru_cache(maxsize=4)(build_programs.__wrapped__)
    monkeypatch.setattr(engine_model, "build_programs", few)


def test_sets_and_their_programs_that_are_no_longer_used_are_dropped(parts, few_programs):
    first = (0, 1, 2, 4, 5)
    programs = weakref.ref(parts.part(first).programs.prefill)
    assert parts.part(first) is parts.part(first)
    sets = [places for size in range(4) for places in itertools.combinations(range(6), size)]
    assert len(sets) == 42
    for places in sets:
        if places != first:
            parts.part(places)
            parts.part((0,))  # one that stays in use is kept
    assert len(parts._parts) == 8
    assert (0,) in parts._parts
    assert first not in parts._parts
    gc.collect()
    assert programs() is None
    parts.remove(5)
    assert all(5 not in places for places in parts._parts)
