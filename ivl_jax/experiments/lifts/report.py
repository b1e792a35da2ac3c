"""The section of docs/experiments.md on lifts, from docs/lifts.json.

In: the study's record. Out: Markdown, between the page's two marks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivl_jax.experiments.estimate import ABSENT, Estimate
from ivl_jax.experiments.lifts.plan import (
    ADAPTED_RATE,
    BASE_DROPOUT,
    BASE_TEMPERATURE,
    LABELS,
    LIFTS,
    TARGETS,
    Budget,
    Lift,
    Row,
    mean_nll,
)
from ivl_jax.experiments.page_sections import markdown, put_section_of, wrapped

RECORD = "lifts.json"
BEGIN = "<!-- lifts: python -m ivl_jax.experiments lifts -->"
END = "<!-- end of lifts -->"
Figures = Mapping[str, Mapping[str, Any]]


def update_page(docs: Path) -> None:
    """Put the section into `docs/experiments.md`, between its marks or at its end.

    Args:
        docs: Folder of the page and of the record; without a record nothing is written.
    """
    put_section_of(docs / RECORD, section, begin=BEGIN, end=END)


def section(record: Mapping[str, Any]) -> str:
    """The section's Markdown.

    Args:
        record: From `study.record_of`.

    Returns:
        What was tried, the choice on validation rows, the test figures, what is missing.
    """
    measured, seeds, best = record["measured"], record["seeds"], record["best"]
    parts = ["## What lifts transfer", wrapped(_introduction(seeds[0]))]
    parts.append(_validation_table(measured, seeds[0]))
    parts += [wrapped(_choice(measured, best, seeds[0])), _test_table(measured, best, seeds)]
    if missing := record["missing"]:
        names = ", ".join(f"`{name}`" for name in missing)
        resumes = "The same command resumes with them."
        parts.append(wrapped(f"Not measured yet ({len(missing)}): {names}. {resumes}"))
    return "\n\n".join(part for part in parts if part)


def _introduction(seed: int) -> str:
    budget = Budget()
    return f"""Made by `python -m ivl_jax.experiments lifts`; every number is in
[lifts.json](lifts.json). The demo's recipe (residual, L1, λ = 1, beside S), each lift on its own;
none of the settings was swept. *Base temperature*: each dialogue divides the base's logits by a
temperature, log-uniform from 1/{BASE_TEMPERATURE:g} to {BASE_TEMPERATURE:g}. *Base dropout*:
{BASE_DROPOUT:.0%} of the dialogues are learned without the base. *Early S*: S pre-trained for
{budget.early_epochs:g} passes instead of 1.5. *Continued beside L*: {budget.adapted_steps} more
steps with L as the frozen base, learning rate {ADAPTED_RATE:g}; to X it is carried as the others
are. *Calibrated*: α and a temperature T of the composed logits, by maximum likelihood on
{budget.target_rows} validation rows of the target.

NLL on the other validation rows, seed {seed}; the lowest mean of both targets is chosen."""


def _validation_table(measured: Figures, seed: int) -> str:
    rows = []
    for lift in LIFTS:
        found = [measured.get(Row(lift, target, seed).name) for target in TARGETS]
        if any(found):
            cells = [f"{each['nll']:.3f}" if each else ABSENT for each in found]
            mean = mean_nll(measured, lift, seed)
            fits = [
                f"{each['strength']:.2f}, {each['temperature']:.2f}"
                for each in found
                if each and "strength" in each
            ]
            rows.append(
                [LABELS[lift], *cells, ABSENT if mean is None else f"{mean:.3f}", "; ".join(fits)]
            )
    return markdown(["value network", *TARGETS, "mean", "α, T"], rows)


def _choice(measured: Figures, best: Lift | None, seed: int) -> str:
    if best is None:
        return ""
    if best == "plain":
        return "No lift is better than the demo's recipe, which stays."
    plain, chosen = (mean_nll(measured, lift, seed) for lift in ("plain", best))
    assert plain is not None, "a lift is chosen once all are measured"
    assert chosen is not None, "likewise"
    return f"""Chosen: {LABELS[best]}, {plain - chosen:.3f} nats below the demo's recipe. On the
test items, mean ± half of the 95 % t interval over seeds; *facts*: share answered word for word."""


def _test_table(measured: Figures, best: Lift | None, seeds: list[int]) -> str:
    forms = {"nll": "{:.3f}", "exact_match": "{:.1%}"}
    rows = []
    for lift in dict.fromkeys(("plain", best or "plain")):
        cells = []
        for target in TARGETS:
            found = [measured.get(Row(lift, target, seed, "test").name, {}) for seed in seeds]
            for key, form in forms.items():
                values = tuple(each[key] for each in found if key in each)
                cells.append(Estimate(values).show(form))
        if set(cells) != {ABSENT}:
            rows.append([LABELS[lift], *cells])
    heads = [f"{what} on {target}" for target in TARGETS for what in ("NLL", "facts")]
    return markdown(["value network", *heads], rows) if rows else ""
