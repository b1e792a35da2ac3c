"""The flags and models of a server of ours that is measured, and runs of it that compile nothing.

In: shapes of networks; works. Out: a `ServeConfig`; tokens and seconds of runs.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from benchmarks.shapes import write_checkpoint
from ivl_jax.config import ComposedModelConfig, MeshConfig, ServeConfig
from ivl_jax.model.architecture import ArchConfig

VALUE = "value"
"""What requests call the value network."""
ONE_DEVICE = MeshConfig(data=1, fsdp=1, tensor=1)

_COMPILATION = "/jax/core/compile/backend_compile_duration"
_MORE_ROUNDS = 3  # at most, in which programs are compiled
_PATIENCE = 3600.0  # seconds that a request may take: no client of a benchmark gives up


def server_config(model: ComposedModelConfig, *, rows: int, name: str = "") -> ServeConfig:
    """The flags of a server on any free port.

    Args:
        model: the models.
        rows: decoded together, at most.
        name: what requests call the base; empty: as its folder.
    """
    return ServeConfig(
        model,
        name=name,
        port=0,
        max_rows=rows,
        request_seconds=_PATIENCE,
        queue_seconds=_PATIENCE,
        warm_up=False,  # benchmarks warm up by their own requests
    )


def random_pair(folder: Path, base: ArchConfig, value: ArchConfig) -> ComposedModelConfig:
    """Write a base and a value network with random weights, and Llama 2's tokenizer.

    Args:
        folder: for the folders `base` and `value`.
        base: the base's shape.
        value: the value network's shape.

    Returns:
        Both, composed on one device.
    """
    for name, arch in (("base", base), (VALUE, value)):
        (folder / name).mkdir()
        write_checkpoint(folder / name, arch, tokenizer=True)
    values = (f"{VALUE}={folder / VALUE}",)
    return ComposedModelConfig(base=str(folder / "base"), value=values, mesh=ONE_DEVICE)


def compiled_runs(
    works: Mapping[str, Callable[[], tuple[int, float]]], *, repeats: int
) -> dict[str, list[tuple[int, float]]]:
    """Run works in turn; runs in which a program was compiled do not count.

    The shapes of a server's batches depend on when requests arrive: no number of runs before is
    sure to have compiled all of its programs.

    Args:
        works: by name; each returns its tokens and its seconds.
        repeats: runs of each that should count.

    Returns:
        Tokens and seconds of the runs that count.

    Raises:
        RuntimeError: none of a work's runs counts.
    """
    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILATION:
            compiled.append(duration_secs)

    runs: dict[str, list[tuple[int, float]]] = {name: [] for name in works}
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(repeats + _MORE_ROUNDS):
            for name, work in works.items():
                before = len(compiled)
                run = work()
                if len(compiled) == before:
                    runs[name].append(run)
            if all(len(each) >= repeats for each in runs.values()):
                break
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if not all(runs.values()):
        raise RuntimeError("programs were compiled in every run")
    return runs
