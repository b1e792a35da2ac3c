"""Finds the benchmarks: every file of this package that declares itself one.

In: the package's folder, or `MODULE:FUNCTION` from the command line. Out: names, a line about each,
and functions that are imported only when they run.
"""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import Options, Report

_FOLDER = Path(__file__).parent


class BenchmarkError(ValueError):
    """No such benchmark, or an incomplete one."""


class Benchmark(NamedTuple):
    """A benchmark that can be run."""

    about: str
    """One line: what is measured, compared with what."""
    module: str
    function: str = "run"

    def load(self) -> Callable[[Options], Report]:
        """Import its function."""
        return getattr(importlib.import_module(self.module), self.function)


def find_benchmarks(folder: Path = _FOLDER, *, package: str = "benchmarks") -> dict[str, Benchmark]:
    """Find the benchmarks of a package without importing them.

    Args:
        folder: the package's folder.
        package: its name.

    Returns:
        By name, in alphabetical order.

    Raises:
        BenchmarkError: a file defines `run` without a literal `ABOUT`, or the reverse.
    """
    found = {}
    for path in sorted(folder.glob("[!_]*.py")):
        about, runs = _declarations(path)
        if about is None and not runs:
            continue
        if about is None or not runs:
            raise BenchmarkError(
                f"{path}: a benchmark defines ABOUT, a string literal, and run(options); it has "
                f"only {'run' if runs else 'ABOUT'}"
            )
        found[path.stem] = Benchmark(about, f"{package}.{path.stem}")
    return found


def read_reference(reference: str) -> Benchmark:
    """Read `MODULE:FUNCTION`, a benchmark from elsewhere.

    Args:
        reference: of a function that takes `Options` and returns a `Report`.

    Returns:
        The benchmark, described by its docstring's first line.

    Raises:
        BenchmarkError: there is no such function.
    """
    module, _, function = reference.partition(":")
    try:
        run = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BenchmarkError(f"{reference}: expected MODULE:FUNCTION: {error}") from error
    lines = (run.__doc__ or "").strip().splitlines()
    return Benchmark(lines[0] if lines else reference, module, function)


def _declarations(path: Path) -> tuple[str | None, bool]:
    """A file's `ABOUT`, and whether it defines `run`."""
    about, runs = None, False
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(
                targets=[ast.Name(id="ABOUT")], value=ast.Constant(value=str() as text)
            ):
                about = text
            case ast.FunctionDef(name="run"):
                runs = True
    return about, runs
