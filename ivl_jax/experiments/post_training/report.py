"""The section of docs/experiments.md on post-training, from docs/post_training.json.

In: the study's record: settings, figures by the name of their measurement, what is missing. Out:
Markdown, between the page's two marks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivl_jax.experiments.estimate import ABSENT, Estimate
from ivl_jax.experiments.family.facts import questions_about_strangers
from ivl_jax.experiments.page_sections import markdown, put_section_of, wrapped
from ivl_jax.experiments.post_training.gains import (
    LEAST_GAIN,
    Make,
    Table,
    by_itself,
    on,
    untrained,
)
from ivl_jax.experiments.post_training.plan import (
    ALONE_RATES,
    KINDS,
    Kind,
    Measurement,
    Model,
    beside,
    best_rate,
    distilled,
    folded,
    swept,
)

RECORD = "post_training.json"
BEGIN = "<!-- post-training: python -m ivl_jax.experiments post_training -->"
END = "<!-- end of post-training -->"
# Floating point: 0.16 / 0.2 may be a little less than 0.8.
_ROUNDING = 1e-9
_NAMES: dict[Kind, str] = {"sft": "SFT", "grpo": "SFT → GRPO", "dpo": "SFT → DPO"}
# What an objective is judged by.
_KEYS: dict[Kind, str] = {"grpo": "exact_match", "dpo": "pair_accuracy"}
_UNITS = {"exact_match": "facts", "pair_accuracy": "pairs"}


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
        Settings, targets, gains, one table per base, the sweep, distillation, what is missing.
    """
    table = Table(record["measured"], record["seeds"])
    return "\n\n".join(
        [
            _introduction(record),
            "### Post-training targets\n\n" + _targets(table),
            *_titled("What is carried", _gains(table)),
            *(part for base in ("S", "L", "X") for part in _titled(base, _models(table, base))),
            *_titled("Learning rates of L trained itself", _sweep(table)),
            *_titled("Distillation", _distillation(table)),
            *_missing(record),
        ]
    )


def _titled(title: str, body: str) -> list[str]:
    """A part of the section; none, if nothing of it has been measured."""
    return [f"### {title}\n\n{body}"] if body else []


