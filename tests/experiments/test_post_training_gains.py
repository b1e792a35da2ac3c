"""Gains of the study: over the same base's start, as a ratio of means, or not at all."""

import math
import statistics

import pytest

from ivl_jax.experiments.estimate import Estimate
from ivl_jax.experiments.post_training.gains import LEAST_GAIN, Table, by_itself, on
from ivl_jax.experiments.post_training.plan import (
    SEEDS,
    Measurement,
    alone,
    folded,
    value_on,
)

STARTS = on("L", "sft"), by_itself("L", "sft")
MODELS = on("L", "grpo"), by_itself("L", "grpo")


def table(borrowed: dict[int, float], own: dict[int, float]) -> Table:
    """L with a borrowed value starts at 35 %, L trained itself at 20 %; these are their gains."""
    figures = {}
    for seed in range(3):
        figures[value_on("L", "sft", seed).name] = {"exact_match": 0.35}
        figures[alone("L", "sft", seed).name] = {"exact_match": 0.20}
    for seed, gain in borrowed.items():
        figures[value_on("L", "grpo", seed).name] = {"exact_match": 0.35 + gain}
    for seed, gain in own.items():
        figures[alone("L", "grpo", seed).name] = {"exact_match": 0.20 + gain}
    return Table(figures, SEEDS)


def carried(borrowed: dict[int, float], own: dict[int, float]) -> Estimate:
    return table(borrowed, own).carried(*MODELS, STARTS, "exact_match")


def test_carried_is_the_gain_over_the_start_of_the_same_base_and_not_what_sft_gained() -> None:
    assert carried({0: 0.08}, {0: 0.10}).values == pytest.approx((0.8,))
    over_base = table({0: 0.08}, {0: 0.10})
    figures = {Measurement("L").name: {"exact_match": 0.0}}
    swapped = STARTS[1], STARTS[0]
    assert over_base.carried(*MODELS, swapped, "exact_match").values != pytest.approx((0.8,))
    assert Table(figures, SEEDS).carried(*MODELS, STARTS, "exact_match").values == ()


def test_the_ratio_is_of_means_with_the_spread_of_both_gains() -> None:
    found = carried({0: 0.10, 1: 0.20, 2: 0.30}, {0: 0.10, 1: 0.20, 2: 0.30})
    assert found.values == pytest.approx((1.0, 1.0, 1.0)), "both vary together"
    borrowed, own = (0.12, 0.15, 0.18), (0.20, 0.12, 0.16)
    found = carried(dict(enumerate(borrowed)), dict(enumerate(own)))
    ratio = statistics.fmean(borrowed) / statistics.fmean(own)
    assert found.mean == pytest.approx(ratio)
    residuals = [b - ratio * o for b, o in zip(borrowed, own, strict=True)]
    error = statistics.stdev(residuals) / math.sqrt(3) / statistics.fmean(own)
    assert found.half_width == pytest.approx(4.3027 * error, rel=1e-4)


def test_a_seed_with_a_small_own_gain_does_not_rule_the_ratio() -> None:
    found = carried({0: 0.10, 1: 0.10, 2: 0.10}, {0: 0.14, 1: 0.15, 2: 0.01})
    assert found.mean == pytest.approx(1.0)  # the mean of the ratios would be 3.8


def test_a_denominator_of_a_single_seed_gives_a_ratio_without_an_interval() -> None:
    found = carried({0: 0.06, 1: 0.10, 2: 0.14}, {1: 0.20})
    assert found.values == pytest.approx((0.5,))
    assert carried({0: 0.06}, {1: 0.20}).values == pytest.approx((0.3,))
    # Of two, those two seeds alone count, on both sides.
    found = carried({0: 0.06, 1: 0.10, 2: 0.90}, {0: 0.20, 1: 0.20})
    assert found.values == pytest.approx((0.3, 0.5))


def test_what_is_kept_is_a_ratio_of_means_too() -> None:
    """A mean of ratios would be ruled by the seed whose teacher gained least."""
    figures = {Measurement("L").name: {"exact_match": 0.0, "nll": 4.0}}
    for seed, teacher, student in ((0, 0.5, 0.4), (1, 0.5, 0.4), (2, 0.02, 0.2)):
        for made, gain in ((value_on("L", "grpo", seed), teacher), (folded(seed), student)):
            figures[made.name] = {"exact_match": gain, "nll": 4.0 - 2 * gain}
    for key in ("exact_match", "nll"):
        kept = Table(figures, SEEDS).kept(folded, on("L", "grpo"), "L", key)
        assert kept.mean == pytest.approx(1.0 / 1.02)
        assert kept.half_width > 0
        # One teacher, three students.
        first = Table(
            {name: one for name, one in figures.items() if name[-1] == "0" or "grpo" not in name},
            SEEDS,
        )
        assert len(first.kept(folded, on("L", "grpo"), "L", key).values) == 1


def test_the_seeds_of_the_study_are_those_that_are_read() -> None:
    figures = {value_on("S", "sft", seed).name: {"exact_match": 0.1 * seed} for seed in range(5)}
    figures |= {value_on("S", "grpo", seed).name: {"exact_match": 0.5} for seed in range(5)}
    found = Table(figures, (3, 4))
    assert found.over_seeds(on("S", "sft"), "exact_match").values == pytest.approx((0.3, 0.4))
    gain = found.gain(on("S", "grpo"), on("S", "sft"), "exact_match")
    assert gain.values == pytest.approx((0.2, 0.1))


def test_a_ratio_to_no_gain_is_left_out() -> None:
    assert carried({0: 0.10}, {0: LEAST_GAIN + 1e-6}).values
    assert carried({0: 0.10}, {0: LEAST_GAIN - 1e-6}).values == ()
    assert carried({0: 0.10}, {0: -0.3}).values == ()
    assert carried({}, {0: 0.3}).values == carried({0: 0.1}, {}).values == ()


def test_gains_are_taken_seed_by_seed() -> None:
    figures = {value_on("S", "sft", seed).name: {"exact_match": 0.1 * seed} for seed in range(3)}
    figures |= {value_on("S", "grpo", seed).name: {"exact_match": 0.3} for seed in (0, 2)}
    gain = Table(figures, SEEDS).gain(on("S", "grpo"), on("S", "sft"), "exact_match")
    assert gain.values == pytest.approx((0.3, 0.1))
    assert Estimate((0.5,)).half_width == 0


def test_no_answer_of_an_untrained_base_has_gained_over_it() -> None:
    assert Table({}, SEEDS).at(Measurement("L"), "pair_accuracy") == 0.5
    assert Table({}, SEEDS).at(Measurement("L"), "exact_match") is None
