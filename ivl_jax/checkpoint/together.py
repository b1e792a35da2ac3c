"""What the processes of a run do together for a checkpoint: hash it, and agree on the one to use.

In: a checkpoint folder that all of them see. Out: a sealed step; the newest step that is intact.
Each process reads its own share of the bytes.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ivl_jax.checkpoint.steps import NoUsableCheckpointError, RejectedStep, find_usable_step
from ivl_jax.manifest import (
    Manifest,
    ManifestError,
    file_problems,
    hash_files,
    read_manifest,
    shorten,
    write_manifest,
)
from ivl_jax.processes import all_texts, gather_texts

_END = -1
_seals = itertools.count()


def seal_step(folder: epath.Path, about: Mapping[str, Any], *, timeout: int) -> None:
    """Write a step's manifest in process 0; each process hashes the shards that it wrote.

    Called by every process, in any thread, once the step is committed.

    Args:
        folder: of the step.
        about: what the manifest records besides the hashes.
        timeout: seconds that a process waits for the others.

    Raises:
        JaxRuntimeError: a process did not tell its hashes in time.
        OSError: a file cannot be read.
    """
    if jax.process_count() == 1:
        write_manifest(folder, about)
        return
    index, name = jax.process_index(), f"hashes{next(_seals)}"
    if index > 0:
        _wait_until_there(folder, timeout)
        # Orbax lets each process write a folder of its own, and process 0 the rest.
        gather_texts(
            name,
            json.dumps(hash_files(folder, f"state/ocdbt.process_{index}")),
            timeout=timeout,
        )
        return
    hashed: dict[str, dict[str, Any]] = {}
    for text in gather_texts(name, "{}", timeout=timeout):
        hashed |= json.loads(text)
    write_manifest(folder, about, hashed=hashed)


def agree_on_step(
    directory: epath.Path, step: int | None, fits: Callable[[dict[str, Any]], str | None]
) -> tuple[int, tuple[RejectedStep, ...]]:
    """Find the newest intact step, as `find_usable_step`; each process reads a share of its files.

    Args:
        directory: the checkpoint folder.
        step: only this step; None: the newest intact one.
        fits: asked in process 0 only.

    Returns:
        The step; in process 0 also the newer ones that cannot be used.

    Raises:
        NoUsableCheckpointError: none is intact; process 0 lists the reasons.
    """
    if jax.process_count() == 1:
        return find_usable_step(directory, step, fits)
    found, rejected, error = _END, (), None
    if jax.process_index() == 0:

        def check(folder: epath.Path, manifest: Manifest) -> tuple[str, ...]:
            _broadcast(int(folder.name))
            return _problems_of_all(folder, manifest)

        try:
            found, rejected = find_usable_step(directory, step, fits, check)
        except NoUsableCheckpointError as raised:
            error = raised
        _broadcast(_END)
    else:
        while (candidate := _broadcast(_END)) != _END:
            _problems_of_all(directory / str(candidate), None)
    found = _broadcast(found)
    if found == _END:
        raise error or NoUsableCheckpointError("no checkpoint can be used: see process 0")
    return found, rejected


def _problems_of_all(folder: epath.Path, manifest: Manifest | None) -> tuple[str, ...]:
    """What is wrong with a step's files: each process compares its share."""
    share = (jax.process_index(), jax.process_count())
    try:
        own = file_problems(folder, manifest or read_manifest(folder), share=share)
    except ManifestError as problem:
        own = (f"process {share[0]} does not see it as process 0 does: {problem}",)
    return shorten([line for text in all_texts(json.dumps(own)) for line in json.loads(text)])


def _broadcast(number: int) -> int:
    """Process 0's number."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _wait_until_there(folder: epath.Path, timeout: int) -> None:
    """Wait for a folder that process 0 has renamed; other machines may see it a little later."""
    deadline = time.monotonic() + timeout
    while not folder.exists():
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{folder}, which process 0 has written, is not there for process "
                f"{jax.process_index()} after {timeout} s: run_dir must be a folder that all hosts "
                "share"
            )
        time.sleep(0.1)
