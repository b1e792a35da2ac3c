"""Caches of value networks with their own vocabulary grow as far as the engine's limits allow."""

import pytest

from ivl_jax.assets import family_folder
from ivl_jax.config import GenerationOptions
from ivl_jax.decoding.capacity import EngineLimits
from tests.decoding.anew import compose_beside, random_map
from tests.decoding.tiny import language_model

ESTIMATE = 64


@pytest.fixture(scope="module")
def model(stories260k_dir):
    """A random base, and a value network that reads its random text in many more tokens."""
    base = language_model(stories260k_dir, seed=0, width=16)
    value = language_model(family_folder("S"), seed=2, width=16)
    return compose_beside(base, value, strengths=[1.0], maps=[random_map(base, value)])


def decode(engine, prompt):
    """The generation of a prompt, and the largest shape of its batch."""
    engine.submit(prompt)
    shapes = []
    while not engine.idle:
        (*_, progress) = [None, *engine.step()]
        shapes += [engine.shape] if engine.shape else []
    return progress.generation, max(shapes, key=lambda shape: shape.mapped_capacity)


def test_a_text_of_more_tokens_than_expected_ends_where_its_caches_may_not_grow(model, monkeypatch):
    monkeypatch.setattr("ivl_jax.decoding.engine.expected_slots", lambda *_, **__: ESTIMATE)
    options = GenerationOptions(max_new_tokens=44, temperature=1.5, seed=3)
    (prompt,) = model.prepare(["Once upon a time"], options)
    engine = model.engine(EngineLimits(max_rows=1))
    whole, largest = decode(engine, prompt)
    assert largest.mapped_capacity > ESTIMATE
    planned = engine._parts.cache_bytes(largest._replace(mapped_capacity=ESTIMATE))
    tight = model.engine(EngineLimits(max_rows=1, max_cache_bytes=planned))
    ended, largest = decode(tight, prompt)
    assert largest.mapped_capacity == ESTIMATE
    assert ended.finish_reason == "length"
    assert 0 < len(ended.token_ids) < len(whole.token_ids)
    assert ended.token_ids == whole.token_ids[: len(ended.token_ids)]


def test_the_growth_that_is_left_is_that_of_the_largest_batch(model):
    engine = model.engine(EngineLimits(max_rows=3, max_capacity=100))
    one = model.engine(EngineLimits(max_rows=1, max_capacity=100))
    # While rows move there are two batches, and a row in which a prompt is read.
    caches = one.cache_growth // 3
    assert engine.cache_growth == (3 + 3 + 1) * caches > 0
    limited = model.engine(EngineLimits(max_rows=3, max_capacity=100, max_cache_bytes=1000))
    assert limited.cache_growth == 1000
