"""Times are taken in turn, first calls apart."""

import time
from pathlib import Path

import jax
import pytest

from benchmarks.fresh_process import in_fresh_process
from benchmarks.timing import (
    Figures,
    Timing,
    available_memory,
    peak_memory,
    time_in_turn,
    time_work,
)


def test_works_are_called_in_turn_after_their_warm_up() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = time_in_turn(works, repeats=3, warm_up=2)
    assert "".join(calls) == "aabb" + "ababab"
    assert [len(times[name].seconds) for name in "ab"] == [3, 3]
    assert times["a"].warm_up is not None
    assert time_work(lambda: None, repeats=1, warm_up=0).warm_up is None


def test_first_call_is_kept_apart() -> None:
    left = [0.2]
    timing = time_work(lambda: time.sleep(left.pop() if left else 0.0), repeats=3)
    assert timing.warm_up is not None
    assert timing.warm_up >= 0.2
    assert timing.figures.median < 0.2


def test_unfinished_jax_arrays_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    time_work(lambda: "arrays", repeats=2, warm_up=1)
    assert waited == ["arrays"] * 3


def test_median_spread_and_rate() -> None:
    assert Figures.of([3.0, 1.0, 2.0]) == Figures(2.0, 2.0)
    timing = Timing(None, (2.0, 1.0, 4.0))
    assert timing.figures == Figures(2.0, 3.0)
    assert timing.rate(8) == Figures(4.0, 6.0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux'")
def test_peak_memory_is_the_programs_own_not_its_parents() -> None:
    mine = peak_memory()
    fresh = in_fresh_process(peak_memory, {})
    assert 5e6 < fresh < 0.8 * mine  # this process has imported JAX
    assert 1e6 < available_memory() < 1e14
