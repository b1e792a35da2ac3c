"""Fills docs/performance.md with the measured figures: `python -m benchmarks.page`.

In: the JSON files of benchmarks/results. Out: the page's tables, between its two marks, and
docs/performance.png: tokens a second against the batch, ours, the peers and the memory's limit.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.discovery import find_benchmarks
from benchmarks.setting import PROJECT_ROOT

RESULTS = PROJECT_ROOT / "benchmarks" / "results"
PAGE = PROJECT_ROOT / "docs" / "performance.md"
PLOT = PROJECT_ROOT / "docs" / "performance.png"
BEGIN, END = "<!-- results: python -m benchmarks.page -->", "<!-- end of results -->"
_LIMIT = "limit of memory"
_STYLES = {
    _LIMIT: {"color": "#b8bec7", "linestyle": "--"},
    "ivl_jax": {"color": "#2f6fde", "marker": "o", "linewidth": 2.4},
    "torch_cached bf16": {"color": "#e0a33a", "marker": "o"},
    "torch_cached f32": {"color": "#20242b", "marker": "o"},
    "torch_proxy f32": {"color": "#9a5fc4", "marker": "o"},
    "torch_nocache f32": {"color": "#c4485f", "marker": "o"},
}


def main() -> None:
    """Write tables and plot from the latest results."""
    records = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name in find_benchmarks()
        if (file := RESULTS / f"{name}.json").exists()
    }
    # The longest table is the last one.
    by_length = sorted(records, key=lambda name: len(records[name]["rows"]))
    sections = [section(name, records[name]) for name in by_length]
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), sections), encoding="utf-8")
    rows = [row for name in ("decode", "batch") for row in records.get(name, {"rows": []})["rows"]]
    draw(curves(rows), PLOT)


def replaced(page: str, sections: Iterable[str]) -> str:
    """The page with new tables between its marks.

    Raises:
        ValueError: a mark is missing.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"{PAGE}: expected the marks {BEGIN!r} and {END!r}")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return "\n\n".join([before + BEGIN, *sections, END]) + after


def section(name: str, record: Mapping[str, Any]) -> str:
    """One benchmark's command, setting and rows in markdown.

    Args:
        name: of the benchmark.
        record: what its `--json` file holds.

    Returns:
        The section.
    """
    setting = record["setting"]
    shapes = ", ".join(f"{what} {size}" for what, size in setting["shapes"][name].items())
    dtype, about = setting["dtype"][name], find_benchmarks()[name].about
    load = f"load {setting['load_average']} on {setting['threads']} cores as it began"
    command = f"python -m benchmarks {name}{' --quick' if setting['quick'] else ''}"
    lines = [
        f"### {name}",
        "",
        f"`{command}`: {about}. {dtype}; {shapes}; {load}.",
        "",
        "| what | median ± half the spread | beside | ratio | of the limit | target | met |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        spread = f" ± {row['spread'] / 2:.2g}" if row["spread"] else ""
        peer = f"{row['peer']}: {row['peer_median']:.4g}" if row["peer"] else ""
        cells = [
            row["name"],
            f"{row['median']:.4g}{spread} {row['unit']}",
            peer,
            "" if row["ratio"] is None else f"{row['ratio']:.2f} ×",
            "" if row["fraction_of_limit"] is None else f"{row['fraction_of_limit']:.2f}",
            (row["target"] or "").replace("fraction_of_limit", "of limit"),
            {True: "yes", False: "**no**", None: ""}[row["met"]],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for part, reason in record.get("skipped", {}).items():
        lines += ["", f"Skipped: {part}: {reason}."]
    return "\n".join(lines)


def curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Pair A's tokens a second.

    Args:
        rows: of the JSON files of `decode` and `batch`.

    Returns:
        Decoder, or the limit → batch → tokens a second.
    """
    wanted = re.compile(r"(?:pair A|batch (\d+)): (composed decoding|beside what memory)")
    found: dict[str, dict[int, float]] = {name: {} for name in _STYLES}
    for row in rows:
        at = wanted.match(row["name"])
        if at is None:
            continue
        batch = int(at[1] or 1)
        found["ivl_jax"][batch] = row["median"]
        if row["peer"]:
            found[row["peer"]][batch] = row["peer_median"]
        if row["limit"]:
            found[_LIMIT][batch] = row["limit"]
    return {name: dict(sorted(points.items())) for name, points in found.items() if points}


def draw(points: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Draw the curves.

    Args:
        points: from `curves`.
        path: the PNG to write.
    """
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, line in points.items():
        axes.plot(list(line), list(line.values()), label=name, **_STYLES[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = sorted({batch for line in points.values() for batch in line})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("batch")
    axes.set_ylabel("tokens/s, all rows together")
    axes.set_title("Composed decoding, 134 M base + 24 M value network", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
