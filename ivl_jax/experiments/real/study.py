"""The experiment on a real model that was not trained here, beside its own smaller sibling.

`python -m ivl_jax.experiments real --model FOLDER`. Out: `docs/real.json` with every number, and
the section of `docs/experiments.md` that shows them. Finished stages and measurements are kept in
the work directory, so the command can be interrupted and run again.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.config import ConfigError
from ivl_jax.config.annotations import Inline
from ivl_jax.experiments.kept_results import adopt_measurements, publish, split_measured
from ivl_jax.experiments.real.exports import MEGABYTES
from ivl_jax.experiments.real.items import real_items
from ivl_jax.experiments.real.lab import RealLaboratory
from ivl_jax.experiments.real.layer_sibling import layers_problem, sibling_arch
from ivl_jax.experiments.real.measure import Measurements
from ivl_jax.experiments.real.report import RECORD, update_real_section
from ivl_jax.experiments.real.settings import ABOUT, STAGES, Budget, Stage, quick
from ivl_jax.experiments.real.subjects import SUBJECTS
from ivl_jax.model.assembly import abstract_params
from ivl_jax.weights.language_model import find_model, read_arch

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments real"
_MODEL = "SmolLM2-135M-Instruct"


@dataclasses.dataclass(frozen=True)
class Options:
    """Post-train a real model through its smaller sibling; a second run resumes."""

    model: str = ""
    """Folder of SmolLM2-135M-Instruct, or of another chat model: the target."""
    gsm8k: Path | None = None
    """Folder of GSM8K's train.jsonl and test.jsonl, from github.com/openai/grade-school-math."""
    stages: tuple[Stage, ...] = STAGES
    """What to make, in order; what a stage needs is made first. What can be measured is measured
    after each of them."""
    quick: bool = False
    """Two steps of everything, to see that it works: at most 10 minutes in all. The report is
    written to the work directory."""
    budget: Inline[Budget] = dataclasses.field(default_factory=Budget)
    work_dir: Path = Path("runs/experiments_real")
    """Models, text and measured figures; each is kept under a hash of what it depends on."""
    docs: Path = Path("docs")
    """Where the report is written."""
    export: Path | None = None
    """Folder for what the trainings changed, one file per stage: what another machine needs to
    continue, or to measure."""
    export_megabytes: float = MEGABYTES
    """Of all these files together: the largest singular values are kept."""
    from_exports: Path | None = None
    """Folder of such files: these stages are restored instead of made. Everything made then is kept
    apart in the work directory."""
    report_only: bool = False
    """Only write the report on what has been measured so far."""


def description() -> str:
    """What `--help` says first: the stages, with their times."""
    width = max(map(len, ABOUT))
    stages = "\n".join(f"  {stage:{width}}  {about}" for stage, about in ABOUT.items())
    return (
        "Post-train a real model through its smaller sibling; a second run resumes.\n\n"
        "Stages, with times of two free CPU cores, SmolLM2-135M and the default budget:\n\n"
        f"{stages}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: of this process.

    Returns:
        The exit status.
    """
    return long_run_command(_PROGRAM, _run, arguments)


def _run(arguments: Sequence[str]) -> None:
    options = parse_flags(Options, arguments, prog=_PROGRAM, description=description())
    log_to_stdout(times=True)
    if options.report_only and not options.model:
        update_real_section(options.docs)  # the committed record is all there is
        return
    target = _target(options)
    budget = quick(options.budget) if options.quick else options.budget
    docs = options.work_dir / "docs" if options.quick else options.docs
    problem = layers_problem(
        budget.first_layers, budget.last_layers, layers=read_arch(target).num_hidden_layers
    )
    if problem is not None:
        raise ConfigError(f"--first-layers and --last-layers: {target}: {problem}")
    if options.gsm8k is None:
        raise ConfigError(
            "--gsm8k is missing: name the folder of GSM8K's train.jsonl and test.jsonl, "
            "grade_school_math/data of https://github.com/openai/grade-school-math"
        )
    items = real_items(options.gsm8k, budget)
    laboratory = RealLaboratory(
        options.work_dir, target, items, budget, exports=options.from_exports
    )
    folder = "measured" if options.from_exports is None else "measured_from_exports"
    measured = Measurements(laboratory, options.work_dir / folder)
    adopt_measurements(docs / RECORD, options.work_dir / folder)
    if not options.report_only:
        for stage in options.stages:
            if stage != "measure":
                laboratory.make(stage)
            if "measure" in options.stages:
                _measure(measured)
                write_report(laboratory, measured, docs)
    write_report(laboratory, measured, docs)
    if options.export is not None:
        laboratory.export(options.export, megabytes=options.export_megabytes)


def _measure(measured: Measurements) -> None:
    for subject in SUBJECTS:
        if measured.possible(subject):
            logger.info("%s: %s", subject, measured.measure(subject))


def write_report(laboratory: RealLaboratory, measured: Measurements, docs: Path) -> None:
    """Write the record of what has been measured, and the section that shows it.

    Args:
        laboratory: Has made what there is.
        measured: Has measured what there is.
        docs: Folder of the page and of the record; without a measurement the record stays.
    """
    file = docs / RECORD
    published = json.loads(file.read_text(encoding="utf-8"))["tuned"] if file.exists() else {}
    record = record_of(laboratory, measured) | {"tuned": tuned(laboratory, published)}
    publish(record, file)
    update_real_section(docs)
    logger.info("report: %s", docs / "experiments.md")


def record_of(laboratory: RealLaboratory, measured: Measurements) -> dict[str, Any]:
    """Everything that the report quotes.

    Args:
        laboratory: Has made what there is.
        measured: Has measured what there is.

    Returns:
        `settings`, the budget; `models`, layers and parameters of target and donor; `measured`,
        figures by subject; `missing`, the subjects without.
    """
    found = {subject: measured.kept(subject) for subject in SUBJECTS}
    arch, budget = read_arch(laboratory.target), laboratory.budget
    smaller = sibling_arch(arch, range(budget.first_layers + budget.last_layers))
    return {
        "settings": dataclasses.asdict(budget),
        "models": {
            name: {
                "layers": one.num_hidden_layers,
                "parameters": sum(
                    math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(one))
                ),
            }
            for name, one in (("target", arch), ("donor", smaller))
        },
        **split_measured(found),
    }


def tuned(
    laboratory: RealLaboratory, published: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Where the best step of each fine-tuning was, here or on the machine that published it.

    Args:
        laboratory: Has made what there is.
        published: What the published record says; entries of other settings are dropped.

    Returns:
        By stage: `best`, the step with the lowest NLL on held-out training questions; `steps` in
        all; that `nll`, nats per token; `sha256`, the stage's key.
    """
    found = {}
    stages: tuple[Stage, ...] = ("donor_tuned", "target_lora", "target_full")
    for stage in stages:
        file, key = laboratory.output(stage).with_name("fit.json"), laboratory.key(stage)
        if file.exists():
            curve = json.loads(file.read_text(encoding="utf-8"))["curve"]
            best = min(curve, key=lambda point: point["nll"])
            steps, nll = curve[-1]["step"], best["nll"]
            found[stage] = {"best": best["step"], "steps": steps, "nll": nll, "sha256": key}
        elif published.get(stage, {}).get("sha256") == key:
            found[stage] = published[stage]
    return found


def _target(options: Options) -> Path:
    if not options.model:
        raise ConfigError(
            f"--model is missing: name its hub id HuggingFaceTB/{_MODEL}, or, without the hub, a "
            "copy of that folder"
        )
    return find_model(options.model)
