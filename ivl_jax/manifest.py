"""The hash manifest of a folder: sizes and hashes of its files, so that one altered bit is found.

In: a folder of finished files. Out: `manifest.json` in it, written atomically, and later the list
of files that are missing, truncated or altered. Orbax itself returns altered bytes silently; only
a truncated file makes it fail. Does not import JAX.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from etils import epath

from ivl_jax.folder_copies import file_names
from ivl_jax.json_files import json_kind, parse_json
from ivl_jax.paths import flush_folder, is_local, write_atomically

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
PROBLEMS_SHOWN = 20
NOT_HASHED: Mapping[str, dict[str, Any]] = MappingProxyType({})
_BLOCK_BYTES = 1 << 22


class ManifestError(ValueError):
    """A manifest that is missing, unreadable or altered: file, expected, found."""


@dataclass(frozen=True)
class Manifest:
    """The files of a folder as they were written.

    Attributes:
        files: path relative to the folder, with `/` → {"bytes": size, "sha256": hex digest}.
        about: what else the writer recorded, any JSON.
    """

    files: dict[str, dict[str, Any]]
    about: dict[str, Any]

    @property
    def total_bytes(self) -> int:
        """Total size of all files."""
        return sum(record["bytes"] for record in self.files.values())


def hash_files(folder: epath.PathLike, below: str) -> dict[str, dict[str, Any]]:
    """Hash the files of a sub-folder, and flush them to the disk.

    Args:
        folder: the folder that a manifest will describe.
        below: the sub-folder, relative to it; it need not exist.

    Returns:
        Path relative to `folder` → size and hash, as `write_manifest` takes them.
    """
    folder = epath.Path(folder)
    if not (folder / below).exists():
        return {}
    names = sorted(file_names(folder / below, f"{below}/"))
    records = {name: _record(folder / name, flush=True) for name in names}
    _flush_folders(folder, names)
    return records


def write_manifest(
    folder: epath.PathLike,
    about: Mapping[str, Any],
    *,
    threads: int = 1,
    hashed: Mapping[str, dict[str, Any]] = NOT_HASHED,
) -> Manifest:
    """Hash every file below a folder and write `manifest.json` there, atomically and last.

    Local files are flushed to the disk before the manifest exists, so that a power failure cannot
    leave a manifest whose files were lost.

    Args:
        folder: the folder; local or a URL that `etils.epath` reads. Nothing may write to it now.
        about: JSON recorded and protected with the hashes.
        threads: files hashed at once; 1 leaves the other cores to a training loop.
        hashed: what `hash_files` returned elsewhere; these files are not read.

    Returns:
        The manifest that was written.

    Raises:
        FileNotFoundError: a file of `hashed` is not there.
    """
    folder = epath.Path(folder)
    names = sorted(set(file_names(folder)) - {MANIFEST_NAME})
    if missing := sorted(set(hashed) - set(names)):
        raise FileNotFoundError(f"{folder / missing[0]} was hashed elsewhere, but is not here")
    with ThreadPoolExecutor(threads) as pool:
        records = list(
            pool.map(
                lambda name: hashed.get(name) or _record(folder / name, flush=True),
                names,
            )
        )
    manifest = Manifest(files=dict(zip(names, records, strict=True)), about=dict(about))
    _flush_folders(folder, names)
    _write(folder, manifest)
    return manifest


def replace_about(folder: epath.PathLike, about: Mapping[str, Any]) -> None:
    """Replace the `about` record of a sealed folder without reading its other files.

    Args:
        folder: the folder.
        about: the new JSON.

    Raises:
        ManifestError: the folder's manifest is missing or was altered.
    """
    _write(epath.Path(folder), Manifest(files=read_manifest(folder).files, about=dict(about)))


def read_manifest(folder: epath.PathLike) -> Manifest:
    """Read a folder's `manifest.json` and check it against its own checksum.

    Args:
        folder: the folder.

    Returns:
        The manifest.

    Raises:
        ManifestError: it is missing, cannot be parsed, has an unknown format or was altered.
    """
    path = epath.Path(folder) / MANIFEST_NAME
    try:
        content = parse_json(path.read_bytes(), MANIFEST_NAME)
    except FileNotFoundError:
        raise ManifestError(
            f"{MANIFEST_NAME} is missing: the folder is incomplete, or was only partly copied"
        ) from None
    except (ValueError, OSError) as error:
        raise ManifestError(f"{MANIFEST_NAME} cannot be read: {error}") from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise ManifestError(f"{MANIFEST_NAME} was altered: it has no checksum")
    expected = content.pop("checksum")
    if (found := _checksum(content)) != expected:
        raise ManifestError(
            f"{MANIFEST_NAME} was altered: expected SHA-256 {expected}, found {found}"
        )
    if content.get("format") != MANIFEST_FORMAT:
        raise ManifestError(
            f"{MANIFEST_NAME} has format {content.get('format')}, but this version of ivl_jax "
            f"reads {MANIFEST_FORMAT}: install the version of ivl_jax that wrote it"
        )
    _check_shape(content)
    return Manifest(files=content["files"], about=content["about"])


def file_problems(
    folder: epath.PathLike,
    manifest: Manifest,
    *,
    sizes_only: bool = False,
    threads: int = 4,
    share: tuple[int, int] = (0, 1),
) -> tuple[str, ...]:
    """Compare the files of a folder with its manifest, every byte of them.

    Args:
        folder: the folder.
        manifest: the expected files.
        sizes_only: look only for missing and truncated files, without reading them.
        threads: files hashed at once.
        share: (index, count) of the part of the files that is compared, about equal in bytes.

    Returns:
        One sentence for each file that is missing, truncated or altered, at most 20 and then a
        count; empty if all are as written. Files that the manifest does not list are ignored.
    """
    folder = epath.Path(folder)

    def problem(item: tuple[str, dict[str, Any]]) -> str | None:
        name, expected = item
        try:
            size = (folder / name).stat().length
            if size != expected["bytes"]:
                return f"{name}: expected {expected['bytes']} bytes, found {size}"
            if sizes_only:
                return None
            found = _record(folder / name, flush=False)["sha256"]
        except FileNotFoundError:
            return f"{name}: missing"
        except OSError as error:
            return f"{name}: cannot be read ({error})"
        if found != expected["sha256"]:
            return f"{name}: altered: expected SHA-256 {expected['sha256']}, found {found}"
        return None

    files = list(manifest.files.items())
    if share != (0, 1):
        files = sorted(files, key=lambda item: (-item[1]["bytes"], item[0]))[share[0] :: share[1]]
    with ThreadPoolExecutor(threads) as pool:
        return shorten([line for line in pool.map(problem, files) if line])


def unlisted_files(folder: epath.PathLike, manifest: Manifest) -> list[str]:
    """List the files of a folder that its manifest does not know, by name.

    Args:
        folder: the folder.
        manifest: what it was when it was written.

    Returns:
        Their paths relative to the folder, in alphabetical order.
    """
    known = {*manifest.files, MANIFEST_NAME}
    return sorted(set(file_names(folder)) - known)


def shorten(problems: Sequence[str]) -> tuple[str, ...]:
    """Keep the first 20 lines of a list of problems and count the rest."""
    shown = tuple(problems[:PROBLEMS_SHOWN])
    more = len(problems) - len(shown)
    return (*shown, f"and {more} more") if more > 0 else shown


def _write(folder: epath.Path, manifest: Manifest) -> None:
    content = {"format": MANIFEST_FORMAT, "about": manifest.about, "files": manifest.files}
    content["checksum"] = _checksum(content)
    write_atomically(folder / MANIFEST_NAME, json.dumps(content, indent=1).encode())


def _check_shape(content: Mapping[str, Any]) -> None:
    """Check that a manifest lists files with sizes and hashes; a matching checksum proves less."""
    for field in ("files", "about"):
        if not isinstance(content.get(field), dict):
            raise ManifestError(
                f"{MANIFEST_NAME}: field {field!r}: expected an object, got "
                f"{json_kind(content[field]) if field in content else 'nothing'}"
            )
    for name, record in content["files"].items():
        found = record if isinstance(record, dict) else {}
        inside = not name.startswith("/") and ".." not in name.split("/")
        if type(found.get("bytes")) is not int or not isinstance(found.get("sha256"), str):
            raise ManifestError(
                f"{MANIFEST_NAME}: field 'files', {name!r}: expected 'bytes' and 'sha256'"
            )
        if not name or not inside:
            raise ManifestError(f"{MANIFEST_NAME}: field 'files': {name!r} is outside the folder")


def _checksum(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _record(path: epath.Path, *, flush: bool) -> dict[str, Any]:
    """Size and hash of one file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
        if flush and is_local(path):
            os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _flush_folders(folder: epath.Path, names: Sequence[str]) -> None:
    if is_local(folder):
        for name in sorted({os.path.dirname(name) for name in names} | {""}):
            flush_folder(os.path.join(os.fspath(folder), name))
