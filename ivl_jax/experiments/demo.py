"""The quickstart: `make demo`, or `python -m ivl_jax.experiments.demo`.

In: the embedded family, demonstrations built on the spot. A value network is trained beside the
small base S, then put on two bases that had no part in its training: the larger L, and X, which has
another tokenizer, through a vocabulary map. Out: a table, a plot and `report.json` in `runs/demo`.
"""

import dataclasses
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from ivl_jax.assets import family_folder
from ivl_jax.checkpoint import ValueNetwork, load_value
from ivl_jax.config import TrainConfig, load_config
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
from ivl_jax.experiments.finetune_sweep import record_file
from ivl_jax.experiments.measure import (
    answers,
    exact_match,
    family_map,
    response_nll,
    running_texts,
)
from ivl_jax.training.loop import run
from ivl_jax.weights.language_model import load_language_model

logger = logging.getLogger(__name__)

TARGETS: tuple[Literal["L", "X"], ...] = ("L", "X")
_SHOWN = 4  # questions whose answers are printed
_MAP, _REPORT, _PLOT = "X-from-S.safetensors", "report.json", "transfer.png"
_WRITTEN = {"demonstrations", "data", "training", _MAP, _REPORT, _PLOT}


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a value network on S (0.7 M parameters), lift L (6 M) and X (2 M) with it."""

    config: Path = Path("configs/demo.toml")
    """The training run's settings."""
    run_dir: Path = Path("runs/demo")
    """Replaced if a demo wrote it."""


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


def remove_earlier_run(run_dir: Path) -> None:
    """Removes what an earlier demo left, and nothing else.

    Raises:
        SystemExit: the folder holds something that no demo wrote.
    """
    if not run_dir.exists():
        return
    strange = sorted({path.name for path in run_dir.iterdir()} - _WRITTEN)
    if strange:
        raise SystemExit(
            f"--run-dir {run_dir} holds {', '.join(strange[:5])}, which no demo wrote and this one "
            "would remove: name another folder"
        )
    shutil.rmtree(run_dir)


def recorded_finetune(model: str, test: list[Item]) -> dict[str, float] | None:
    """NLL and exact match of a target fully fine-tuned, if measured on these very items."""
    file = record_file(model)
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["test_items_sha256"] != items_hash(test):
        return None
    return {"nll": record["nll"], "exact_match": record["exact_match"]}


def compare(
    value: ValueNetwork, items: list[Item], *, map_file: Path
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Measures S, L and X, alone and with the value network on top.

    Args:
        value: Trained beside S.
        items: All of them; what is measured is the test split.
        map_file: Where the vocabulary map between X and S, built on the train split, goes.

    Returns:
        The report's `nll`, `exact_match` and `transfer_ratio`; each model's answers on the facts.
    """
    test = select(items, "test")
    facts = [item for item in test if item.kind == "fact"]
    report: dict[str, Any] = {"nll": {}, "exact_match": {}, "transfer_ratio": {}}
    texts = {}

    def measure(name: str, model: ComposedModel) -> None:
        logger.info("measuring %s", name)
        report["nll"][name] = response_nll(model, test)
        texts[name] = answers(model, facts, max_new_tokens=24)
        report["exact_match"][name] = exact_match(texts[name], facts)

    for base_name in ("S", *TARGETS):
        base = load_language_model(str(family_folder(base_name)))
        maps: list[Path | None] = [None]
        if base_name == "X":
            family_map(base, value, running_texts(items), path=map_file)
            maps = [map_file]
        measure(base_name, compose(base))
        measure(f"{base_name}+value", compose(base, value, maps=maps))
        if base_name in TARGETS:
            recorded = recorded_finetune(base_name, test) or {"nll": None, "exact_match": None}
            for figure, number in recorded.items():
                report[figure][f"{base_name}-finetuned"] = number
            report["transfer_ratio"][base_name] = transfer_ratio(report["nll"], base_name)
    return report, texts


def transfer_ratio(nll: dict[str, float | None], target: str) -> float | None:
    """The share of full fine-tuning's gain that the value network brings.

    >>> round(transfer_ratio({"L": 4.0, "L+value": 3.1, "L-finetuned": 3.0}, "L"), 2)
    0.9
    """
    alone, lifted, tuned = (nll[target + kind] for kind in ("", "+value", "-finetuned"))
    if alone is None or lifted is None or tuned is None:
        return None
    return (alone - lifted) / (alone - tuned)


def main() -> None:
    """The command line."""
    options = tyro.cli(Options)
    console = Console()
    form = "%(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stdout, force=True)
    for chatty in ("absl", "jax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    started = time.monotonic()
    remove_earlier_run(options.run_dir)

    items = build_items()
    files = write_demonstrations(options.run_dir / "demonstrations", items)
    config = load_config(options.config, TrainConfig)
    result = run(demo_config(config, files, run_dir=options.run_dir))
    if result.output is None:
        raise SystemExit("interrupted; the next `make demo` begins anew")
    value = load_value(result.output)
    test = select(items, "test")
    report, texts = compare(value, items, map_file=options.run_dir / _MAP)
    report["items"] = {
        kind: sum(item.kind == kind for item in test) for kind in ("fact", "docstring")
    }
    report["seconds"] = round(time.monotonic() - started, 1)
    (options.run_dir / _REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    plot_report(report, options.run_dir / _PLOT)
    print_report(console, report, texts, [item for item in test if item.kind == "fact"])
    console.print(f"Report, plot and value network: {options.run_dir}")


def print_report(
    console: Console, report: dict[str, Any], texts: dict[str, list[str]], facts: list[Item]
) -> None:
    """Prints some answers, and the figures of every model."""
    shown = Table(title="What they answer", show_lines=True)
    for heading in ("question", *texts):
        shown.add_column(heading, overflow="fold")
    for index in range(0, len(facts), max(1, len(facts) // _SHOWN)):
        # A base goes on until it is stopped: its first words tell enough.
        answered = (" ".join(each[index].split())[:48] for each in texts.values())
        shown.add_row(facts[index].question, *answered)
    console.print(shown)

    counts = ", ".join(f"{count} {kind}s" for kind, count in report["items"].items())
    table = Table(title="On held-out questions: " + counts)
    table.add_column("model")
    table.add_column("response NLL (nats per token)", justify="right")
    table.add_column("exact match on facts", justify="right")
    for name, nll in report["nll"].items():
        match = report["exact_match"][name]
        table.add_row(
            name,
            "n/a" if nll is None else f"{nll:.3f}",
            "n/a" if match is None else f"{match:.1%}",
        )
    console.print(table)
    for target, ratio in report["transfer_ratio"].items():
        if ratio is None:
            console.print(
                f"Transfer ratio S → {target}: n/a. The recorded full fine-tuning of {target} was "
                "measured on other items (another Python version has other docstrings). To measure "
                "it on these, which takes up to an hour: "
                f"python -m ivl_jax.experiments.finetune_sweep --model {target}"
            )
        else:
            console.print(
                f"Transfer ratio S → {target}: {ratio:.2f} of the gain of fine-tuning {target}"
            )
    console.print(f"In {report['seconds']:.0f} s.")


if __name__ == "__main__":
    main()
