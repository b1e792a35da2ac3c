"""Shows on the console what a vocabulary map will not transfer.

In: a `TransferReport`. Out: a table, examples, a verdict.
"""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ivl_jax.vocabulary.transfer_check import Example, Outcome, TransferReport, Verdict

_ADVICE: dict[Verdict, str] = {
    "good": "the value network speaks on nearly all of this text",
    "partial": "the value network speaks on part of this text; see the kinds below",
    "poor": "the value network hardly speaks on this text: use a base or a value network whose "
    "tokenizer splits it alike",
}


def show_transfer(report: TransferReport, console: Console) -> None:
    """Print a report.

    Args:
        report: the report.
        console: where to.
    """
    advice = _ADVICE[report.verdict]
    if not report.base_ends_paired:
        advice = (
            "none of the base's ends of text is paired, so answers cannot end where the value "
            "network ends them: build the map with --pair BASE_TOKEN=VALUE_TOKEN"
        )
    console.print(f"verdict: [bold]{report.verdict}[/bold]; {escape(advice)}", soft_wrap=True)
    table = Table("kind of token", "verdict", *("",) * 6)
    for column, name in zip(
        table.columns[2:],
        ("seen", "transfers", "weight", *(outcome.value for outcome in list(Outcome)[1:])),
        strict=True,
    ):
        column.header, column.justify = name, "right"
    for kind in report.kinds:
        failures = (f"{kind.counts[outcome]:,}" for outcome in list(Outcome)[1:])
        table.add_row(
            kind.kind,
            kind.verdict,
            f"{kind.tokens:,}",
            f"{kind.transferred:.1%}",
            f"{kind.mean_weight:.2f}",
            *failures,
        )
    console.print(table)
    for kind in report.kinds:
        for example in kind.examples:
            console.print(f"{kind.kind}: {escape(_sentence(example))}", soft_wrap=True)
    pairs = (f"{base} → {value} ({role})" for role, base, value in report.paired)
    console.print(f"special tokens paired: {escape(', '.join(pairs) or 'none')}", soft_wrap=True)
    if report.unpaired:
        console.print(
            f"special tokens not paired: {escape(', '.join(report.unpaired))}", soft_wrap=True
        )
    if report.unequal_texts:
        console.print(
            f"left out: {report.unequal_texts:,} texts that the two tokenizers do not decode to "
            "the same bytes"
        )


def _sentence(example: Example) -> str:
    taken = ", ".join(example.mapped_to)
    match example.outcome:
        case Outcome.UNMAPPED:
            why = "is not mapped"
        case Outcome.NO_START:
            why = f"takes the logit of {taken}, but there the value network begins no token"
        case _:
            why = f"takes the logit of {taken}, but there the value network has"
            why += f" {example.value_token}"
            if example.share > 0:
                why += f", which has {example.share:.0%} of the weight"
    return f"{example.token} × {example.count:,} {why}"
