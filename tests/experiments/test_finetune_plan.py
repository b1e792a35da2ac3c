"""The search of the references: what it tries next, and what it chooses."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import pytest

from ivl_jax.experiments.finetune.plan import (
    STAGES,
    Stage,
    chosen,
    levers,
    missing_runs,
)
from ivl_jax.experiments.finetune.settings import (
    RATES,
    Curve,
    Point,
    Setting,
    best_point,
    criteria,
    missing,
)

_L = Setting("L", "facts", learning_rate=3e-4, epochs=10.0)


def _curve(nll: float, match: float, *, at: int = 60) -> list[Point]:
    """A curve over 100 steps whose best point, by both criteria, is at a step."""
    worse = [Point(step, nll + 1, match / 2, None, None) for step in (20, 100) if step != at]
    return sorted([*worse, Point(at, nll, match, None, None)])


def _finish(
    stage: Stage, curve_of: Callable[[Setting], Curve], tried: dict[Setting, Curve]
) -> list[Setting]:
    """Runs a stage to its end; the settings in order."""
    order = []
    while left := missing_runs(stage, tried):
        assert len(order) < 60, "the search does not end"
        tried[left[0]] = curve_of(left[0])
        order.append(left[0])
    return order


def test_early_stopping_takes_each_criterion_s_own_step() -> None:
    curve = [
        Point(1, 2.0, 0.1, None, None),
        Point(2, 1.0, 0.3, None, None),
        Point(3, 3.0, 0.5, None, None),
        Point(4, 2.5, 0.5, None, None),
    ]
    assert best_point(curve, "nll").step == 2
    assert best_point(curve, "exact_match").step == 4  # of equal ones the likelier


def test_a_rate_at_the_edge_of_the_grid_asks_for_the_next_one_outwards() -> None:
    tried: dict[Setting, Curve] = {
        dataclasses.replace(_L, learning_rate=rate): _curve(1.0, match)
        for rate, match in ((1e-4, 0.0), (3e-4, 0.2), (1e-3, 0.5))
    }
    # Equal NLL everywhere: the first one is the best by it, so both edges are extended.
    wanted = missing(list(tried), tried)
    assert [one.learning_rate for one in wanted] == [3e-5, 3e-3]
    tried |= {one: _curve(1.5, 0.1) for one in wanted}
    assert missing(list(tried), tried) == []


@pytest.mark.parametrize(("at", "lengths"), [(10, [3.0]), (60, []), (100, [30.0])])
def test_a_run_is_made_longer_or_shorter_if_its_best_step_is_last_or_first(
    at: int, lengths: list[float]
) -> None:
    tried: Mapping[Setting, Curve] = {
        dataclasses.replace(_L, learning_rate=rate): _curve(
            1.0 if rate == 3e-4 else 2.0, 0.5, at=at
        )
        for rate in (1e-4, 3e-4, 1e-3)
    }
    assert [one.epochs for one in missing([_L], tried)] == lengths


def test_the_search_ends_with_the_best_rate_enclosed_wherever_it_is() -> None:
    for best in RATES[1:-1]:

        def curve(setting: Setting, best: float = best) -> Curve:
            off = abs(RATES.index(setting.learning_rate) - RATES.index(best))
            return _curve(1.0 + off, 1.0 / (1 + off))

        tried: dict[Setting, Curve] = {}
        _finish(Stage("L", "facts", "full"), curve, tried)
        rates = [setting.learning_rate for setting in tried]
        at = RATES.index(best)
        assert {RATES[at - 1], best, RATES[at + 1]} <= set(rates)
        assert chosen(tried, "L", "facts")["exact_match"].learning_rate == best


def test_a_lever_that_wins_is_enclosed_too_and_others_are_pulled_once() -> None:
    def curve(setting: Setting) -> Curve:
        off = abs(RATES.index(setting.learning_rate) - RATES.index(3e-4))
        match = 0.4 + 0.5 * bool(setting.statement_rows) - 0.1 * off
        return _curve(2.0 - match, match)

    tried: dict[Setting, Curve] = {}
    _finish(Stage("L", "facts", "full"), curve, tried)
    order = _finish(Stage("L", "facts", "levers"), curve, tried)
    plain = chosen({one: c for one, c in tried.items() if not one.statement_rows}, "L", "facts")
    assert order[:4] == levers(plain["exact_match"])
    assert [one.learning_rate for one in order[4:]] == [1e-4, 1e-3]
    assert all(one.statement_rows == 4 for one in order[4:])
    assert chosen(tried, "L", "facts")["nll"].statement_rows == 4


def test_seeds_repeat_the_chosen_of_each_criterion_and_never_change_the_choice() -> None:
    by_nll, by_match = _L, dataclasses.replace(_L, learning_rate=1e-3)
    tried: dict[Setting, Curve] = {by_nll: _curve(1.0, 0.1), by_match: _curve(2.0, 0.6)}
    stage = Stage("L", "facts", "seeds")
    order = _finish(stage, lambda setting: _curve(0.1, 0.99), tried)
    assert order == [
        dataclasses.replace(one, seed=seed) for seed in (1, 2) for one in (by_nll, by_match)
    ]
    assert chosen(tried, "L", "facts") == {"nll": by_nll, "exact_match": by_match}


def test_an_adapter_has_no_embeddings_to_freeze() -> None:
    with pytest.raises(ValueError, match="an adapter leaves the embeddings as they are"):
        dataclasses.replace(_L, rank=16, frozen_embeddings=True)


def test_every_stage_can_be_named_from_nothing() -> None:
    for stage in STAGES:
        first = missing_runs(stage, {})
        assert bool(first) == (stage.part in ("full", "lora"))
        for setting in first:
            assert (setting.model, setting.kinds) == (stage.model, stage.kinds)
            assert bool(setting.rank) == (stage.part == "lora")
    assert criteria("docstrings") == criteria("all") == ("nll",)


def test_xl_takes_the_variants_of_l_and_brackets_their_rates() -> None:
    both = Setting("L", "both", learning_rate=3e-4, epochs=3.0)
    mixed = dataclasses.replace(both, statement_rows=4, learning_rate=1e-3)
    tried: dict[Setting, Curve] = {both: _curve(1.0, 0.1), mixed: _curve(2.0, 0.9)}

    def curve_of(setting: Setting) -> list[Point]:
        # Whatever the variant, 1e-4 is the best rate.
        return _curve(1 + abs(math.log(setting.learning_rate / 1e-4)), 0.5)

    order = _finish(Stage("XL", "both", "as L"), curve_of, tried)
    assert {(one.statement_rows, one.model) for one in order} == {(0, "XL"), (4, "XL")}
    for rows in (0, 4):
        rates = {one.learning_rate for one in order if one.statement_rows == rows}
        assert {3e-5, 1e-4, 3e-4} <= rates
    assert chosen(tried, "XL", "both")["nll"].learning_rate == 1e-4
    assert not missing_runs(Stage("XL", "both", "as L"), tried)


@pytest.mark.parametrize(("gained", "goes_on"), [(0.03, True), (0.01, False)])
def test_a_run_is_lengthened_again_only_where_that_has_paid(gained: float, goes_on: bool) -> None:
    start = Setting("S", "docstrings", learning_rate=1e-3, epochs=3.0)
    tried: dict[Setting, Curve] = {
        dataclasses.replace(start, learning_rate=rate, epochs=epochs): _curve(nll, 0.0, at=90)
        for rate, epochs, nll in (
            *((3e-4, 3.0, 3.5), (1e-3, 3.0, 3.0), (3e-3, 3.0, 3.5)),
            *((3e-4, 10.0, 3.5), (1e-3, 10.0, 3.0 - gained), (3e-3, 10.0, 3.5)),
        )
    }
    left = missing([start], tried)
    assert [one.epochs for one in left] == ([30.0] if goes_on else [])
