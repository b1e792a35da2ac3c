"""Checks the files that an evaluation is to write, before its work begins.

In: flags and the paths that they name. Out: what is wrong with them.
"""

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ivl_jax.config.checks import remote_problem


def output_problems(
    outputs: Mapping[str, str], inputs: Sequence[tuple[str, str]] = ()
) -> list[str]:
    """Say which files must not be written; touches nothing.

    Args:
        outputs: flag → the file it names, or an empty text.
        inputs: (flag, file or folder that it reads); what is not a local path matches nothing.

    Returns:
        One line for each file that is remote, not a regular file, or also an input or another
        output.
    """
    problems: list[str] = []
    taken: dict[str, str] = {}
    for flag, path in outputs.items():
        if not path:
            continue
        if problem := remote_problem(flag, path):
            problems.append(problem)
            continue
        if Path(path).exists() and not Path(path).is_file():
            kind = "a folder" if Path(path).is_dir() else "not a regular file"
            problems.append(f"{flag} {path} is {kind}: name a file to write")
        problems += [
            f"{flag} {path} is, or is inside, what {reader} reads, {source}: name another file"
            for reader, source in inputs
            if source and _within(path, source)
        ]
        problems += [
            f"{other} and {flag} are the same file, {path}: name another"
            for other, place in taken.items()
            if _within(path, place)
        ]
        taken[flag] = path
    return problems


def make_folders(outputs: Mapping[str, str]) -> list[str]:
    """Create the folders of files to write, and say which cannot be written.

    Args:
        outputs: as in `output_problems`.

    Returns:
        One line for each file that cannot be written.
    """
    problems = []
    for flag, path in outputs.items():
        folder = Path(path).parent
        try:
            if path:
                folder.mkdir(parents=True, exist_ok=True)
                # Only writing tells: permissions say nothing of a read-only disk.
                tempfile.NamedTemporaryFile(dir=folder).close()
        except OSError as error:
            problems.append(f"{flag} {path} cannot be written: {error.strerror}")
    return problems


def _within(path: str, source: str) -> bool:
    """Whether a file is the same as another, by any name, or inside a folder."""
    resolved, other = Path(path).resolve(), Path(os.path.expanduser(source)).resolve()
    with contextlib.suppress(OSError):
        if os.path.samefile(resolved, other):
            return True
    return resolved == other or other in resolved.parents
