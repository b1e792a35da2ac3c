"""Loading a checkpoint from the page cache: speed compared with safetensors with torch, and memory.

A checkpoint of random weights is written to a temporary folder. Out: rows. Each load runs in a
separate process; imports are not timed.
"""

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.fresh_process import in_fresh_process
from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.setting import thread_count
from benchmarks.shapes import BASE_A, BASE_B, parameter_count, write_checkpoint
from benchmarks.timing import Figures, available_memory, peak_memory

ABOUT = "loading safetensors: speed and peak memory; the peer is safetensors with torch"

# The file in the page cache, a loaded copy, and room for the libraries.
_COPIES = 2.4


class Loading(NamedTuple):
    """One load of a checkpoint."""

    seconds: float
    peak: int
    """Peak memory of the process in bytes, including the libraries."""


def run(options: Options) -> Report:
    """Load the same file with both, in turn.

    Args:
        options: quick: 134 M parameters instead of 1.1 B, three loads, no target for memory (the
            libraries' own memory would dominate that of a small file).

    Returns:
        The report.

    Raises:
        MemoryError: memory does not fit the file in the page cache and a loaded copy.
        OSError: the file does not fit on the disk.
    """
    arch, repeats = (BASE_A, 3) if options.quick else (BASE_B, 5)
    needed, available = _COPIES * 4 * parameter_count(arch), available_memory()
    if available < needed:
        raise MemoryError(f"{needed / 1e9:.1f} GB are needed, {available / 1e9:.1f} are available")
    with tempfile.TemporaryDirectory(prefix="ivl-load-") as folder:
        size = write_checkpoint(Path(folder), arch)
        # The file just written is in the page cache; the first load of each is not counted.
        loadings = [
            (
                in_fresh_process(load, {}, folder),
                in_fresh_process(load_with_torch, {}, folder, thread_count()),
            )
            for _ in range(repeats + 1)
        ][1:]
    ours, theirs = zip(*loadings, strict=True)
    rates = [Figures.of(size / 1e9 / x.seconds for x in side) for side in (ours, theirs)]
    memory = [Figures.of(x.peak / size for x in side) for side in (ours, theirs)]
    peer = "safetensors, torch.clone of every tensor"
    rows = [
        Row(
            "load_params, transposing included",
            rates[0],
            "GB/s",
            better="higher",
            peer=Peer(peer, rates[1].median),
            target=Target("ratio", 0.6),
        ),
        Row(
            "peak memory of a fresh process (VmHWM)",
            memory[0],
            "× file",
            peer=Peer(peer, memory[1].median),
            target=None if options.quick else Target("median", 1.3),
        ),
    ]
    shapes = {"parameters": parameter_count(arch), "file bytes": size}
    return Report(rows, dtype="float32", shapes=shapes)


def load(folder: str) -> Loading:
    """Load with `load_params`; in a fresh process."""
    import jax

    from ivl_jax.weights.hf_checkpoint import load_params
    from ivl_jax.weights.language_model import read_arch

    arch = read_arch(Path(folder))
    jax.block_until_ready(jax.device_put(0.0))  # the backend starts
    started = time.perf_counter()
    jax.block_until_ready(load_params(folder, arch))
    return Loading(time.perf_counter() - started, peak_memory())


def load_with_torch(folder: str, threads: int) -> Loading:
    """The peer; in a fresh process."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(threads)
    started = time.perf_counter()
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    seconds = time.perf_counter() - started
    assert tensors
    return Loading(seconds, peak_memory())
