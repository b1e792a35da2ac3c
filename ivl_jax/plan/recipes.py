"""The table of recipes: which shipped config fits which machine.

In: a TOML file that lists configs and machines. Out: rows, and a Markdown document whose table is
replaced by them.
"""

import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ivl_jax.config import ConfigError, TrainConfig
from ivl_jax.plan.machines import Machine, find_machine
from ivl_jax.plan.training import TrainingPlan

BEGIN, END = "<!-- recipes -->", "<!-- /recipes -->"
_BETWEEN = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
_HEAD = (
    "| config | flags | machine | rows × length | micro-batches | peak | of | a step at least |",
    "|---|---|---|---|---:|---:|---:|---|",
)


@dataclass(frozen=True)
class Recipe:
    """One row of the table: a config on a machine."""

    config: str
    """Path of the TOML file."""
    machine: Machine
    flags: tuple[str, ...]
    """Of train.py, beside `--config`."""


def read_recipes(file: Path) -> list[Recipe]:
    """Read the list of recipes.

    Args:
        file: a TOML file of `[[recipes]]`, each with `config`, `machines` and, for all of these
            machines, `flags`.

    Returns:
        A recipe per config and machine, in order.

    Raises:
        ConfigError: the file is not such a list, or names an unknown machine.
        OSError: it cannot be read.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8")).get("recipes")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}") from error
    found = []
    for number, table in enumerate(tables if isinstance(tables, list) else [], start=1):
        where = f"{file}: recipe {number}"
        unknown = set(table) - {"config", "machines", "flags"}
        if unknown or not isinstance(table.get("config"), str) or not table.get("machines"):
            raise ConfigError(
                f"{where}: expected config, machines and perhaps flags, found {', '.join(table)}"
            )
        for name in table["machines"]:
            machine = find_machine(name)
            found.append(Recipe(table["config"], machine, tuple(table.get("flags", ()))))
    if not found:
        raise ConfigError(f"{file}: no [[recipes]], each with config and machines")
    return found


def recipe_rows(
    recipes: Sequence[Recipe],
    read: Callable[[Sequence[str]], TrainConfig],
    plan: Callable[[TrainConfig, Machine], Sequence[TrainingPlan]],
) -> list[str]:
    """Plan every recipe.

    Args:
        recipes: from `read_recipes`.
        read: reads a config from train.py's flags.
        plan: plans a config on a machine: `plan_training`.

    Returns:
        A row of the Markdown table per recipe; with several bases, of the one that takes most.

    Raises:
        ConfigError: a config is not valid, or does not divide over its machine; names the recipe.
    """
    rows = []
    for recipe in recipes:
        try:
            config = read(["--config", recipe.config, *recipe.flags])
            most = max(plan(config, recipe.machine), key=lambda each: each.peak)
        except ConfigError as error:
            raise ConfigError(f"{recipe.config} on {recipe.machine.name}: {error}") from error
        rows.append(_row(recipe, config, most))
    return rows


def write_table(document: Path, rows: Sequence[str]) -> None:
    """Replace the table of a document.

    Args:
        document: a Markdown file with the two marks `BEGIN` and `END`.
        rows: from `recipe_rows`.

    Raises:
        ConfigError: it lacks the marks.
        OSError: it cannot be read or written.
    """
    text = document.read_text(encoding="utf-8")
    if not _BETWEEN.search(text):
        raise ConfigError(f"{document}: no place for the table, between {BEGIN} and {END}")
    table = "\n".join([BEGIN, "", *_HEAD, *rows, "", END])
    document.write_text(_BETWEEN.sub(lambda _: table, text, count=1), encoding="utf-8")


def _row(recipe: Recipe, config: TrainConfig, plan: TrainingPlan) -> str:
    limit = max(plan.limits, key=lambda name: plan.limits[name])
    flags = " ".join(recipe.flags)
    cells = (
        f"`{recipe.config}`",
        f"`{flags}`" if flags else "",
        recipe.machine.name,
        f"{config.step.batch_size} × {config.data.max_length:,}",
        str(config.step.micro_batches),
        f"{plan.peak / 1e9:.1f} GB" + ("" if plan.fits else ", **does not fit**"),
        f"{plan.available / 1e9:.1f} GB",
        f"{plan.seconds:.2g} s ({limit})",
    )
    return f"| {' | '.join(cells)} |"
