"""The study's section: gains are compared as said, and only the section of the page changes."""

import json
from pathlib import Path

import pytest

from ivl_jax.experiments.post_training_plan import (
    Measurement,
    alone,
    folded,
    measurements,
    value_on,
)
from ivl_jax.experiments.post_training_report import (
    BEGIN,
    RECORD,
    Estimate,
    Table,
    section,
    update_page,
)


def figures(exact_match: float, pair_accuracy: float = 0.5, nll: float = 4.0) -> dict[str, float]:
    return {
        "exact_match": exact_match,
        "nll": nll,
        "kl": 1.0,
        "pair_accuracy": pair_accuracy,
        "pair_margin": 3.0,
    }


FIGURES = {
    "L": figures(0.0, nll=4.0),
    **{value_on("S", "sft", seed).name: figures(0.1) for seed in range(3)},
    **{value_on("S", "grpo", seed).name: figures(0.4 + seed / 100) for seed in range(3)},
    **{value_on("L", "grpo", seed).name: figures(0.72, nll=2.0) for seed in range(3)},
    alone("L", "grpo", 0).name: figures(0.8),
    **{value_on("L", "dpo", seed).name: figures(0.5, 0.86) for seed in range(2)},
    alone("L", "dpo", 0).name: figures(0.6, 0.95),
    value_on("S", "dpo", 0).name: figures(0.3, 0.88),
    folded(0).name: figures(0.684, nll=2.1),
}


def row(text: str, what: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {what} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_targets_are_met_or_missed_as_measured() -> None:
    text = section(FIGURES)
    # 30, 31 and 32 points: t(0.975, 2) = 4.303, times 1 point over the root of 3.
    assert row(text, "facts gained by GRPO on S")[2:] == ["31.0% ± 2.5%", "yes"]
    assert row(text, "GRPO carried to L")[2:] == ["0.90 ± 0.00", "yes"]
    assert row(text, "DPO carried to L")[2:] == ["0.80 ± 0.00", "yes"]
    assert row(text, "DPO's accuracy on held-out pairs, S")[2:] == ["0.88", "no"]
    assert row(text, "kept by folding into L, NLL")[2:] == ["0.95", "yes"]
    assert row(text, "kept by folding into L, facts")[2:] == ["0.95", "yes"]
    assert row(text, "DPO carried to X")[2:] == ["–", ""]


def test_a_gain_whose_interval_contains_0_misses_its_target() -> None:
    uncertain = {value_on("S", "grpo", seed).name: figures(0.1 + 0.3 * seed) for seed in range(3)}
    assert row(section(FIGURES | uncertain), "facts gained by GRPO on S")[3] == "no"
    one = {k: v for k, v in FIGURES.items() if not k.endswith(("seed1", "seed2"))}
    assert row(section(one), "facts gained by GRPO on S")[3] == "no"


def test_gains_are_taken_seed_by_seed() -> None:
    table = Table(FIGURES)
    gain = table.gain(
        lambda seed: value_on("S", "grpo", seed),
        lambda seed: value_on("S", "sft", seed),
        "exact_match",
    )
    assert gain.values == pytest.approx((0.3, 0.31, 0.32))
    assert Estimate((0.5,)).half_width == 0


def test_the_section_of_everything_has_no_gap() -> None:
    everything = {
        one.name: figures(0.0 if one.run is None else 0.5, 0.9, 4.0 if one.run is None else 2.0)
        for one in measurements()
    }
    rows = [line for line in section(everything).splitlines() if line.startswith("| ")]
    assert len(rows) > 30
    assert not [line for line in rows if "–" in line]


def test_only_the_section_of_the_page_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "experiments.md"
    page.write_text("# Experiments\n\nBefore.\n", encoding="utf-8")
    update_page(tmp_path)
    assert page.read_text(encoding="utf-8") == "# Experiments\n\nBefore.\n"
    (tmp_path / RECORD).write_text(json.dumps(FIGURES), encoding="utf-8")
    update_page(tmp_path)
    once = page.read_text(encoding="utf-8")
    assert once.startswith(f"# Experiments\n\nBefore.\n\n{BEGIN}")
    page.write_text(once + "\nAfter.\n", encoding="utf-8")
    changed = FIGURES | {Measurement("S").name: figures(0.123)}
    (tmp_path / RECORD).write_text(json.dumps(changed), encoding="utf-8")
    update_page(tmp_path)
    again = page.read_text(encoding="utf-8")
    assert again.count(BEGIN) == 1
    assert "12.3%" in again
    assert again.endswith("\n\nAfter.\n")
