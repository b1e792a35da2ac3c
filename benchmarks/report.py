"""The common report of all benchmarks: rows with peers, limits and targets, as table and JSON.

In: figures. Out: rows; a table on the console; `rows`, `targets_met` and `setting` in the file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.timing import Figures


@dataclass(frozen=True)
class Options:
    """The command line's options for a benchmark.

    Attributes:
        quick: Smaller sizes and fewer repeats; the figures are only indicative.
    """

    quick: bool = False


class Target(NamedTuple):
    """What a figure should reach: at least the bound, or at most for a median that is a cost."""

    of: Literal["median", "ratio", "fraction_of_limit"]
    bound: float


class Peer(NamedTuple):
    """What a row is compared with, measured in the same run."""

    name: str
    median: float
    """In the row's unit."""


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        name: What was measured.
        figures: Median and spread, in `unit`.
        unit: Their unit.
        better: Whether higher or lower is better.
        peer: What it is compared with, or None.
        limit: The physical limit in `unit`, measured in the same run; None without one.
        target: What should be reached; None if the figure is only reported.

    Raises:
        ValueError: the target is a ratio without a peer, or a share of a limit without a limit.
    """

    name: str
    figures: Figures
    unit: str
    better: Literal["lower", "higher"] = "lower"
    peer: Peer | None = None
    limit: float | None = None
    target: Target | None = None

    def __post_init__(self) -> None:
        needed = {"ratio": self.peer, "fraction_of_limit": self.limit}
        if self.target is not None and needed.get(self.target.of, 0) is None:
            lacking = "peer" if self.target.of == "ratio" else "limit"
            raise ValueError(
                f"{self.name}: its target is of the {self.target.of}, but it has no {lacking}"
            )

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer; None without a peer."""
        return None if self.peer is None else self._against(self.peer.median)

    @property
    def fraction_of_limit(self) -> float | None:
        """Share of the limit that is reached; None without a limit."""
        return None if self.limit is None else self._against(self.limit)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a target."""
        if self.target is None:
            return None
        figure = self.to_json()[self.target.of]
        return figure <= self.target.bound if self._at_most else figure >= self.target.bound

    def to_json(self) -> dict[str, Any]:
        """The row's entry in the JSON file, including `met`."""
        target = self.target
        return {
            "name": self.name,
            "median": self.figures.median,
            "spread": self.figures.spread,
            "unit": self.unit,
            "better": self.better,
            "peer": self.peer and self.peer.name,
            "peer_median": self.peer and self.peer.median,
            "ratio": self.ratio,
            "limit": self.limit,
            "fraction_of_limit": self.fraction_of_limit,
            "target": target and f"{target.of} {'<=' if self._at_most else '>='} {target.bound:g}",
        }

    @property
    def _at_most(self) -> bool:
        return self.target is not None and self.target.of == "median" and self.better == "lower"

    def _against(self, other: float) -> float:
        median = self.figures.median
        return other / median if self.better == "lower" else median / other


@dataclass(frozen=True)
class Report:
    """The results of one benchmark.

    Attributes:
        rows: Its figures.
        dtype: Number format of the measured computation.
        shapes: Relevant sizes, by name.
        failed: Part that could not be measured → why.
        skipped: Part for which this machine lacks something → what, and how to get it. Unlike a
            part that failed, it does not change the command's status.
    """

    rows: Sequence[Row]
    dtype: str
    shapes: Mapping[str, Any]
    failed: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


def to_json(
    reports: Mapping[str, Report],
    *,
    failures: Mapping[str, str],
    options: Options,
    setting: Mapping[str, Any],
) -> dict[str, Any]:
    """The results of any number of benchmarks.

    Args:
        reports: by benchmark.
        failures: the error of each benchmark, or part of one, that failed.
        options: the options they were run with.
        setting: from `describe_setting`.

    Returns:
        `rows` of all of them, each with its benchmark; `targets_met`, true if all rows with a
        target reach it and no benchmark failed; `setting`, with the dtype and the shapes by
        benchmark; `failures`; `skipped`, the reason by benchmark and part.
    """
    rows = [(name, row) for name, report in reports.items() for row in report.rows]
    return {
        "rows": [{"benchmark": name, **row.to_json(), "met": row.met} for name, row in rows],
        "targets_met": not failures and all(row.met is not False for _, row in rows),
        "setting": {
            **setting,
            "quick": options.quick,
            "dtype": {name: report.dtype for name, report in reports.items()},
            "shapes": {name: dict(report.shapes) for name, report in reports.items()},
        },
        "failures": dict(failures),
        "skipped": {
            f"{name}, {part}": reason
            for name, report in reports.items()
            for part, reason in report.skipped.items()
        },
    }


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write the result of `to_json`, replacing an existing file."""
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(record, indent=2, ensure_ascii=False)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def show(name: str, report: Report, console: Console) -> None:
    """Print a benchmark's rows as a table."""
    table = Table(title=f"benchmarks {name}")
    for heading in ("what", "median", "spread", "peer", "ratio", "of limit", "target", "met"):
        words = heading in ("what", "peer")
        table.add_column(heading, justify="left" if words else "right", no_wrap=heading != "peer")
    for row in report.rows:
        fraction = row.fraction_of_limit
        table.add_row(
            escape(row.name),
            f"{row.figures.median:.4g} {row.unit}",
            f"{row.figures.spread:.2g}" if row.figures.spread else "",
            escape(f"{row.peer.name}: {row.peer.median:.4g} {row.unit}") if row.peer else "",
            "" if row.ratio is None else f"{row.ratio:.3g} ×",
            "" if fraction is None else f"{fraction:.2f}",
            row.to_json()["target"] or "",
            {None: "", True: "yes", False: "NO"}[row.met],
        )
    console.print(table)
