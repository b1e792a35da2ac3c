"""Reads the rows of TFDS datasets: those of the catalogue, and folders with a prepared one.

In: `tfds:NAME[/CONFIG[:VERSION]][:SPLIT]`, or `tfds:FOLDER[:SPLIT]`. Out: rows as JSON values, and
the files they come from. A dataset's description names the Python classes of its features, which
TFDS imports: only TFDS's own classes are allowed.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from ivl_jax.data.formats import RowError, SourceError
from ivl_jax.json_files import parse_json, read_json
from ivl_jax.text_files import MalformedFileError

_REFERENCE = re.compile(
    r"tfds:(?P<name>.+?)(?P<version>:\d+(?:\.[\d*]+)+)?(?::(?P<split>[A-Za-z_]\w*(?:\[.*\])?))?"
)
_OWN_CLASSES = re.compile(r"tensorflow_datasets\.core\.features\.\w+\.\w+")
_CLASS_FIELDS = ("pythonClassName", "python_class_name", "type")
_PREPARE = 'prepare it elsewhere with download_and_prepare(file_format="array_record")'


def read_rows(reference: str) -> Iterator[tuple[str, Any]]:
    """Read a split in its own order.

    Args:
        reference: `tfds:…`; without a split, `train`.

    Yields:
        The place of each row, "tfds:gsm8k:train:17", and the row; a row that is not UTF-8 is a
        RowError.

    Raises:
        SourceError: TFDS cannot provide the dataset, or it is damaged.
    """
    builder, split = _open(reference)
    try:
        rows = builder.as_data_source(split)
        count = len(rows)
    except NotImplementedError as error:  # TFDS's, for formats without random access
        raise SourceError(
            f"{reference}: stored as {builder.info.file_format.value}, expected array_record: "
            f"{_PREPARE}"
        ) from error
    except Exception as error:  # TFDS raises exceptions of any kind
        raise SourceError(f"{reference}: TFDS cannot open it: {_one_line(error)}") from error
    for index in range(count):
        try:
            value = _plain(rows[index])
        except UnicodeDecodeError as error:
            value = RowError(f"not UTF-8: {error}")
        except Exception as error:
            raise SourceError(
                f"{reference}: row {index} cannot be read: {_one_line(error)}; {_PREPARE}"
            ) from error
        yield f"tfds:{builder.name}:{split}:{index}", value


def split_files(reference: str) -> tuple[str, list[epath.Path]]:
    """The split that a reference names, and its files.

    Raises:
        SourceError: TFDS cannot provide the dataset.
    """
    builder, split = _open(reference)
    return split, [epath.Path(path) for path in builder.info.splits[_name_of(split)].filepaths]


def check_feature_classes(folder: epath.PathLike) -> None:
    """Check that a prepared dataset names only TFDS's own Python classes, before TFDS imports them.

    Args:
        folder: the folder of `features.json`.

    Raises:
        SourceError: the file is missing or not JSON, or it names another class.
    """
    path = epath.Path(folder) / "features.json"
    try:
        foreign = sorted(set(_foreign_classes(read_json(path), str(path))))
    except FileNotFoundError as error:
        raise SourceError(f"{folder}: no features.json; {_PREPARE}") from error
    except MalformedFileError as error:
        raise SourceError(f"{error}; {_PREPARE}") from error
    if foreign:
        raise SourceError(
            f"{path} names Python classes that are not TFDS's own and would be imported: "
            f"{', '.join(foreign[:5])}; {_PREPARE} and only features of tfds.features"
        )


def _open(reference: str) -> tuple[Any, str]:
    """The TFDS builder, its set prepared, and the split."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import file_utils

    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise SourceError(f"{reference}: expected tfds:NAME[/CONFIG[:VERSION]][:SPLIT]")
    name, split = match["name"], match["split"] or "train"
    try:
        if (epath.Path(name) / "dataset_info.json").exists():
            check_feature_classes(name)
            builder = tfds.builder_from_directory(name)
        elif ":" in name:
            raise SourceError(
                f"{reference}: datasets outside the TFDS catalogue run their own code; {_PREPARE} "
                "and give its folder: tfds:/path/to/NAME/VERSION"
            )
        else:
            # A dataset that is already prepared is read by its own description.
            for data_dir in map(epath.Path, file_utils.list_data_dirs()):
                for below in ("*", "*/*"):  # VERSION, CONFIG/VERSION
                    pattern = f"{name.partition('/')[0]}/{below}/features.json"
                    for found in data_dir.glob(pattern):
                        check_feature_classes(found.parent)
            builder = tfds.builder(name + (match["version"] or ""))
            if not builder.is_prepared():
                builder.download_and_prepare(file_format="array_record")
        splits = sorted(builder.info.splits)
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(
            f"{reference}: TFDS cannot provide this dataset: {_one_line(error)}; {_PREPARE}, where "
            "it can be downloaded, and give its folder: tfds:/path/to/NAME/VERSION"
        ) from error
    if _name_of(split) not in splits:
        raise SourceError(f"{reference}: no split {split!r}; it has {splits}")
    return builder, split


def _foreign_classes(value: Any, name: str) -> Iterator[str]:
    """Every class named by a description, at any depth, that is not TFDS's own."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = parse_json(value, name)  # TFDS stores some parts as JSON inside JSON
        except MalformedFileError:
            return
    if isinstance(value, dict):
        for key, inner in value.items():
            named = key in _CLASS_FIELDS and isinstance(inner, str)
            if named and _OWN_CLASSES.fullmatch(inner) is None:
                yield repr(inner[:200])
            yield from _foreign_classes(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _foreign_classes(inner, name)


def _name_of(split: str) -> str:
    """A split's name without its slice."""
    return split.split("[")[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _plain(value: Any) -> Any:
    """A TFDS example as a JSON value."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
