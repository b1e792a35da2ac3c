"""The section of docs/experiments.md on a real model, from docs/real.json.

In: the study's record: settings, figures by subject, what is missing. Out: Markdown, between the
page's two marks. Only what has been measured is shown.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivl_jax.experiments.estimate import ABSENT
from ivl_jax.experiments.page_sections import markdown, put_section_of, wrapped
from ivl_jax.experiments.real.items import KINDS
from ivl_jax.experiments.real.subjects import SUBJECTS, Subject

RECORD = "real.json"
BEGIN = "<!-- a real model: python -m ivl_jax.experiments real -->"
END = "<!-- end of a real model -->"
_KIND_NAMES = {"gsm8k": "GSM8K", "docstring": "docstrings"}
_TUNED: tuple[Subject, ...] = ("target_lora", "target_full")
_NAMES: dict[str, str] = {
    "donor_tuned": "the donor",
    "target_lora": "the target by LoRA",
    "target_full": "the target fully",
}


def update_real_section(docs: Path) -> None:
    """Put the section into `docs/experiments.md`, between its marks or at its end.

    Args:
        docs: Folder of the page and of the record; without a record nothing is written.
    """
    put_section_of(docs / RECORD, real_section, begin=BEGIN, end=END)


def real_section(record: Mapping[str, Any]) -> str:
    """The section's Markdown.

    Args:
        record: From `study.record_of`, with `study.tuned`.

    Returns:
        Settings, the table of what has been measured, fine-tunings, what is missing.
    """
    parts = [_introduction(record), _table(record), _tunings(record), _missing(record)]
    return "## A real model\n\n" + "\n\n".join(part for part in parts if part)


def best_tuned(record: Mapping[str, Any]) -> Subject | None:
    """The measured fine-tuned target with the lowest NLL on held-out training questions.

    Args:
        record: Of the study.

    Returns:
        Its subject; None without one, or where the held-out NLL of one is not known.
    """
    tuned = record["tuned"]
    found: list[Subject] = [one for one in _TUNED if one in record["measured"]]
    if any(one not in tuned for one in found):
        return None
    return min(found, key=lambda one: tuned[one]["nll"], default=None)


def recovered(record: Mapping[str, Any], subject: Subject, kind: str) -> float | None:
    """The share of the gain in NLL of `best_tuned` that a subject has.

    Args:
        record: Of the study.
        subject: A composition with the target as its base.
        kind: Of the questions.

    Returns:
        (NLL of the target − that of the subject) / (NLL of the target − that of the tuned one);
        None where one of them has not been measured, or tuning has gained nothing.
    """
    measured, best = record["measured"], best_tuned(record)
    of_subject = measured.get(subject, {"nll": {}})["nll"].get(kind)
    if best is None or "target" not in measured or of_subject is None:
        return None
    alone = measured["target"]["nll"][kind]
    gained = alone - measured[best]["nll"][kind]
    return (alone - of_subject) / gained if gained > 0 else None


def _introduction(record: Mapping[str, Any]) -> str:
    settings, models = record["settings"], record["models"]
    target, donor = models["target"], models["donor"]
    kinds = " and ".join(
        f"{number} {name}"
        for name, number in (
            ("questions of GSM8K", settings["gsm8k_questions"]),
            ("on docstrings", settings["docstring_questions"]),
        )
    )
    steps = settings["rows"] * settings["length"]
    text = f"""Made by `python -m ivl_jax.experiments real`; every number is in
[{RECORD}]({RECORD}). `--export FOLDER` writes what the trainings changed in files of at most 20 MB
in all, and `--from-exports FOLDER` restores the models from them elsewhere.

The target is a published chat model that was not trained here, SmolLM2-135M-Instruct unless
`--model` names another ({_millions(target)}, {target["layers"]} layers). The *donor* is its own
sibling: its first {settings["first_layers"]} and last
{settings["last_layers"]} layers ({_millions(donor)} with the embeddings), healed by distillation
({settings["healing_tokens"] // steps} steps of {settings["rows"]} rows of {settings["length"]}
tokens, forward KL on every token, learning rate {settings["healing_rate"]:g}) on
{settings["dialogues"]} dialogues that the target wrote itself at temperature
{settings["temperature"]:g}; in half of them it also invented the question. The value network
begins as the donor and is trained beside it on {kinds} ({settings["value_tokens"] // steps} steps,
learning rate {settings["value_rate"]:g}, L1 penalty {settings["penalty"]:g}); it never sees the
target. Fine-tuning reads the same demonstrations ({settings["tuning_tokens"] // steps} steps,
learning rate {settings["tuning_rate"]:g}; LoRA of rank {settings["rank"]}
{settings["lora_rate"]:g}), and keeps the step that is best on held-out training questions. No rate
was swept.

*NLL*: nats per token of the right answers to test questions, their ends included. *Recovered*:
share of a fine-tuned target's gain, (NLL target − NLL) / (NLL target − NLL fine-tuned); of LoRA and
full fine-tuning, the one whose NLL on held-out training questions is lower counts, for both kinds
of questions. *Right*: questions of GSM8K answered greedily with the right number, with the 95 %
Wilson interval; where intervals overlap, the difference may be noise."""
    return wrapped(text)


def _table(record: Mapping[str, Any]) -> str:
    measured = record["measured"]
    rows = []
    for subject, parts in SUBJECTS.items():
        found = measured.get(subject)
        if found is None:
            continue
        cells = [parts.name]
        for kind in KINDS:
            nll = found["nll"].get(kind)
            cells.append(ABSENT if nll is None else f"{nll:.3f}")
        for kind in KINDS:
            share = recovered(record, subject, kind) if _has_target(subject) else None
            cells.append(ABSENT if share is None else f"{share:.2f}")
        rows.append([*cells, _right(found)])
    named = [_KIND_NAMES[kind] for kind in KINDS]
    headings = [
        "model",
        *(f"NLL, {name}" for name in named),
        *(f"recovered, {name}" for name in named),
        "right, GSM8K",
    ]
    questions = next(iter(measured.values()))["questions"] if measured else {}
    asked = ", ".join(f"{questions[kind]} on {_KIND_NAMES[kind]}" for kind in questions)
    note = f"Test questions: {asked}.\n\n" if asked else ""
    return note + markdown(headings, rows) if rows else ""


def _has_target(subject: Subject) -> bool:
    return subject.startswith("target")


def _right(found: Mapping[str, Any]) -> str:
    if "right" not in found:
        return ABSENT
    low, high = found["interval"]
    return f"{found['right']} of {found['answered']} ({low:.1%} to {high:.1%})"


def _tunings(record: Mapping[str, Any]) -> str:
    if not record["tuned"]:
        return ""
    best = "; ".join(
        f"{_NAMES[stage]} at step {one['best']} of {one['steps']} ({one['nll']:.3f} nats)"
        for stage, one in record["tuned"].items()
    )
    text = f"Lowest NLL on held-out training questions of the fine-tunings: {best}."
    if (strongest := best_tuned(record)) is not None:
        text += f" *Recovered* is relative to {_NAMES[strongest]}."
    return wrapped(text)


def _missing(record: Mapping[str, Any]) -> str:
    if not record["missing"]:
        return ""
    names = "; ".join(SUBJECTS[subject].name for subject in record["missing"])
    return wrapped(f"Not measured yet: {names}. The same command resumes with them.")


def _millions(model: Mapping[str, Any]) -> str:
    return f"{model['parameters'] / 1e6:.1f} M parameters"
