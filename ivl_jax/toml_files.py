"""Reads TOML files: the one reader for all of the project's TOML.

In: a path, local or a URL that `etils.epath` reads. Out: the document; or a `MalformedFileError`
that names the file and the place.
"""

import re
import sys
import tomllib
from typing import Any

from etils import epath

from ivl_jax.text_files import MalformedFileError, read_text

_PLACE = re.compile(r"(.*?) \(at line (\d+), column (\d+)\)", re.DOTALL)


def read_toml(path: epath.PathLike) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file.

    Returns:
        Its tables and values, as `tomllib` gives them.

    Raises:
        FileNotFoundError: There is no such file.
        MalformedFileError: It cannot be read, is not UTF-8 or not TOML, is nested too deeply, or
            has an excessively long integer; names the line.
    """
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = _PLACE.fullmatch(str(error))
        if match is None:
            raise MalformedFileError(path, f"not TOML: {error}") from error
        line, column = int(match[2]), int(match[3])
        raise MalformedFileError(path, f"not TOML: {match[1]}", line=line, column=column) from error
    except RecursionError as error:
        raise MalformedFileError(path, "not TOML: nested too deeply") from error
    except ValueError as error:  # an integer with more digits than Python converts
        limit = sys.get_int_max_str_digits()
        for number, line in enumerate(text.splitlines(), start=1):
            if re.search(rf"[0-9]{{{limit + 1},}}", line.replace("_", "")):
                key = line.partition("=")[0].strip()[:80]
                reason = f"{key}: an integer of more than {limit} digits"
                raise MalformedFileError(path, reason, line=number) from error
        raise MalformedFileError(path, f"not TOML: {error}") from error
