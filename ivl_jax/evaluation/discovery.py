"""Finds the evaluations of this package and those that a user names.

In: the files of `ivl_jax.evaluation`, or the name of a module. Out: `Evaluation`s.
"""

import ast
import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ivl_jax.config import ConfigError

_PACKAGE = "ivl_jax.evaluation"


class Evaluation(NamedTuple):
    """What `python -m ivl_jax.evaluation` needs to know about an evaluation."""

    flags: type
    """The dataclass of its flags."""
    run: Callable[[Any], Any]
    """Runs it; takes an instance of `flags`."""


def find_evaluations(folder: Path = Path(__file__).parent) -> dict[str, Evaluation]:
    """Import every evaluation in a folder, and no other module there.

    Args:
        folder: this package's.

    Returns:
        Name on the command line → evaluation, by name.
    """
    modules = [path.stem for path in sorted(folder.glob("*.py")) if _defines_evaluation(path)]
    return {
        name.replace("_", "-"): _evaluation_of(importlib.import_module(f"{_PACKAGE}.{name}"))
        for name in modules
    }


def import_evaluation(name: str) -> Evaluation:
    """Import an evaluation from outside this package.

    Args:
        name: the module's full name: `my_package.my_module`.

    Returns:
        The evaluation.

    Raises:
        ConfigError: there is no such module, or it does not define an evaluation.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"{name}: neither an evaluation ({', '.join(find_evaluations())}) nor a module that "
            "Python can import"
        ) from error
    return _evaluation_of(module)


def _defines_evaluation(path: Path) -> bool:
    """Whether a file defines `Flags` and `run`; parsed rather than imported, as others need JAX."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return {"Flags", "run"} <= names


def _evaluation_of(module: ModuleType) -> Evaluation:
    flags, run = getattr(module, "Flags", None), getattr(module, "run", None)
    if not (isinstance(flags, type) and dataclasses.is_dataclass(flags) and callable(run)):
        raise ConfigError(
            f"{module.__name__} is not an evaluation: it must define a dataclass Flags and a "
            f"function run(flags); see {_PACKAGE}"
        )
    return Evaluation(flags, run)
