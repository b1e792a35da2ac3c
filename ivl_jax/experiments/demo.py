"""The quickstart: `make demo`, or `python -m ivl_jax.experiments.demo`.

In: the embedded family, demonstrations built on the user's machine. A value network is trained with
the small base S, then added to two bases that were not used in its training: the larger L, and,
through a vocabulary map, X, which has another tokenizer. Out: a table, a plot and `report.json` in
`runs/demo`.

The run is built in `runs/demo.new` and moved there when it is complete; the previous result
is kept as `runs/demo.previous`.
"""

import dataclasses
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ivl_jax.assets import config_file, family_folder
from ivl_jax.checkpoint import ValueNetwork, load_value
from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.config import ConfigError, TrainConfig, config_to_toml, load_config
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.experiments.demo_plot import plot_report
from ivl_jax.experiments.demonstrations import (
    Item,
    build_items,
    items_hash,
    select,
    write_demonstrations,
)
from ivl_jax.experiments.finetune.references import read_reference
from ivl_jax.experiments.finetune.settings import Criterion, Model
from ivl_jax.experiments.measure import (
    answers,
    exact_match,
    family_map,
    response_nll,
    running_texts,
)
from ivl_jax.json_files import write_json
from ivl_jax.paths import write_atomically
from ivl_jax.training.loop import run
from ivl_jax.weights.language_model import load_language_model

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments.demo"

TARGETS: tuple[Literal["L", "X"], ...] = ("L", "X")
FINE_TUNED: Mapping[str, Criterion] = {
    "-finetuned": "nll",
    "-finetuned-for-facts": "exact_match",
}
"""Suffix of a recorded model's name → what its setting and step were chosen by."""
_SHOWN = 4  # questions whose answers are printed
_CHOSEN_BY: Mapping[Criterion, str] = {
    "nll": "the lowest NLL",
    "exact_match": "for facts, the most facts answered with docstrings no worse than before",
}
_MAP, _REPORT, _PLOT = "X-from-S.safetensors", "report.json", "transfer.png"
_WRITTEN = {"demonstrations", "data", "training", _MAP, _REPORT, _PLOT}


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a value network on S (0.7 M parameters) and add it to L (6 M) and X (2 M)."""

    config: Path = dataclasses.field(default_factory=lambda: config_file("demo.toml"))
    """The training run's settings."""
    run_dir: Path = Path("runs/demo")
    """Where the result is written; an earlier one is kept next to it, as RUN_DIR.previous."""


def demo_config(config: TrainConfig, files: dict[str, Path], *, run_dir: Path) -> TrainConfig:
    """The config with this run's own paths."""
    family_s = str(family_folder("S"))
    return dataclasses.replace(
        config,
        run_dir=str(run_dir / "training"),
        base=dataclasses.replace(config.base, path=family_s),
        value=dataclasses.replace(config.value, path=family_s),
        data=dataclasses.replace(
            config.data,
            train=(str(files["train"]),),
            validation=(str(files["validation"]),),
            data_dir=str(run_dir / "data"),
        ),
    )


def check_folders(run_dir: Path) -> None:
    """Check that the folders a demo replaces hold only what a demo wrote.

    Raises:
        ConfigError: one of them holds something else.
    """
    for folder in (run_dir, *_beside(run_dir)):
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if strange := sorted(names - _WRITTEN):
            raise ConfigError(
                f"--run-dir {run_dir}: {folder} holds {', '.join(strange[:5])}, which no demo "
                "wrote and this one would remove: name another folder"
            )


def take_place(new: Path, run_dir: Path) -> None:
    """Move a complete run into place; the previous one is kept as RUN_DIR.previous."""
    previous = _beside(run_dir)[1]
    if run_dir.exists():
        if previous.exists():
            shutil.rmtree(previous)
        run_dir.rename(previous)
    new.rename(run_dir)


def _beside(run_dir: Path) -> tuple[Path, Path]:
    """Where a run is built, and where the one before it is kept."""
    return run_dir.with_name(f"{run_dir.name}.new"), run_dir.with_name(f"{run_dir.name}.previous")


def recorded_finetune(
    model: Model, test: list[Item], chosen_by: Criterion = "nll"
) -> dict[str, float] | None:
    """NLL and exact match of a fine-tuned target, if measured on exactly these items."""
    reference = read_reference(model, chosen_by, items_sha256=items_hash(test))
    if reference is None:
        return None
    return {figure: reference.mean(figure) for figure in ("nll", "exact_match")}


def how_chosen(models: Sequence[Model]) -> str:
    """The footnote to the recorded figures: how the fine-tuned models were chosen."""
    how = []
    for criterion, words in _CHOSEN_BY.items():
        runs = []
        for model in models:
            if (found := read_reference(model, criterion)) is not None:
                one = found.setting
                runs.append(
                    f"{model}: {one.label}, learning rate {one.learning_rate:g}, {one.epochs:g} "
                    f"epochs, batch {one.batch_size}, the best of {found.tried}"
                )
        if runs:
            how.append(f"{words} ({'; '.join(runs)})")
    return (
        "recorded: fine-tuned on the same demonstrations in earlier runs, not in this one, and "
        "measured on the same questions; means over seeds. Of all settings and steps tried, those "
        f"were taken that had on the validation split {', and '.join(how)}: "
        "python -m ivl_jax.experiments.finetune_sweep"
    )


