"""Value folders on the Hugging Face hub, as they are on the disk.

In: a value folder to upload, or a hub id `owner/name`, perhaps `owner/name@revision`. Out: one
commit that makes the repository's files those of the folder; or a folder in the hub's cache, whose
manifest is checked like that of any other.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from ivl_jax.checkpoint.value_card import CARD_NAME
from ivl_jax.checkpoint.value_metadata import (
    METADATA_NAME,
    ValueFolderError,
    read_value_metadata,
)
from ivl_jax.manifest import MANIFEST_NAME, ManifestError, file_problems, read_manifest
from ivl_jax.paths import absolute_path, is_local, local_path

_ID = re.compile(r"(?P<name>[\w.-]{1,96}/[\w.-]{1,96})(?:@(?P<revision>\S+))?")
# All that a value folder has; a repository may hold more, such as a plot in its card.
_WANTED = [METADATA_NAME, MANIFEST_NAME, "params/*", "tokenizer/*"]


class HubError(OSError):
    """A value folder that the hub does not take: what, where, remedy."""


def find_value_folder(path: epath.PathLike, *, revision: str | None = None) -> epath.Path:
    """Find a value folder, which is downloaded if it is not here but on the hub.

    Args:
        path: a folder, local or a URL that `etils.epath` reads; or a hub id.
        revision: branch, tag or commit of a hub id.

    Returns:
        The folder, absolute. It need not exist if no hub id was given.

    Raises:
        FileNotFoundError: the hub cannot be reached, has no such repository or revision, or the
            repository is not a value folder.
        ValueError: a revision was given with a folder.
    """
    found = value_on_hub(path, revision=revision)
    if found is not None:
        return found
    if _hub_id(path) is None:
        return absolute_path(path)
    raise FileNotFoundError(
        f"{os.fspath(path)}: no such folder here ({Path.cwd()}), and the hub's repository of this "
        f"name has no {METADATA_NAME}: it is not a value folder; a language model is loaded with "
        "ivl_jax.load_model, and python -m ivl_jax.checkpoint push uploads a value folder"
    )


def value_on_hub(path: epath.PathLike, *, revision: str | None = None) -> epath.Path | None:
    """Download a value folder from the hub, where a hub id is given.

    Args:
        path: a folder or a hub id; a local folder of that name goes first.
        revision: branch, tag or commit of a hub id.

    Returns:
        The folder in the hub's cache; None if `path` is not a hub id, or not of a value folder.

    Raises:
        FileNotFoundError: the hub cannot be reached, or has no such repository or revision.
        ValueError: a revision was given with a folder.
    """
    from ivl_jax.weights.language_model import download_snapshot

    named = _hub_id(path)
    if named is None:
        if revision is not None:
            raise ValueError(
                f"{os.fspath(path)}: revision {revision!r} applies to the hub, but this is a "
                "folder: leave it out"
            )
        return None
    name, in_name = named
    folder = download_snapshot(name, revision=revision or in_name, wanted=_WANTED)
    return epath.Path(folder) if (folder / METADATA_NAME).exists() else None


def push_to_hub(
    folder: epath.PathLike,
    name: str,
    *,
    revision: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload a value folder to the hub, in one commit.

    Args:
        folder: the value folder, local.
        name: the repository, `owner/name`; created if there is none.
        revision: the branch, created if there is none; None: main.
        private: whether a new repository is private.
        token: an access token with permission to write; None: that of `hf auth login`, or
            `HF_TOKEN`.

    Returns:
        The URL of the commit.

    Raises:
        FileNotFoundError: it is not a value folder.
        ValueFolderError: it was changed after it was written, or has no arrays.
        HubError: no token, or one that may not write there; the hub cannot be reached; or a card
            that the hub does not take.
        ValueError: `folder` is a URL, or `name` is not a hub id.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    source = local_path(folder, "the value folder").expanduser()
    files = _sealed_files(source)
    if _ID.fullmatch(name) is None or "@" in name:
        raise ValueError(f"{name}: expected a repository on the hub, owner/name")
    if token is None and get_token() is None:
        raise HubError(
            f"{name}: the hub takes uploads only with an access token, and there is none: run "
            "`hf auth login`, or set HF_TOKEN"
        )
    if (source / CARD_NAME).exists():
        files.append(CARD_NAME)
    api = HfApi(token=token, library_name="ivl_jax")
    with _explained(name, api.endpoint):
        api.create_repo(name, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        # Arrays of an earlier upload have other names: they would be files that do not belong.
        old = [
            file
            for file in api.list_repo_files(name, revision=revision)
            if file.startswith(("params/", "tokenizer/")) and file not in files
        ]
        commit = api.create_commit(
            name,
            operations=[
                *(CommitOperationDelete(file) for file in old),
                *(CommitOperationAdd(file, source / file) for file in files),
            ],
            commit_message="Value network",
            revision=revision,
        )
    return str(commit.commit_url)


def _sealed_files(folder: Path) -> list[str]:
    """The files of a whole, unchanged value folder."""
    read_value_metadata(folder)
    try:
        manifest = read_manifest(folder)
        problems = file_problems(folder, manifest)
    except ManifestError as error:
        raise ValueFolderError(f"{folder}: {error}; copy the folder again") from None
    if problems:
        raise ValueFolderError(
            f"{folder} was changed after it was written, so it is not uploaded: "
            f"{'; '.join(problems)}; export the value network again"
        )
    if not any(name.startswith("params/") for name in manifest.files):
        raise ValueFolderError(
            f"{folder} has no arrays: it only describes a run; upload {folder.parent}/value, or "
            "what `python -m ivl_jax.checkpoint export-value` makes"
        )
    return [*manifest.files, MANIFEST_NAME]


def _hub_id(path: epath.PathLike) -> tuple[str, str | None] | None:
    """The name and revision that a text may be on the hub; None for paths and what is here."""
    text = os.fspath(path)
    match = _ID.fullmatch(text) if isinstance(path, str) and is_local(text) else None
    if match is None or text.startswith((".", "~")) or Path(text).exists():
        return None
    return match["name"], match["revision"]


@contextmanager
def _explained(name: str, endpoint: str) -> Iterator[None]:
    """Say in one sentence why the hub did not take an upload."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise HubError(
                f"{name}: the hub refuses this access token (HTTP {status}): check that the owner "
                "is spelled right and that the token may write there, or run `hf auth login` again"
            ) from error
        raise HubError(
            f"{name}: the hub ({endpoint}) does not take the upload (HTTP {status}: "
            f"{error.server_message or 'no reason given'}); nothing was changed: try again"
        ) from error
    except (HTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise HubError(
            f"{name}: the hub ({endpoint}) cannot be reached ({type(error).__name__}): upload with "
            "network access, and without HF_HUB_OFFLINE"
        ) from error
    except ValueError as error:  # huggingface_hub's, from the hub's check of the front matter
        reason = " ".join(str(error).split())
        raise HubError(f"{name}: {reason}; correct the first lines of {CARD_NAME}") from error
