"""Plan a run for a machine that is not attached: does it fit, and what takes the memory?

{program} --config configs/llama2_7b_sharegpt.toml --on v5e-8

{program} --config configs/llama2_7b_sharegpt.toml --on v5e-8 --step.micro-batches 1 --json

{program} --config configs/llama2_7b_sharegpt.toml --on h100-1 --decode --batch 8 --context 2048

{program} --on v5e-8 --decode --base BASE --value VALUE --dtype bfloat16 --int8-base

{program} recipes docs/accelerators.md

The program that train.py would run is compiled by the machine's own compiler, from the models'
config.json alone. Every flag of train.py works here too. --decode compiles those of infer.py
instead, with its flags for models and mesh; see `--decode --help`. --largest searches for the
largest batch and the longest rows that fit, with up to ten more compilations. Exit status 1 means
that the run does not fit. What a compilation found is kept on disk. `recipes` plans the shipped
configs listed in the TOML file beside a document, and writes its tables.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ivl_jax.command_line.console import log_to_stderr
from ivl_jax.command_line.guard import run_command
from ivl_jax.commands.train import read_flags

if TYPE_CHECKING:
    from ivl_jax.plan.machines import Machine

PROGRAM = "python -m ivl_jax.plan"
DOES_NOT_FIT = 1
_UNEXPECTED = 3
_DECODE = """Plan decoding on a machine that is not attached: --on MACHINE, and --json for programs.

Base, value network and dtype may come from the --config of a training run. Exit status 1 means that
it does not fit."""


def main() -> int:
    """Run the command line.

    Returns:
        The exit status: 0 if the run fits, 1 if it does not, 2 for flags that cannot be used, 3
        after an unexpected error.
    """
    return run_command(PROGRAM, _plan, unexpected_status=_UNEXPECTED)


def _plan(arguments: Sequence[str]) -> int:
    from ivl_jax.config import check_train_config

    if arguments and arguments[0] == "recipes":
        return _write_recipes(arguments[1:])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--on")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--largest", action="store_true")
    parser.add_argument("--json", action="store_true")
    chosen, rest = parser.parse_known_args(list(arguments))
    if chosen.decode:
        return _plan_decoding(chosen, rest)
    config = read_flags(rest, program=PROGRAM, description=__doc__ or "")
    machine = _find_machine(chosen.on)
    check_train_config(config)
    _begin()
    # Imported after the flags are checked, and after the environment is set, which JAX reads.
    from ivl_jax.plan.largest import find_largest
    from ivl_jax.plan.report import as_json, table
    from ivl_jax.plan.training import plan_training
    from ivl_jax.training.setup import check_names

    check_names(config)
    plans = plan_training(config, machine)
    bases = [base.path for base in config.all_bases] if config.method == "value" else [""]
    largest = find_largest(config, machine, plans) if chosen.largest else None
    if chosen.json:
        text = json.dumps(as_json(config, machine, plans, bases, largest), indent=1)
    else:
        text = "\n\n".join(
            table(config, machine, plan, base, largest)
            for plan, base in zip(plans, bases, strict=True)
        )
    sys.stdout.write(f"{text}\n")
    return 0 if all(plan.fits for plan in plans) else DOES_NOT_FIT


def _plan_decoding(chosen: argparse.Namespace, rest: Sequence[str]) -> int:
    from ivl_jax.config import ConfigError
    from ivl_jax.plan.decode_flags import check_decode_flags, read_decode_flags

    config, run = read_decode_flags(rest, program=f"{PROGRAM} --decode", description=_DECODE)
    machine = _find_machine(chosen.on)
    if chosen.largest:
        raise ConfigError("--largest cannot be combined with --decode: plan several sizes instead")
    check_decode_flags(config, run)
    _begin()
    from ivl_jax.plan.decode_report import decode_json, decode_table
    from ivl_jax.plan.decoding import plan_decoding

    plan = plan_decoding(config, machine, run=run)
    if chosen.json:
        text = json.dumps(decode_json(config, machine, plan), indent=1)
    else:
        trained = "" if run is None or config.model.value else "the value network of --config"
        text = decode_table(config, machine, plan, trained or " and ".join(config.model.values))
    sys.stdout.write(f"{text}\n")
    return 0 if plan.fits else DOES_NOT_FIT


def _write_recipes(arguments: Sequence[str]) -> int:
    from pathlib import Path

    from ivl_jax.config import ConfigError, TrainConfig, check_train_config

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError(f"name the document: {PROGRAM} recipes docs/accelerators.md")
    document = Path(arguments[0])
    _begin()
    from ivl_jax.plan.decode_flags import DecodeConfig, check_decode_flags, read_decode_flags
    from ivl_jax.plan.decoding import plan_decoding
    from ivl_jax.plan.recipes import (
        Kind,
        Row,
        decoding_rows,
        read_recipes,
        training_rows,
        write_tables,
    )
    from ivl_jax.plan.training import plan_training
    from ivl_jax.training.setup import check_names

    def read(flags: Sequence[str]) -> TrainConfig:
        config = read_flags(flags, program=PROGRAM)
        check_train_config(config)
        check_names(config)
        return config

    def read_decoding(flags: Sequence[str]) -> tuple[DecodeConfig, TrainConfig | None]:
        config, run = read_decode_flags(flags, program=PROGRAM, description=_DECODE)
        check_decode_flags(config, run)
        return config, run

    recipes = read_recipes(document.with_suffix(".toml"))
    tables: dict[Kind, list[Row]] = {
        kind: training_rows(listed, read, plan_training)
        if kind == "recipes"
        else decoding_rows(
            listed,
            read_decoding,
            lambda config, machine, run: plan_decoding(config, machine, run=run),
        )
        for kind, listed in recipes.items()
    }
    write_tables(document, tables)
    rows = [row for table in tables.values() for row in table]
    sys.stdout.write("".join(f"{row.text}\n" for row in rows))
    return 0 if all(row.fits for row in rows) else DOES_NOT_FIT


def _find_machine(name: str | None) -> "Machine":
    from ivl_jax.config import ConfigError
    from ivl_jax.plan.machines import find_machine, known_machines

    if name is None:
        raise ConfigError(f"name a machine: --on NAME, one of {known_machines()}")
    try:
        return find_machine(name)
    except ConfigError as error:
        raise ConfigError(f"--on {error}") from error


def _begin() -> None:
    """Log, and claim no accelerator of this machine: nothing runs. JAX reads this variable."""
    log_to_stderr()
    os.environ["JAX_PLATFORMS"] = "cpu"


if __name__ == "__main__":
    sys.exit(main())
