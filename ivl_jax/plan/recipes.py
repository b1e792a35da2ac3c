"""The tables of recipes: which shipped config trains, and which decodes, on which machine.

In: a TOML file that lists configs and machines. Out: rows, and a Markdown document whose tables are
replaced by them.
"""

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ivl_jax.config import ConfigError, TrainConfig
from ivl_jax.plan.decode_flags import DecodeConfig
from ivl_jax.plan.decoding import DecodingPlan
from ivl_jax.plan.machines import Machine, find_machine
from ivl_jax.plan.training import TrainingPlan

Kind = Literal["recipes", "decoding"]
"""Which table: of train.py's program, or of infer.py's."""
_HEADS: dict[Kind, tuple[str, str]] = {
    "recipes": (
        "| config | flags | machine | rows × length | micro-batches | peak | of "
        "| a step at least |",
        "|---|---|---|---|---:|---:|---:|---|",
    ),
    "decoding": (
        "| config | flags | machine | rows × context | networks | caches "
        "| temporaries of generating | peak | of | tokens/s at most |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ),
}


@dataclass(frozen=True)
class Recipe:
    """One row of the table: a config on a machine."""

    config: str
    """Path of the TOML file."""
    machine: Machine
    flags: tuple[str, ...]
    """Beside `--config`: of train.py, or of a plan of decoding."""


class Row(NamedTuple):
    """What a plan says, as a row of a Markdown table."""

    text: str
    fits: bool


def read_recipes(file: Path) -> dict[Kind, list[Recipe]]:
    """Read the list of recipes.

    Args:
        file: a TOML file of `[[recipes]]` and `[[decoding]]`, each with `config`, `machines` and,
            for all of these machines, `flags`.

    Returns:
        For each of the two lists that is there, a recipe per config and machine, in order.

    Raises:
        ConfigError: the file is not such a list, or names an unknown machine.
        OSError: it cannot be read.
    """
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}") from error
    if unknown := set(document) - set(_HEADS):
        raise ConfigError(f"{file}: expected {' and '.join(_HEADS)}, found {', '.join(unknown)}")
    found: dict[Kind, list[Recipe]] = {
        kind: _read(document[kind], f"{file}: {kind}") for kind in _HEADS if kind in document
    }
    if not any(found.values()):
        raise ConfigError(f"{file}: no [[recipes]], each with config and machines")
    return found


def _read(tables: object, where: str) -> list[Recipe]:
    found = []
    for number, table in enumerate(tables if isinstance(tables, list) else [], start=1):
        unknown = set(table) - {"config", "machines", "flags"}
        if unknown or not isinstance(table.get("config"), str) or not table.get("machines"):
            raise ConfigError(
                f"{where} {number}: expected config, machines and perhaps flags, found "
                f"{', '.join(table)}"
            )
        for name in table["machines"]:
            try:
                machine = find_machine(str(name))
            except ConfigError as error:
                raise ConfigError(f"{where} {number}: machines: {error}") from error
            found.append(Recipe(table["config"], machine, tuple(table.get("flags", ()))))
    return found


def training_rows(
    recipes: Sequence[Recipe],
    read: Callable[[Sequence[str]], TrainConfig],
    plan: Callable[[TrainConfig, Machine], Sequence[TrainingPlan]],
) -> list[Row]:
    """Plan the training of every recipe.

    Args:
        recipes: from `read_recipes`.
        read: reads a config from train.py's flags.
        plan: plans a config on a machine: `plan_training`.

    Returns:
        A row of the Markdown table per recipe, and whether it fits; with several bases, of the one
        that takes most.

    Raises:
        ConfigError: a config is not valid, or does not divide over its machine; names the recipe.
    """

    def row(recipe: Recipe) -> Row:
        config = read(["--config", recipe.config, *recipe.flags])
        most = max(plan(config, recipe.machine), key=lambda each: each.peak)
        limit = max(most.limits, key=lambda name: most.limits[name])
        cells = (
            f"{config.step.batch_size} × {config.data.max_length:,}",
            str(config.step.micro_batches),
            *_peak(most),
            f"{most.seconds:.2g} s ({limit})",
        )
        return Row(_joined(recipe, cells), most.fits)

    return [_named(recipe, row) for recipe in recipes]


def decoding_rows(
    recipes: Sequence[Recipe],
    read: Callable[[Sequence[str]], tuple[DecodeConfig, TrainConfig | None]],
    plan: Callable[[DecodeConfig, Machine, TrainConfig | None], DecodingPlan],
) -> list[Row]:
    """Plan the decoding of every recipe.

    Args:
        recipes: from `read_recipes`.
        read: reads flags of a plan of decoding, and the run of their `--config`.
        plan: plans them on a machine: `plan_decoding`.

    Returns:
        A row of the Markdown table per recipe, and whether it fits.

    Raises:
        ConfigError: as `training_rows`.
    """

    def row(recipe: Recipe) -> Row:
        config, run = read(["--config", recipe.config, *recipe.flags])
        found = plan(config, recipe.machine, run)
        temporaries = found.chunk.temporaries
        cells = (
            f"{config.batch} × {config.context:,}",
            f"{(found.base + found.values) / 1e9:.1f} GB",
            f"{found.caches / 1e9:.2f} GB",
            "" if temporaries is None else f"{temporaries / 1e9:.2f} GB",
            *_peak(found),
            f"{found.tokens_per_second:,.0f}",
        )
        return Row(_joined(recipe, cells), found.fits)

    return [_named(recipe, row) for recipe in recipes]


def _named(recipe: Recipe, row: Callable[[Recipe], Row]) -> Row:
    try:
        return row(recipe)
    except ConfigError as error:
        raise ConfigError(f"{recipe.config} on {recipe.machine.name}: {error}") from error


def write_tables(document: Path, tables: Mapping[Kind, Sequence[Row]]) -> None:
    """Replace tables of a document, all or none.

    Args:
        document: a Markdown file in which `<!-- recipes -->` and `<!-- /recipes -->` stand around
            the first table, and `decoding` likewise.
        tables: rows from `training_rows` and `decoding_rows`.

    Raises:
        ConfigError: it lacks a pair of marks.
        OSError: it cannot be read or written.
    """
    text = document.read_text(encoding="utf-8")
    for kind, rows in tables.items():
        begin, end = f"<!-- {kind} -->", f"<!-- /{kind} -->"
        between = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not between.search(text):
            raise ConfigError(f"{document}: no place for a table, between {begin} and {end}")
        table = "\n".join([begin, "", *_HEADS[kind], *(row.text for row in rows), "", end])
        text = between.sub(lambda _, table=table: table, text, count=1)
    document.write_text(text, encoding="utf-8")


def _joined(recipe: Recipe, cells: Sequence[str]) -> str:
    flags = " ".join(recipe.flags)
    first = (f"`{recipe.config}`", f"`{flags}`" if flags else "", recipe.machine.name)
    return f"| {' | '.join((*first, *cells))} |"


def _peak(plan: TrainingPlan | DecodingPlan) -> tuple[str, str]:
    """The peak, and what there is."""
    misfit = "" if plan.fits else ", **does not fit**"
    return f"{plan.peak / 1e9:.1f} GB{misfit}", f"{plan.available / 1e9:.1f} GB"
