"""The study's section: targets, sentences from the record, and only the section of the page."""

import json
from pathlib import Path
from typing import Any

import pytest

from ivl_jax.experiments.post_training.plan import (
    ALONE_RATES,
    SEEDS,
    Measurement,
    alone,
    beside,
    folded,
    measurements,
    swept,
    value_on,
)
from ivl_jax.experiments.post_training.report import BEGIN, RECORD, section, update_page

SETTING = {
    "learning_rate": 0.0004,
    "batch_size": 64,
    "max_steps": 17,
    "epochs": 2.0,
    "penalty": 0.5,
    "beta": 0.25,
    "sft_weight": 0.75,
    "rewards": ["exact_match", "some.module:words_in_place"],
    "group_size": 8,
    "kl_weight": 0.001,
}
SETTINGS = {"share": 0.1, **{f"{kind} beside S": SETTING for kind in ("sft", "dpo", "grpo")}}


def figures(exact_match: float, pair_accuracy: float = 0.5, nll: float = 4.0) -> dict[str, float]:
    return {
        "exact_match": exact_match,
        "nll": nll,
        "kl": 1.0,
        "pair_accuracy": pair_accuracy,
        "pair_margin": 3.0,
        "questions": 296,
    }


FIGURES = {
    "S": figures(0.0) | {"recall": 0.44, "facts_known": 0.9},
    "L": figures(0.0, nll=4.0),
    **{value_on("S", "sft", seed).name: figures(0.1) for seed in SEEDS},
    **{value_on("S", "grpo", seed).name: figures(0.2 + seed / 100) for seed in SEEDS},
    **{value_on("L", "sft", seed).name: figures(0.36, 0.7) for seed in SEEDS},
    **{value_on("L", "grpo", seed).name: figures(0.72, nll=2.0) for seed in SEEDS},
    alone("L", "sft", 0).name: figures(0.2, 0.75),
    alone("L", "grpo", 0).name: figures(0.6),
    **{value_on("L", "dpo", seed).name: figures(0.5, 0.86) for seed in range(2)},
    alone("L", "dpo", 0).name: figures(0.6, 0.95),
    value_on("S", "dpo", 0).name: figures(0.3, 0.88),
    folded(0).name: figures(0.684, nll=2.1),
    beside("grpo", 0).name: figures(0.81),
}


def record(measured: dict[str, Any] | None = None) -> dict[str, Any]:
    measured = FIGURES if measured is None else measured
    missing = [one.name for one in measurements() if one.name not in measured]
    return {
        "seeds": list(SEEDS),
        "settings": SETTINGS,
        "measured": measured,
        "missing": missing,
    }


