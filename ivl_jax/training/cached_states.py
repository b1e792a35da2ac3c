"""Runs each frozen base once over the demonstrations, so that no training step has to run it.

In: bases with `cache_states` in their config, tokenised demonstrations. Out: their final hidden
states, stored with the demonstrations. They do not depend on the value network or on training
settings, so later epochs and other runs on the same demonstrations reuse them.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array
from rich.progress import Progress

from ivl_jax.composed.forward import run_network
from ivl_jax.config import TrainConfig
from ivl_jax.data.base_states import BaseStates, open_base_states
from ivl_jax.data.batching import Batch, lay_out_rows
from ivl_jax.data.chat import ChatFormat
from ivl_jax.data.packing import pack
from ivl_jax.data.tokenized import TokenizedDemonstrations
from ivl_jax.model.decoder import Params
from ivl_jax.sharding import batch_sharding, place_batch
from ivl_jax.training.models import FrozenBase, Placement, load_base, place_base
from ivl_jax.training.networks import frozen_network
from ivl_jax.weights.fingerprint import folder_name, remembered_weights, weights_fingerprint

logger = logging.getLogger(__name__)


class CachedSplit(NamedTuple):
    """One split of the demonstrations with one base's states."""

    states: BaseStates
    tokenized: TokenizedDemonstrations


def open_cached_splits(
    config: TrainConfig,
    base: FrozenBase,
    splits: Mapping[str, TokenizedDemonstrations],
    chat_format: ChatFormat,
    *,
    data_name: str,
) -> dict[str, CachedSplit]:
    """Open the cached states of a base, or create them; checks what they were computed from.

    Args:
        config: of the run.
        base: the base.
        splits: the tokenised demonstrations by split.
        chat_format: how they were rendered.
        data_name: name of the stored demonstrations' folder.

    Returns:
        The states by split; empty if the base's config does not ask for them.

    Raises:
        StatesError: the stored states are stale; the message names each difference.
    """
    if not base.config.cache_states:
        return {}
    model = base.model
    root = epath.Path(config.data.data_dir) / "base_states" / folder_name(model.path) / data_name
    remembered = remembered_weights(config.data.data_dir, model.path)
    common = {
        "base weights": weights_fingerprint(model.local_folder, remembered=remembered),
        "base config": _digest(json.dumps(model.decoder.to_hf(), sort_keys=True).encode()),
        "base.param_dtype": base.config.param_dtype,
        "step.compute_dtype": config.step.compute_dtype,
        "tokenizer": model.info.fingerprint,
        "chat template": chat_format.fingerprint,
        "data.max_length": config.data.max_length,
    }
    return {
        name: CachedSplit(
            open_base_states(
                root / name,
                identity=common | {"demonstrations and tokens": tokenized.fingerprint},
                positions=tokenized.positions,
                width=model.decoder.hidden_size,
                dtype=config.step.compute_dtype,
            ),
            tokenized,
        )
        for name, tokenized in splits.items()
    }


def write_cached_states(
    config: TrainConfig,
    base: FrozenBase,
    splits: Sequence[CachedSplit],
    *,
    pad_id: int,
    mesh: Mesh,
) -> None:
    """Run a base over every dialogue whose states are not on disk; an interrupted pass resumes.

    Args:
        config: of the run.
        base: the base.
        splits: from `open_cached_splits`.
        pad_id: token id of the padding.
        mesh: the device mesh.

    Raises:
        OSError: there is not enough disk space; raised before the base is read.
    """
    missing = [(split, shard) for split in splits for shard in split.states.missing()]
    if not missing:
        return
    _announce(base, splits, missing=len(missing))
    place = place_base(config, base, mesh)
    params = load_base(base.model, base.config, place)
    program = _make_program(config, base, place, mesh)
    rows = config.step.batch_size // config.step.micro_batches
    started, console = time.perf_counter(), rich.get_console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("caching base states", total=len(missing))
        for split, shard in missing:
            found: dict[int, np.ndarray] = {}
            for packed, batch in _shard_batches(split, shard, rows=rows, pad_id=pad_id):
                states = np.asarray(program(params, place_batch(batch, mesh)))
                found |= _unpack(packed, states, split.tokenized.positions)
            split.states.write(shard, [found[dialogue] for dialogue in sorted(found)])
            progress.advance(task)
    seconds = time.perf_counter() - started
    logger.info("base %s: states written in %.0f s", base.model.path, seconds)


def _announce(base: FrozenBase, splits: Sequence[CachedSplit], *, missing: int) -> None:
    """Log how much will be written, and raise if the disk cannot hold it."""
    folder = splits[0].states.folder.parent
    total = sum(split.states.total_bytes for split in splits)
    share = missing / sum(len(split.states.shards) for split in splits)
    positions = sum(int(split.tokenized.positions.sum()) for split in splits)
    free = shutil.disk_usage(folder).free
    logger.info(
        "base %s: final hidden states of %s positions take %s in %s (%.0f%% exist already; %s "
        "free)",
        base.model.path,
        f"{positions:,}",
        _megabytes(total),
        folder,
        100 * (1 - share),
        _megabytes(free),
    )
    left = round(share * total)
    if left > free:
        raise OSError(
            f"{folder}: the cached states of {base.model.path} need {_megabytes(left)} more, but "
            f"only {_megabytes(free)} are free: free some space, set another data.data_dir, or "
            "cache_states = false"
        )


def _make_program(
    config: TrainConfig, base: FrozenBase, place: Placement, mesh: Mesh
) -> Callable[[Params, Batch], Array]:
    """(base parameters, batch [B T]) → final hidden states [B T D]."""
    network = frozen_network(config, base, mesh)

    def run(params: Params, batch: Any) -> Array:
        where = {"positions": batch.positions, "segment_ids": batch.segment_ids}
        return run_network(network, params, batch.tokens, **where)[0]

    rows = batch_sharding(mesh)
    return jax.jit(run, in_shardings=(place.shardings, rows), out_shardings=rows)


def _shard_batches(
    split: CachedSplit, shard: int, *, rows: int, pad_id: int
) -> Iterator[tuple[list[list[int]], Batch]]:
    """Batches over the dialogues of one file, and which dialogues are packed into each row."""
    first, end = split.states.shards[shard]
    tokenized = split.tokenized
    length = tokenized.sequence_length
    plan = pack(tokenized.positions[first:end], row_length=length, seed=0)
    for start in range(0, plan.rows, rows):
        stop = min(start + rows, plan.rows)
        packed = [(plan.row(row) + first).tolist() for row in range(start, stop)]
        packed += [[] for _ in range(rows - len(packed))]
        segments = [tokenized.segments(row) for row in packed]
        yield packed, lay_out_rows(segments, sequence_length=length, pad_id=pad_id)


def _unpack(
    packed: Sequence[Sequence[int]], states: np.ndarray, positions: np.ndarray
) -> dict[int, np.ndarray]:
    """Dialogue → its states, from packed rows."""
    found = {}
    for row, dialogues in zip(states, packed, strict=False):
        start = 0
        for dialogue in dialogues:
            end = start + int(positions[dialogue])
            found[dialogue] = row[start:end]
            start = end
    return found


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
