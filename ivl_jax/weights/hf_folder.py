"""Finds the tensors of a Hugging Face folder, and creates new folders atomically.

In: a folder. Out: tensor name → where it is stored, every shard checked against the index; or an
empty folder that takes its final name once everything is in it.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from ivl_jax.json_files import read_json_object
from ivl_jax.text_files import MalformedFileError
from ivl_jax.tree_compare import mismatch_error
from ivl_jax.weights.hf_names import causal_name
from ivl_jax.weights.safetensors_file import TensorRecord, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_CONVERT = "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new), with PyTorch"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_tensors(folder: Path) -> dict[str, TensorRecord]:
    """List the tensors in the safetensors files of a folder.

    Args:
        folder: a local folder with `model.safetensors`, or `model.safetensors.index.json` and its
            shards.

    Returns:
        Name as in a plain causal language model → record.

    Raises:
        FileNotFoundError: there are no safetensors files; for pickle files it gives the remedy.
        TreeMismatchError: shards are missing, truncated or outside the folder, disagree with the
            index, or repeat a tensor of another shard; lists at most 20.
    """
    shards, indexed = _shards(folder)
    problems: list[str] = []
    found: dict[str, TensorRecord] = {}
    for shard in shards:
        if problem := _outside(folder, shard):
            problems.append(problem)
            continue
        path = folder / shard
        if not path.is_file():
            by = "" if indexed is None else f" by {INDEX_FILE}"
            problems.append(f"{shard}: expected a file{by}, got nothing")
            continue
        try:
            records = read_header(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        if indexed is not None:
            expected = {name for name, file in indexed.items() if file == shard}
            problems += [
                f"{name}: expected in {shard} by {INDEX_FILE}, got nothing"
                for name in expected - set(records)
            ]
            problems += [
                f"{name}: expected {indexed.get(name, 'nowhere')} by {INDEX_FILE}, "
                f"got it in {shard}"
                for name in set(records) - expected
            ]
        for name, record in records.items():
            plain = causal_name(name)
            if plain in found:
                first = found[plain]
                problems.append(
                    f"{plain}: set twice: {first.name} in {first.file.name}, {name} in {shard}"
                )
            else:
                found[plain] = record
    if problems:
        raise mismatch_error(
            sorted(problems),
            what=str(folder),
            remedy="Download or save the folder again; if it was edited by hand, undo that.",
        )
    return found


def _shards(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """File names, and tensor name → file name if there is an index."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    single, index = (folder / SINGLE_FILE).exists(), folder / INDEX_FILE
    if single and index.exists():
        raise ValueError(
            f"{folder}: expected either {SINGLE_FILE} or {INDEX_FILE}, got both: they may be "
            "different models; remove the one that is out of date"
        )
    if single:
        return [SINGLE_FILE], None
    if index.exists():
        try:
            weight_map = read_json_object(index).get("weight_map")
            if (
                not isinstance(weight_map, dict)
                or not weight_map
                or not all(isinstance(file, str) for file in weight_map.values())
            ):
                expected = "weight_map: expected file names by tensor name"
                raise MalformedFileError(index, expected)
        except MalformedFileError as error:
            raise ValueError(f"{error} (not a shard index: download it again)") from error
        return sorted(set(weight_map.values())), weight_map
    raise FileNotFoundError(_nothing_to_load(folder))


def _nothing_to_load(folder: Path) -> str:
    """What the folder has instead of the expected files, and the remedy."""
    expected = f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, got"
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    if other:
        hint = (
            "merge the adapter into its base"
            if "adapter_model.safetensors" in other
            else ("download the index as well, or save the model again with save_pretrained")
        )
        return f"{expected} {', '.join(other[:5])}; {hint}"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{expected} only pickle files ({', '.join(pickles[:5])}), which can run code when "
            f"opened and are refused; if you trust them, convert them once: {_CONVERT}"
        )
    return (
        f"{expected} neither; check that this is the folder of a model. A repository that has only "
        f"pickle files (*.bin) must be converted first: {_CONVERT}"
    )


def _outside(folder: Path, shard: str) -> str | None:
    """Why a file name of an index must not be followed; None if it may be."""
    if Path(shard).is_absolute() or ".." in Path(shard).parts:
        return f"{shard}: expected a file inside the folder (in {INDEX_FILE})"
    root = folder.resolve()
    try:
        target = (folder / shard).resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            target.stat()  # is_file() keeps silent about links in a circle, from Python 3.13 on
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, links in a circle
        return f"{shard[:60]!r}: not a file name ({error!r:.100}, in {INDEX_FILE})"
    # The hub's cache keeps <repository>/snapshots/<revision>/file -> ../../blobs/<hash>.
    cached = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if target.is_relative_to(root) or target.is_relative_to(cached):
        return None
    return f"{shard}: expected a file inside the folder, got a link to {target}: copy the file here"


def check_new_folder(folder: Path, *, overwrite: bool) -> None:
    """Check that a model folder may be written here.

    Args:
        folder: the final name.
        overwrite: replace an existing model folder.

    Raises:
        FileExistsError: the folder has files and may not be replaced, or has no `config.json` and
            so is not a model folder.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder}: expected no such folder, got one with files; choose another name, or set "
            "overwrite to replace it"
        )
    if not (folder / "config.json").is_file():
        raise FileExistsError(
            f"{folder}: expected a model folder to replace, got files without config.json; choose "
            "another name or remove it yourself"
        )


@contextlib.contextmanager
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Create a folder to fill, which takes its final name if the block ends without an exception.

    So the final folder is either complete or absent. With several processes all of them enter, but
    only process 0 may write.

    Args:
        folder: the final name.
        overwrite: replace an existing model folder.

    Yields:
        An empty folder in the same parent folder.

    Raises:
        FileExistsError: as `check_new_folder`.
    """
    folder = folder.expanduser().resolve()
    check_new_folder(folder, overwrite=overwrite)
    staging = folder.with_name(f".{folder.name}.incomplete")
    writes = jax.process_index() == 0
    if writes:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        staging.mkdir(parents=True)
    try:
        yield staging
        if writes:
            _replace(folder, staging)
    finally:
        if writes:
            shutil.rmtree(staging, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"written {folder}")


def _replace(folder: Path, staging: Path) -> None:
    """Move `staging` to `folder`; an existing folder is removed last."""
    if not folder.exists():
        staging.rename(folder)
        return
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    os.replace(folder, replaced)
    staging.rename(folder)
    shutil.rmtree(replaced)