def words(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


def row(text: str, what: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {what} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_targets_are_met_or_missed_as_measured() -> None:
    text = section(record())
    assert row(text, "facts to gain before GRPO, S")[2:] == ["34.0% ± 0.0%", "yes"]
    # 10, 11 and 12 points: t(0.975, 2) = 4.303, times 1 point over the root of 3.
    assert row(text, "facts gained by GRPO over SFT, S")[2:] == ["11.0% ± 2.5%", "yes"]
    assert row(text, "facts gained by GRPO over SFT, L + value")[1:] == ["", "36.0% ± 0.0%", ""]
    without = "yes, without an interval"
    assert row(text, "GRPO carried to L")[2:] == ["0.900", without]
    assert row(text, "DPO carried to L")[2:] == ["0.800", without]
    assert row(text, "DPO's accuracy on held-out pairs, S")[2:] == [
        "0.880",
        "no, without an interval",
    ]
    assert row(text, "kept by folding into L, NLL")[2:] == ["0.950", without]
    assert row(text, "kept by folding into L, facts")[2:] == ["0.950", without]


def test_a_target_is_met_by_the_figure_itself_and_its_certainty_is_shown() -> None:
    what = "DPO's accuracy on held-out pairs, S"

    def met(*accuracies: float) -> list[str]:
        models = (value_on("S", "dpo", seed).name for seed in SEEDS)
        measured = dict(zip(models, (figures(0.3, each) for each in accuracies), strict=False))
        return row(section(record(FIGURES | measured)), what)[2:]

    # Rounded to two digits it would be 0.90.
    assert met(0.896) == ["0.896", "no, without an interval"]
    assert met(0.95, 0.95, 0.95) == ["0.950 ± 0.000", "yes"]
    assert met(0.88, 0.92, 0.96) == ["0.920 ± 0.099", "not resolved"]
    assert met(0.84, 0.88, 0.92) == ["0.880 ± 0.099", "not resolved"]
    assert met(0.86, 0.87, 0.88) == ["0.870 ± 0.025", "no"]


def test_of_two_seeds_both_values_are_shown() -> None:
    two = {folded(0).name: figures(0.578, nll=2.1), folded(1).name: figures(0.722, nll=2.1)}
    text = section(record(FIGURES | two))
    assert row(text, "L, folded from L + value")[1] == "57.8% and 72.2%"
    assert row(text, "kept by folding into L, facts")[2:] == ["0.803 and 1.003", "not resolved"]
    assert "± half of the 95 % t interval" in words(text)


def test_how_strong_the_reference_is_stands_beside_what_is_carried() -> None:
    text = section(record())
    targets = words(text.partition("### What is carried")[0])
    assert "L trained itself is not a strong reference here: after SFT it answers 20.0%" in targets
    assert "(#what-was-tried)" in targets
    measured = {name: one for name, one in FIGURES.items() if name != alone("L", "sft", 0).name}
    assert "strong reference" not in section(record(measured))


def test_the_accuracy_on_pairs_is_told_apart_by_what_is_wrong() -> None:
    split = {"pair_share_value": 0.25, "pair_accuracy_value": 0.5, "pair_accuracy_person": 0.9}
    name = value_on("S", "dpo", 0).name
    shown = " ".join(section(record(FIGURES | {name: FIGURES[name] | split})).split())
    assert "25% have a wrong answer that names the right person" in shown
    assert "there DPO's accuracy is 50%, and in the others, which can be told from" in shown
    assert "names the right person" not in section(record())
    assert "only the base knows" not in shown, "S's value network has read the facts as S has"


def test_an_own_gain_too_small_to_divide_by_gives_a_bound() -> None:
    small = {alone("L", "grpo", 0).name: figures(0.23)}  # 3 points over its SFT
    text = section(record(FIGURES | small))
    assert row(text, "SFT → GRPO, L (facts)")[2:4] == ["3.0%", "> 7.20"]  # 36 points over 5
    assert row(text, "GRPO carried to L")[1:] == ["≥ 0.8", "> 7.20", "yes, without an interval"]
    lost = small | {value_on("L", "grpo", seed).name: figures(0.3) for seed in SEEDS}
    text = section(record(FIGURES | lost))
    assert row(text, "GRPO carried to L")[1:] == ["≥ 0.8", "–", "–"]


def test_a_best_learning_rate_at_the_edge_of_its_sweep_is_pointed_out() -> None:
    rates = ALONE_RATES["grpo"]

    def swept_with(best: int) -> str:
        measured = {
            one.name: figures(0.5 if number == best else 0.4)
            for number, one in enumerate(swept("grpo"))
        }
        return words(section(record(FIGURES | measured)))

    lowest = f"The best one for SFT → GRPO, {rates[0]:g}, is the lowest that was tried: a lower one"
    highest = f"The best one for SFT → GRPO, {rates[2]:g}, is the highest that was tried: a higher"
    assert lowest in swept_with(0)
    assert "that was tried" not in swept_with(1)
    assert highest in swept_with(2)


def test_gains_are_shown_over_the_start_and_over_the_base() -> None:
    text = section(record())
    assert row(text, "SFT → GRPO, L (facts)")[1:] == [
        "36.0% ± 0.0%",
        "40.0%",
        "0.90",
        "72.0% ± 0.0%",
        "60.0%",
        "1.20",
    ]
    assert row(text, "SFT → DPO, L (pairs)")[1:4] == ["16.0% and 16.0%", "20.0%", "0.80"]
    assert row(text, "SFT → DPO, L (pairs)")[4:6] == ["36.0% and 36.0%", "45.0%"]
    assert row(text, "SFT → GRPO, beside L (facts)")[1:4] == [
        "36.0% ± 0.0%",
        "45.0%",
        "0.80",
    ]
    assert "It has no interval where fewer than two seeds have both gains" in words(text)
    assert "SFT → GRPO, X (facts)" not in text, "not measured"


def test_a_gain_whose_interval_contains_0_misses_its_target_and_one_seed_decides_nothing() -> None:
    uncertain = {value_on("S", "grpo", seed).name: figures(0.1 + 0.3 * seed) for seed in SEEDS}
    found = section(record(FIGURES | uncertain))
    assert row(found, "facts gained by GRPO over SFT, S")[3] == "no"
    one = {k: v for k, v in FIGURES.items() if not k.endswith(("seed1", "seed2"))}
    assert row(section(record(one)), "facts gained by GRPO over SFT, S")[2:] == ["10.0%", "–"]


def test_the_seeds_of_the_record_are_shown() -> None:
    measured = {value_on("S", "sft", seed).name: figures(seed / 10) for seed in (0, 3, 4)}
    text = section(record(measured) | {"seeds": [3, 4]})
    assert row(text, "S + value, SFT")[1] == "30.0% and 40.0%"


def test_sentences_quote_the_settings() -> None:
    text = words(section(record()))
    assert "reward `exact_match` + `words_in_place`" in text
    assert "plus 0.75 times the cross-entropy" in text
    assert "17 steps of 64 answers" in text
    changed = SETTING | {"rewards": ["contains"], "sft_weight": 0.0, "max_steps": 5}
    settings = {"share": 0.1, **{f"{kind} beside S": changed for kind in ("sft", "dpo", "grpo")}}
    text = words(section(record() | {"settings": settings}))
    assert "reward `contains`," in text
    assert "plus" not in text.partition("### ")[0]
    assert "5 steps of 64 answers" in text


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_missing_is_named(seed: int) -> None:
    name = value_on("X", "sft", seed).name
    text = section(record())
    assert f"`{name}`" in text
    everything = {one.name: figures(0.5) | {"recall": 1.0} for one in measurements()}
    assert "Not measured yet" not in section(record(everything))
    only = section(record({"S": FIGURES["S"]}))
    assert row(only, "facts to gain before GRPO, S")[2:] == ["–", "–"]
    titles = [line for line in only.splitlines() if line.startswith("### ")]
    assert titles == ["### Post-training targets", "### S"]


def test_the_section_of_everything_has_no_gap() -> None:
    found = {"sft": 0.2, "grpo": 0.5, "dpo": 0.4, "distil": 0.5, "fold": 0.5}
    everything = {
        one.name: figures(0.0, nll=4.0) | {"recall": 0.44}
        if one.run is None
        else figures(found[one.run.kind], found[one.run.kind] + 0.4, 2.0)
        for one in measurements()
    }
    lines = section(record(everything)).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) > 40
    assert not [line for line in rows if "–" in line]


def test_only_the_section_of_the_page_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "experiments.md"
    page.write_text("# Experiments\n\nBefore.\n", encoding="utf-8")
    update_page(tmp_path)
    assert page.read_text(encoding="utf-8") == "# Experiments\n\nBefore.\n"
    (tmp_path / RECORD).write_text(json.dumps(record()), encoding="utf-8")
    update_page(tmp_path)
    once = page.read_text(encoding="utf-8")
    assert once.startswith(f"# Experiments\n\nBefore.\n\n{BEGIN}")
    page.write_text(once + "\nAfter.\n", encoding="utf-8")
    changed = FIGURES | {Measurement("S").name: figures(0.123)}
    (tmp_path / RECORD).write_text(json.dumps(record(changed)), encoding="utf-8")
    update_page(tmp_path)
    again = page.read_text(encoding="utf-8")
    assert again.count(BEGIN) == 1
    assert "12.3%" in again
    assert again.endswith("\n\nAfter.\n")