def compare(
    value: ValueNetwork, items: list[Item], *, map_file: Path, console: Console
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Measures S, L and X, alone and with the value network.

    Args:
        value: Trained with S.
        items: All of them; the test split is measured.
        map_file: Where to write the vocabulary map between X and S, built on the train split.
        console: Shows the progress of the measurement.

    Returns:
        The report's `nll`, `exact_match` and `transfer_ratio`; each model's answers on the facts.
    """
    test = select(items, "test")
    facts = [item for item in test if item.kind == "fact"]
    report: dict[str, Any] = {"nll": {}, "exact_match": {}, "transfer_ratio": {}}
    texts = {}

    names = [f"{base_name}{kind}" for base_name in ("S", *TARGETS) for kind in ("", "+value")]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task = bar.add_task("measuring", total=len(names) * (len(test) + len(facts)))

    def measure(name: str, model: ComposedModel) -> None:
        logger.info("measuring %s (%d of %d)", name, names.index(name) + 1, len(names))
        bar.update(task, description=f"measuring {name}")
        report["nll"][name] = response_nll(model, test, advance=lambda: bar.advance(task))
        texts[name] = answers(model, facts, advance=lambda: bar.advance(task))
        report["exact_match"][name] = exact_match(texts[name], facts)

    with bar:
        for base_name in ("S", *TARGETS):
            base = load_language_model(str(family_folder(base_name)))
            map_between = family_map(base, value, running_texts(items), path=map_file)
            measure(base_name, compose(base))
            measure(f"{base_name}+value", compose(base, value, maps=[map_between]))
            if base_name in TARGETS:
                for kind, criterion in FINE_TUNED.items():
                    found = recorded_finetune(base_name, test, criterion) or {}
                    for figure in ("nll", "exact_match"):
                        report[figure][base_name + kind] = found.get(figure)
                report["transfer_ratio"][base_name] = transfer_ratio(report["nll"], base_name)
    if any(report["nll"][f"{target}-finetuned"] is not None for target in TARGETS):
        report["recorded"] = how_chosen(TARGETS)
    return report, texts


def transfer_ratio(nll: dict[str, float | None], target: str) -> float | None:
    """The share of fine-tuning's gain that the value network achieves.

    >>> round(transfer_ratio({"L": 4.0, "L+value": 3.1, "L-finetuned": 3.0}, "L"), 2)
    0.9
    """
    alone, lifted, tuned = (nll[target + kind] for kind in ("", "+value", "-finetuned"))
    if alone is None or lifted is None or tuned is None:
        return None
    return (alone - lifted) / (alone - tuned)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: of this process.

    Returns:
        The exit status.
    """
    return long_run_command(
        _PROGRAM,
        _run,
        arguments,
        when_stopped="stopped; an earlier result is untouched, the next demo starts from scratch",
    )


def _run(arguments: Sequence[str]) -> None:
    options = parse_flags(Options, arguments, prog=_PROGRAM)
    log_to_stdout()
    started = time.monotonic()
    check_folders(options.run_dir)
    new = _beside(options.run_dir)[0]
    if new.exists():  # of a demo that was stopped
        shutil.rmtree(new)

    items = build_items()
    files = write_demonstrations(new / "demonstrations", items)
    config = load_config(options.config, TrainConfig)
    result = run(demo_config(config, files, run_dir=new))
    if result.output is None:
        raise KeyboardInterrupt
    value = load_value(result.output)
    test = select(items, "test")
    console = Console()
    report, texts = compare(value, items, map_file=new / _MAP, console=console)
    report["items"] = {
        kind: sum(item.kind == kind for item in test) for kind in ("fact", "docstring")
    }
    report["seconds"] = round(time.monotonic() - started, 1)
    write_json(new / _REPORT, report, indent=2)
    plot_report(report, new / _PLOT)
    files = {split: options.run_dir / "demonstrations" / file.name for split, file in files.items()}
    there = demo_config(config, files, run_dir=options.run_dir)
    write_atomically(new / "training" / "config.toml", (config_to_toml(there) + "\n").encode())
    take_place(new, options.run_dir)
    print_report(console, report, texts, [item for item in test if item.kind == "fact"])
    console.print(f"Report, plot and value network: {options.run_dir}")


def print_report(
    console: Console, report: dict[str, Any], texts: dict[str, list[str]], facts: list[Item]
) -> None:
    """Prints some answers and the figures of every model."""
    shown = Table(title="What they answer", show_lines=True)
    for heading in ("question", "right answer", *texts):
        shown.add_column(heading, overflow="fold")
    for index in range(0, len(facts), max(1, len(facts) // _SHOWN)):
        # A base does not stop by itself; its first words are enough.
        answered = (" ".join(each[index].split())[:48] for each in texts.values())
        shown.add_row(facts[index].question, facts[index].answer, *answered)
    console.print(shown)

    counts = ", ".join(f"{count} {kind}s" for kind, count in report["items"].items())
    table = Table(title="On held-out questions: " + counts)
    table.add_column("model")
    table.add_column("NLL, nats per token", justify="right")
    table.add_column("facts answered", justify="right")
    for name, nll in report["nll"].items():
        match = report["exact_match"][name]
        recorded = name.endswith(tuple(FINE_TUNED)) and nll is not None
        table.add_row(
            f"{name} (recorded)" if recorded else name,
            "n/a" if nll is None else f"{nll:.3f}",
            "n/a" if match is None else f"{match:.1%}",
        )
    console.print(table)
    if "recorded" in report:
        console.print(report["recorded"])
    for target, ratio in report["transfer_ratio"].items():
        if ratio is None:
            console.print(
                f"Transfer ratio S → {target}: n/a. The recorded fine-tuning of {target} was "
                "measured on other items (another Python version has other docstrings). To measure "
                "it on these, which takes hours: "
                f"python -m ivl_jax.experiments.finetune_sweep --models {target}"
            )
        else:
            console.print(
                f"Transfer ratio S → {target}: {ratio:.2f} of the gain of fine-tuning {target}"
            )
    console.print(f"In {report['seconds']:.0f} s.")


if __name__ == "__main__":
    sys.exit(main())
