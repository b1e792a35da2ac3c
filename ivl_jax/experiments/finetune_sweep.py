"""References nobody can doubt: `python -m ivl_jax.experiments.finetune_sweep`.

In: the family and the demo's demonstrations. Every model is fine-tuned over learning rate × length,
fully and with an adapter, on facts, docstrings or both; the grid grows until its best setting is
enclosed (`finetune.plan`). Each run stops early twice, by validation NLL and by exact match. Out:
`docs/finetune_sweep.json`: every run with its validation curve, and the test figures of the chosen
ones. Finished runs are kept in the work directory under a hash of their effective config, so the
command can be killed and run again; those of the published record are adopted by the same hash, so
that another machine goes on from it. What is adopted has figures and no model: a run whose model
has to be tested is made again.
"""

import dataclasses
import json
import logging
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ivl_jax.assets import config_file, family_folder
from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.compilation_cache import use_compilation_cache
from ivl_jax.config import TrainConfig, load_config
from ivl_jax.decoding.compose import compose
from ivl_jax.experiments.demonstrations import Item, build_items, items_hash, select
from ivl_jax.experiments.family.continued import continue_pretraining, new_items
from ivl_jax.experiments.finetune.plan import SEEDS, STAGES, Stage, chosen, missing_runs
from ivl_jax.experiments.finetune.run import fine_tune, items_of, run_config, run_key
from ivl_jax.experiments.finetune.settings import (
    Criterion,
    Curve,
    Kinds,
    Model,
    Point,
    Setting,
    best_point,
    criteria,
)
from ivl_jax.experiments.measure import answers, exact_match, response_nll
from ivl_jax.json_files import write_json
from ivl_jax.weights.language_model import load_language_model

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments.finetune_sweep"
RECORD = "finetune_sweep.json"
_ANSWER_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tune every reference until the best settings are enclosed; a second run resumes."""

    models: tuple[Model, ...] = ("L", "S", "X", "L-continued")
    """Which models."""
    config: Path = dataclasses.field(default_factory=lambda: config_file("demo.toml"))
    """What else there is to set: the demo's own settings."""
    work_dir: Path = Path("runs/finetune_sweep")
    """Where the runs go."""
    docs: Path = Path("docs")
    """Where the record is written."""
    report_only: bool = False
    """Only write the record of what has been run so far."""


def record_file(model: str) -> Path:
    """Where the figures of a fully fine-tuned target are recorded."""
    return family_folder("L").parent / f"finetuned_{model}.json"


