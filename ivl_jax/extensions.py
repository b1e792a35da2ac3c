"""Extensions: entries of the package's tables, or a `module:attribute` that the user names.

In: a name from the user's own config or flag, never from a file that people exchange. Out: an entry
of a table, or the attribute of the module.
"""

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def is_extension(name: str) -> bool:
    """Whether a name is of the form `module:attribute`."""
    module, colon, attribute = name.partition(":")
    parts = [*module.split("."), attribute]
    return bool(colon) and all(part.isidentifier() for part in parts)


def load_extension(name: str, table: Mapping[str, T], kind: type[T], *, where: str) -> T:
    """Look a name up in a table, or import what it names.

    Args:
        name: a key of the table, or `module:attribute`. A module of the current folder is found
            where Python finds it: with `python train.py` that is the folder of train.py.
        table: the package's own entries.
        kind: the class it must be an instance of.
        where: the config key or flag, for messages.

    Returns:
        The entry, or the module's attribute.

    Raises:
        ValueError: no such entry, module or attribute, or an object of another class.
    """
    if name in table:
        return table[name]
    if not is_extension(name):
        raise ValueError(
            f'{where} = "{name}": expected one of {", ".join(table)}, or module:attribute of a '
            f"{kind.__name__} of your own"
        )
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ValueError(
            f'{where} = "{name}": {error}; check that its folder is on PYTHONPATH and that '
            "everything it imports is installed"
        ) from error
    except AttributeError as error:
        raise ValueError(f'{where} = "{name}": {error}') from error
    if not isinstance(found, kind):
        raise ValueError(
            f'{where} = "{name}": expected a {kind.__name__}, found {type(found).__name__}'
        )
    return found


def extension_hash(name: str) -> str:
    """Identify the code of an extension, so that what was derived with other code is noticed.

    Args:
        name: `module:attribute`, of a module that can be imported.

    Returns:
        SHA-256 of the module's source file; empty for a module without one, such as a notebook.
    """
    file = getattr(importlib.import_module(name.partition(":")[0]), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