def _measured(note: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A note and a table of the rows that have a figure; empty, if none has."""
    found = [row for row in rows if set(row[1:]) - {ABSENT, ""}]
    if not found:
        return ""
    return "\n\n".join([*([wrapped(note)] if note else []), markdown(headings, found)])


def _introduction(record: Mapping[str, Any]) -> str:
    settings, measured = record["settings"], record["measured"]
    sft, dpo, grpo = (settings[f"{kind} beside S"] for kind in ("sft", "dpo", "grpo"))
    tested = (x["questions"] for name, x in measured.items() if not name.endswith("validation"))
    questions = next(tested, ABSENT)
    rewards = " + ".join(f"`{name.rpartition(':')[2]}`" for name in grpo["rewards"])
    weight = dpo["sft_weight"]
    term = f", plus {weight:g} times the cross-entropy of the right answers" if weight else ""
    text = f"""Made by `python -m ivl_jax.experiments post_training`; every number is in
[post_training.json](post_training.json).

{questions} questions about people that no training item names. *SFT*: a value network beside S,
trained for {sft["epochs"]:g} epochs on a share of {settings["share"]:g} of the demonstrations,
which each seed draws anew
(learning rate {sft["learning_rate"]:g}, L1 penalty {sft["penalty"]:g}). *SFT → DPO* and *SFT →
GRPO* start from it, still beside S. DPO: {dpo["epochs"]:g} epochs of pairs on the training
questions, whose rejected answers were sampled from S with that value network on the same question;
β {dpo["beta"]:g}{term} (learning rate {dpo["learning_rate"]:g}, penalty
{dpo["penalty"]:g}). GRPO: {grpo["max_steps"]} steps of {grpo["batch_size"]} answers to the training
questions, {grpo["group_size"]} per question; reward {rewards}, weight of the KL divergence
{grpo["kl_weight"]:g} (learning rate {grpo["learning_rate"]:g}, penalty {grpo["penalty"]:g}).
*Trained itself*: the base fully fine-tuned by the same objectives, SFT first, for as long and
without a penalty; in DPO and GRPO its own SFT is the reference; learning rates from the sweep
below.

*Facts*: share of questions answered word for word, greedily. *NLL*: nats per token of the right
answers. *Pairs*: share of held-out pairs in which the right answer gained more over the base than
the wrong one (no training: 50 %); *margin*: by how much, in nats. *KL*: exact KL(model ‖ base),
nats per token of the right answers. Mean ± half of the 95 % t interval over seeds; of two seeds the
two values (of a ratio of means, what each contributes to it); a single number is one seed."""
    return "## Post-training through the composition\n\n" + wrapped(text)


def _targets(table: Table) -> str:
    rows = [_to_gain(table)]
    for base in ("S", "L"):
        gain = table.gain(on(base, "grpo"), on(base, "sft"), "exact_match")
        sure = len(gain.values) > 1 and gain.mean - gain.half_width > 0
        met = ("yes" if sure else "no") if len(gain.values) > 1 else ABSENT
        target = "interval excludes 0" if base == "S" else ""
        name = f"facts gained by GRPO over SFT, {base}{' + value' if base == 'L' else ''}"
        rows.append([name, target, _shown(gain, "{:.1%}"), met if target else ""])
    rows += [_carried_row(table, kind, 0.8) for kind in _KEYS]
    accuracy = table.over_seeds(on("S", "dpo"), "pair_accuracy")
    rows.append(_row("DPO's accuracy on held-out pairs, S", accuracy, 0.9))
    for key, name in (("nll", "NLL"), ("exact_match", "facts")):
        kept = table.kept(folded, on("L", "grpo"), "L", key)
        rows.append(_row(f"kept by folding into L, {name}", kept, 0.95))
    note = """Facts to gain: of the facts asked for, the share that S itself completes when given
the beginning of their statement, less the share that S with the SFT value network answers. A gain
is over SFT of the same base and seed. *Not resolved*: the 95 % interval (with two seeds too, though
their values are shown instead) includes the target; *without an interval*: fewer than two seeds, or
a bound."""
    shown = markdown(["what", "target", "measured", "met"], rows)
    return "\n\n".join([wrapped(note), shown, *_reference(table), *_wrong_values(table)])


def _reference(table: Table) -> list[str]:
    """How strong the trainings are that carried gains are divided by; nothing without them."""
    own = table.over_seeds(by_itself("L", "sft"), "exact_match")
    if not own.values:
        return []
    text = f"""L trained itself is not a strong reference here: after SFT it answers
{_shown(own, "{:.1%}")} of the questions, and GRPO and DPO start from there. In the sweep of
fine-tuned references ([what was tried](#what-was-tried)), which has all demonstrations, L answers
many more validation questions when statements of its pre-training text are mixed into each batch;
none of the trainings here does that. So a ratio above 1 does not say that a borrowed value network
gains more than the best training of L would, and nothing has been measured against a reference with
such batches."""
    return [wrapped(text)]


def _wrong_values(table: Table) -> list[str]:
    """What DPO's accuracy on pairs is made of; nothing, if that has not been measured."""
    keys = ("pair_share_value", "pair_accuracy_value", "pair_accuracy_person")
    found = [table.over_seeds(on("S", "dpo"), key) for key in keys]
    if not found[0].values:
        return []
    share, value, person = (_shown(each, "{:.0%}") for each in found)
    text = f"""Of S's held-out pairs, {share} have a wrong answer that names the right person and
differs in the value alone; there DPO's accuracy is {value}, and in
the others, which can be told from the question, {person}. Which value is right cannot be told from
the question: it takes the fact, which S has read, and with it the value network, which starts as S;
a gain over the base is what the value network adds."""
    return [wrapped(text)]


def _to_gain(table: Table) -> list[str]:
    known = table.at(Measurement("S"), "recall")
    start = table.over_seeds(on("S", "sft"), "exact_match")
    found = Estimate(() if known is None else tuple(known - value for value in start.values))
    shown = _shown(found, "{:.1%}")
    return ["facts to gain before GRPO, S", "≥ 20 points", shown, _met(found, 0.2)]


def _row(what: str, found: Estimate, target: float) -> list[str]:
    return [what, f"≥ {target}", _shown(found, "{:.3f}"), _met(found, target)]


def _met(found: Estimate, target: float) -> str:
    """Whether a figure reaches its target, as far as its interval tells."""
    if not found.values:
        return ABSENT
    low, high = found.mean - found.half_width, found.mean + found.half_width
    least = target - _ROUNDING
    verdict = "yes" if low >= least else "no" if high < least else "not resolved"
    return verdict if len(found.values) > 1 else f"{verdict}, without an interval"


def _carried_row(table: Table, kind: Kind, target: float) -> list[str]:
    starts = on("L", "sft"), by_itself("L", "sft")
    compared = on("L", kind), by_itself("L", kind), starts, _KEYS[kind]
    what, bound = f"{kind.upper()} carried to L", table.carried_more_than(*compared)
    if bound is None:
        return _row(what, table.carried(*compared), target)
    met = "yes, without an interval" if bound >= target else ABSENT
    return [what, f"≥ {target}", _more_than(bound), met]


def _shown(found: Estimate, form: str) -> str:
    """A figure; of two seeds both values, since an interval of 12.7 standard errors tells less."""
    if len(found.values) == 2:
        return " and ".join(map(form.format, found.values))
    return found.show(form)


def _more_than(bound: float) -> str:
    return f"> {bound:.2f}"


def _gains(table: Table) -> str:
    note = f"""*Gain over SFT*: of the same base, before and after DPO or GRPO, seed by seed; facts
for GRPO, pairs for DPO. *Borrowed*: with the value network trained beside S. *Own*: the base
trained itself. *Carried* is borrowed over own: the mean gain over the mean gain, so that no single
seed's small denominator rules it. It has no interval where fewer than two seeds have both gains:
X and the value networks beside L are trained by one seed only, and the spread of the borrowed gains
alone would take the own gain as known. The two starts differ: where training the base itself has
left less to gain, carried exceeds 1. Below an own gain of {100 * LEAST_GAIN:.0f} points, about
what two shares of so many questions differ by when nothing has changed, a ratio would be one to
noise; the mean borrowed gain over {100 * LEAST_GAIN:.0f} points is shown instead, as a bound (>).
*Gain over the base*: the same over the base as it is, SFT included, which measures mostly
SFT. *Beside L*: instead of L itself, a value network trained beside L by the same objective, from
the same start as the borrowed one."""
    rows = []
    for kind in _KEYS:
        for base in ("L", "X"):
            makes = on(base, kind), by_itself(base, kind)
            starts = on(base, "sft"), by_itself(base, "sft")
            cells = _gain_row(table, makes, starts, kind, base)
            rows.append([f"{_NAMES[kind]}, {base} ({_UNITS[_KEYS[kind]]})", *cells])

        def trained_beside(seed: int, kind: Kind = kind) -> Measurement:
            return beside(kind, seed)

        makes = on("L", kind), trained_beside
        starts = on("L", "sft"), on("L", "sft")
        cells = _gain_row(table, makes, starts, kind, "L")
        rows.append([f"{_NAMES[kind]}, beside L ({_UNITS[_KEYS[kind]]})", *cells])
    over_sft = [f"gain over SFT, {each}" for each in ("borrowed", "own")]
    over_base = [f"gain over the base, {each}" for each in ("borrowed", "own")]
    headings = ["", *over_sft, "carried", *over_base, "borrowed / own"]
    return _measured(note, headings, rows)


def _gain_row(
    table: Table,
    makes: tuple[Make, Make],
    starts: tuple[Make, Make],
    kind: Kind,
    base: Model,
) -> list[str]:
    key, origin = _KEYS[kind], untrained(base)
    cells = []
    for before in (starts, (origin, origin)):
        cells += [
            _shown(table.gain(make, start, key), "{:.1%}")
            for make, start in zip(makes, before, strict=True)
        ]
        bound = table.carried_more_than(*makes, before, key)
        ratio = _shown(table.carried(*makes, before, key), "{:.2f}")
        cells.append(ratio if bound is None else _more_than(bound))
    return cells


def _models(table: Table, base: Model) -> str:
    rows = [_figures(table, base, untrained(base))]
    for kind, name in _NAMES.items():
        rows.append(_figures(table, f"{base} + value, {name}", on(base, kind)))
    if base == "S":
        return _measured("", _HEADINGS, rows)
    for kind, name in _NAMES.items():
        rows.append(_figures(table, f"{base} trained itself, {name}", by_itself(base, kind)))
    return _measured("", _HEADINGS, rows)


def _sweep(table: Table) -> str:
    note = """On validation questions, seed 0. Chosen, for all seeds and for X: the most facts (SFT
and GRPO) or pairs (DPO), then the lower NLL. DPO and GRPO start from the chosen SFT."""
    rows = []
    for kind in KINDS:
        for measurement in swept(kind):
            assert measurement.run is not None
            figures = _figures(
                table, f"{_NAMES[kind]}, {measurement.run.rate:g}", _as_is(measurement)
            )
            rows.append(figures)
    note += "".join(_at_edge(table, kind) for kind in KINDS)
    return _measured(note, ["objective, learning rate", *_HEADINGS[1:]], rows)


def _at_edge(table: Table, kind: Kind) -> str:
    """A sentence for a best learning rate that no tried one lies beyond; else nothing."""
    tried = {}
    for measurement in swept(kind):
        assert measurement.run is not None
        assert measurement.run.rate is not None
        figures = table.all_of(measurement)
        if figures is None:
            return ""
        tried[measurement.run.rate] = figures
    best, rates = best_rate(kind, tried), sorted(ALONE_RATES[kind])
    if best not in (rates[0], rates[-1]):
        return ""
    edge, beyond = ("lowest", "lower") if best == rates[0] else ("highest", "higher")
    return (
        f" The best one for {_NAMES[kind]}, {best:g}, is the {edge} that was tried: a {beyond} one "
        "may be better, so that what the base gains by itself may be understated, and what is "
        "carried overstated."
    )


def _distillation(table: Table) -> str:
    strangers = len(questions_about_strangers())
    note = f"""No labels: the text is the teacher's own greedy answers to the training questions,
and the loss is KL(teacher ‖ student) alone. The first: a value network that starts as S and learns,
beside L, from L trained itself (SFT → GRPO). The second: L trained to predict what L with S's value
network (SFT → GRPO) predicts, which is one ordinary model; its text is the answers to the training
questions and to {strangers} questions about people whom no text names. Without these it learns the
people of the training questions by heart, and not to look up the one who is asked for: ten passes
over the training questions alone keep 0.48 of the facts (seed 0). *Kept*: share of the teacher's
gain over L, the mean over the mean."""
    rows = []
    for name, make, teacher in (
        ("L + value, from the tuned L", _distilled("L"), by_itself("L", "grpo")),
        ("L, folded from L + value", folded, on("L", "grpo")),
    ):
        kept = [
            _shown(table.kept(make, teacher, "L", key), "{:.2f}") for key in ("nll", "exact_match")
        ]
        rows.append([*_figures(table, name, make), *kept])
    rows += [
        [*_figures(table, f"{base} + value, from the tuned L", _distilled(base)), "", ""]
        for base in ("S", "X")
    ]
    return _measured(note, [*_HEADINGS, "NLL kept", "facts kept"], rows)


def _missing(record: Mapping[str, Any]) -> list[str]:
    if not record["missing"]:
        return []
    count = len(record["missing"])
    names = ", ".join(f"`{name}`" for name in record["missing"])
    return [
        wrapped(
            f"Not measured yet: left out, shown as {ABSENT}, or with fewer seeds ({count} of "
            f"{count + len(record['measured'])} measurements): {names}. The same command resumes "
            "with them."
        )
    ]


_HEADINGS = ("model", "facts", "NLL", "pairs", "margin", "KL to base")


def _figures(table: Table, name: str, make: Make) -> list[str]:
    forms = {
        "exact_match": "{:.1%}",
        "nll": "{:.3f}",
        "pair_accuracy": "{:.1%}",
        "pair_margin": "{:.1f}",
        "kl": "{:.2f}",
    }
    return [name, *(_shown(table.over_seeds(make, key), form) for key, form in forms.items())]


def _as_is(measurement: Measurement) -> Make:
    return lambda _: measurement


def _distilled(base: Model) -> Make:
    return lambda seed: distilled(base, seed)