class Sweep:
    """Runs and measures settings, each once."""

    def __init__(self, work_dir: Path, config: TrainConfig, items: list[Item]) -> None:
        """Read what has been finished in the work directory.

        Args:
            work_dir: For all results.
            config: The demo's.
            items: From `build_items`.
        """
        self._work_dir = work_dir
        self._config = config
        self._items = items
        self._records: dict[Setting, dict[str, Any]] = {}
        for file in sorted((work_dir / "runs").glob("*/record.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            # A run on other items is left where it is: this Python has other docstrings.
            setting = Setting(**record["setting"])
            if record["items_sha256"] == items_hash(items_of(items, setting)):
                self._records[setting] = record

    def adopt(self, published: Path, model: Model) -> None:
        """Take over the runs of a published record, but those of other settings or demonstrations.

        Args:
            published: The record's file; a missing one has no runs.
            model: Whose runs.
        """
        if not published.exists():
            return
        found = json.loads(published.read_text(encoding="utf-8"))
        for record in found["runs"]:
            setting = Setting(**record["setting"])
            if setting.model != model or setting in self._records:
                continue
            _, key = self._planned(setting)
            if record["key"] == key:
                run_dir = self._work_dir / "runs" / key
                run_dir.mkdir(parents=True, exist_ok=True)
                write_json(run_dir / "record.json", record, indent=2)
                self._records[setting] = record
        if found["test_items_sha256"] != items_hash(select(self._items, "test")):
            return
        for one in found["chosen"]:
            for test in one["test"]:
                figures = {name: value for name, value in test.items() if name != "seed"}
                setting = dataclasses.replace(Setting(**one["setting"]), seed=test["seed"])
                file = self._test_file(setting, one["criterion"])
                if file is not None and not file.exists():
                    write_json(file, figures, indent=2)

    @property
    def tried(self) -> dict[Setting, Curve]:
        """Every finished run with its validation curve."""
        return {
            setting: [Point(**point) for point in record["curve"]]
            for setting, record in self._records.items()
        }

    def run(self, setting: Setting) -> None:
        """Fine-tune with a setting and keep its record.

        Args:
            setting: One that has not been tried.
        """
        config, key = self._planned(setting)
        run_dir = self._work_dir / "runs" / key
        logger.info("run %s: %s", key, setting)
        fit = fine_tune(
            config,
            setting,
            self._items,
            run_dir=run_dir,
            data_dir=self._work_dir / "data",
            on_point=lambda point: logger.info("%s %s", key, point),
        )
        record = {
            "key": key,
            "setting": dataclasses.asdict(setting),
            "items_sha256": items_hash(items_of(self._items, setting)),
            "curve": [point._asdict() for point in fit.curve],
            "train_loss": fit.train_loss,
            "seconds": round(fit.seconds, 1),
            "python": platform.python_version(),
            "jax": jax.__version__,
        }
        write_json(run_dir / "record.json", record, indent=2)
        self._records[setting] = record

    def test(self, setting: Setting, criterion: Criterion) -> dict[str, Any]:
        """Measure the model of an early-stopped run on the test split, unless already done.

        Args:
            setting: A finished run.
            criterion: What its step was chosen by.

        Returns:
            `nll`, `fact_nll` and `docstring_nll` over all test items, `exact_match` on facts, and
            of L-continued `new_exact_match`, on people that no demonstration is about.
        """
        if kept := self._tested(setting, criterion):
            return kept
        file = self._test_file(setting, criterion)
        assert file is not None, "it has been tried"
        folder = file.parent / f"best_{criterion}"
        if not folder.exists():  # of an adopted run, only the figures are here
            self.run(setting)
        model = compose(load_language_model(str(folder)))
        test = select(self._items, "test")
        by_kind = {kind: [item for item in test if item.kind == kind] for kind in _KINDS}
        figures: dict[str, Any] = {"nll": response_nll(model, test)}
        for kind, some in by_kind.items():
            figures[f"{kind}_nll"] = response_nll(model, some)
        asked = {"exact_match": by_kind["fact"]}
        if setting.model == "L-continued":
            asked["new_exact_match"] = new_items()
        for name, facts in asked.items():
            texts = answers(model, facts, max_new_tokens=_ANSWER_TOKENS)
            figures[name] = exact_match(texts, facts)
        write_json(file, figures, indent=2)
        return figures

    def record(self) -> dict[str, Any]:
        """Everything that is known by now: all runs, and for each study the chosen ones."""
        tried = self.tried
        studies: dict[tuple[Model, Kinds], None] = {}
        for stage in STAGES:
            studies[stage.model, stage.kinds] = None
        found = []
        for model, kinds in studies:
            for criterion, setting in chosen(tried, model, kinds).items():
                seeds = [dataclasses.replace(setting, seed=seed) for seed in SEEDS]
                found.append(
                    {
                        "model": model,
                        "kinds": kinds,
                        "criterion": criterion,
                        "setting": dataclasses.asdict(setting),
                        "step": best_point(tried[setting], criterion).step,
                        "finished": not any(
                            missing_runs(stage, tried)
                            for stage in STAGES
                            if (stage.model, stage.kinds) == (model, kinds)
                        ),
                        "test": [
                            self._tested(one, criterion) | {"seed": one.seed}
                            for one in seeds
                            if one in tried and self._tested(one, criterion)
                        ],
                    }
                )
        test = items_hash(select(self._items, "test"))
        runs = [self._records[setting] for setting in sorted(tried, key=str)]
        return {"command": _PROGRAM, "test_items_sha256": test, "chosen": found, "runs": runs}

    def reference(self, model: Model) -> dict[str, Any] | None:
        """The figures that the demo shows for a fine-tuned target.

        Args:
            model: The target.

        Returns:
            Of the run with the lowest validation NLL on both kinds of demonstrations, with what
            was tried; None before that search has finished.
        """
        tried = self.tried
        best = chosen(tried, model, "both").get("nll")
        stages = [stage for stage in STAGES if (stage.model, stage.kinds) == (model, "both")]
        if best is None or any(missing_runs(stage, tried) for stage in stages):
            return None
        figures = self.test(best, "nll")
        alike = {one: curve for one, curve in tried.items() if one.model == model}
        return {
            "model": model,
            "nll": figures["nll"],
            "exact_match": figures["exact_match"],
            "test_items_sha256": items_hash(select(self._items, "test")),
            **{name: getattr(best, name) for name in ("learning_rate", "epochs", "batch_size")},
            "tried": [
                dataclasses.asdict(one)
                | {
                    "validation_nll": best_point(curve, "nll").nll,
                    "validation_exact_match": best_point(curve, "nll").exact_match,
                }
                for one, curve in alike.items()
                if one.kinds == "both"
            ],
            "command": f"{_PROGRAM} --models {model}",
            "python": platform.python_version(),
            "jax": jax.__version__,
        }

    def seconds_per_epoch(self, setting: Setting) -> float | None:
        """Mean over the finished runs of the same model and demonstrations; None without one."""
        alike = [
            (record["seconds"], one.epochs)
            for one, record in self._records.items()
            if (one.model, one.kinds) == (setting.model, setting.kinds)
        ]
        return sum(s for s, _ in alike) / sum(e for _, e in alike) if alike else None

    def estimate(self) -> str:
        """How long the runs take that can be named by now; a best at an edge asks for more."""
        tried = self.tried
        left = {setting: None for stage in STAGES for setting in missing_runs(stage, tried)}
        paces = {setting: self.seconds_per_epoch(setting) for setting in left}
        known = [pace * setting.epochs for setting, pace in paces.items() if pace is not None]
        unknown = len(left) - len(known)
        return f"in all {len(left)} that can be named by now, about {sum(known) / 60:.0f} min" + (
            f" and {unknown} of unknown length" if unknown else ""
        )

    def _planned(self, setting: Setting) -> tuple[TrainConfig, str]:
        """The config of a setting's run, and its key."""
        folder = self._folder(setting.model)
        config = run_config(self._config, setting, model=folder)
        return config, run_key(config, setting, self._items, model=folder)

    def _test_file(self, setting: Setting, criterion: Criterion) -> Path | None:
        """Where the test figures of a finished run are, or will be; None: it has not been tried."""
        record = self._records.get(setting)
        name = f"test_{criterion}.json"
        return self._work_dir / "runs" / record["key"] / name if record is not None else None

    def _tested(self, setting: Setting, criterion: Criterion) -> dict[str, Any]:
        file = self._test_file(setting, criterion)
        if file is None or not file.exists():
            return {}
        return json.loads(file.read_text(encoding="utf-8"))

    def _folder(self, model: Model) -> Path:
        if model == "L-continued":
            return continue_pretraining("L", work_dir=self._work_dir / "continued")
        if model == "real":
            raise ValueError("the sweep fine-tunes the embedded family; expected one of its models")
        return family_folder(model)


_KINDS = ("fact", "docstring")


def run_stage(sweep: Sweep, stage: Stage, *, docs: Path) -> None:
    """Run what a stage misses until nothing is missing, and test what it chose.

    Args:
        sweep: Keeps the records.
        stage: Of `STAGES`.
        docs: Where the record is written after every run.
    """
    while left := missing_runs(stage, sweep.tried):
        logger.info("%s %s %s: %d runs to make; %s", *stage, len(left), sweep.estimate())
        sweep.run(left[0])
        write_json(docs / RECORD, sweep.record(), indent=1)
    tried = sweep.tried
    best = chosen(tried, stage.model, stage.kinds)
    for criterion in criteria(stage.kinds):
        if (setting := best.get(criterion)) is None:
            continue
        for seed in SEEDS:
            one = dataclasses.replace(setting, seed=seed)
            if one in tried:
                logger.info("%s by %s: %s", one, criterion, sweep.test(one, criterion))
    write_json(docs / RECORD, sweep.record(), indent=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: of this process.

    Returns:
        The exit status.
    """
    return long_run_command(_PROGRAM, _run, arguments)


def _run(arguments: Sequence[str]) -> None:
    options = parse_flags(Options, arguments, prog=_PROGRAM)
    log_to_stdout(times=True)
    config = load_config(options.config, TrainConfig)
    use_compilation_cache(config.runtime.compilation_cache)
    sweep = Sweep(options.work_dir, config, build_items())
    options.docs.mkdir(parents=True, exist_ok=True)
    if options.report_only:
        write_json(options.docs / RECORD, sweep.record(), indent=1)
        return
    for model in options.models:
        sweep.adopt(options.docs / RECORD, model)
    for stage in STAGES:
        if stage.model in options.models:
            run_stage(sweep, stage, docs=options.docs)
    for model in options.models:
        if model != "L-continued" and (record := sweep.reference(model)) is not None:
            write_json(record_file(model), record, indent=2)


if __name__ == "__main__":
    sys.exit(main())
