"""Nothing that a caller may ask for traces or compiles a program anew, but a larger bucket."""

import dataclasses

import jax
import jax.monitoring
import pytest

from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from tests.decoding.conftest import make_value

PROMPTS = ["Once", "A girl named Lily liked it", "", "Two", "The dog", "She said"]
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "traced",
    "/jax/core/compile/backend_compile_duration": "compiled",
}


@pytest.fixture
def work():
    """What was traced and compiled since the fixture or the last `clear`."""
    found = []

    def listen(event, duration, **details):
        if event in EVENTS:
            found.append((EVENTS[event], details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def greedy(tokens, **changes):
    return GenerationOptions(max_new_tokens=tokens, **changes)


@pytest.fixture
def warm(composed, work):
    """The model, after one prompt alone and six in four rows, refilled while others run."""
    composed.generate(["One"], greedy(20))
    composed.generate(PROMPTS, [greedy(20 - 3 * i) for i in range(6)], batch_size=4)
    work.clear()
    return composed


def test_prompts_of_other_lengths_in_the_bucket_compile_nothing(warm, work):
    warm.generate(["A girl named Lily liked it"], greedy(31))
    warm.generate([[5] * 13], greedy(1))
    assert work == []


def test_other_settings_compile_nothing(warm, work):
    hot = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 9}
    warm.generate(["Two"], greedy(20, strengths=(-1.0,), stop_ids=(7, 8), **hot))
    each = [greedy(5 + i, seed=i, temperature=i / 2, stop=("e",)) for i in range(6)]
    warm.generate(PROMPTS, each, batch_size=4)
    assert work == []


def test_a_bias_compiles_programs_once_and_rows_without_one_keep_theirs(warm, work):
    warm.generate(["One"], greedy(20, logit_bias={5: 1.0}))
    assert work
    work.clear()
    warm.generate(["Two"], greedy(20, logit_bias={token: -token for token in range(16)}))
    warm.generate(["Two"], greedy(20))
    warm.generate(PROMPTS, greedy(20), batch_size=4)
    assert work == []


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_the_size_of_chunks_compiles_nothing(warm, work, chunk):
    list(warm.stream("Three", greedy(9, stop=("x", "yy")), chunk_tokens=chunk))
    prepared = warm.prepare(PROMPTS, greedy(12))
    list(warm.generate_prepared(prepared, batch_size=4, chunk_tokens=chunk))
    assert work == []


def test_longer_queues_compile_nothing_however_their_rows_end(warm, work):
    each = [greedy(1 + 5 * i % 19) for i in range(18)]
    assert len(warm.generate(PROMPTS * 3, each, batch_size=4)) == 18
    assert work == []


def test_another_model_of_the_same_architectures_reuses_the_programs(warm, work, stories):
    base = dataclasses.replace(stories, params=jax.tree.map(lambda x: -x, stories.params))
    other = compose(base, make_value(stories, seed=5), strengths=[5.0])
    assert other.programs is warm.programs
    work.clear()
    before = warm.generate(PROMPTS, greedy(20), batch_size=4)
    assert other.generate(PROMPTS, greedy(20), batch_size=4) != before
    assert work == []


def test_a_larger_bucket_is_traced_and_compiled_once(warm, work):
    """The counter counts."""
    warm.generate([[5] * 65], greedy(2))
    assert {("traced", "prefill_program"), ("compiled", "prefill_program")} <= {
        (kind, str(name).removeprefix("jit_").removeprefix("jit(").removesuffix(")"))
        for kind, name in work
    }
    work.clear()
    warm.generate([[6] * 70], greedy(3))
    assert work == []
