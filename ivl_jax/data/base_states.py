"""The frozen base's final hidden states of every dialogue, on disk, so that it runs only once.

In: a base's states of tokenised dialogues, one array per dialogue. Out: those arrays in the rows of
a batch. A dialogue's states depend only on its own tokens, since packed dialogues never attend to
each other; so they are valid for any packing and shuffling.

    FOLDER/
      states.json                 what the states were computed from, and how they are split
      00000-of-00012.arrayrecord  one record per dialogue: [positions, D], unrounded
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Float, Int64

from ivl_jax.json_files import read_json_object, write_json
from ivl_jax.text_files import MalformedFileError, shortened

_FORMAT = 1
_SHARD_BYTES = 1 << 27  # per file; an interrupted pass loses at most one file


class StatesError(ValueError):
    """Cached states that cannot be used: where, expected, found, remedy."""


class BaseStates:
    """One base's states of one split; made by `open_base_states`.

    Attributes:
        folder: where they are.
        total_bytes: their total size.
        shards: for each file, first and last + 1 of its dialogues.
    """

    def __init__(
        self, folder: epath.Path, positions: Int64[np.ndarray, "N"], *, width: int, dtype: str
    ):
        self.folder = folder
        self._positions = positions
        self._width = width
        self._dtype = jnp.dtype(dtype)
        self._source: ArrayRecordDataSource | None = None
        bytes_each = positions * (width * self._dtype.itemsize)
        self.total_bytes = int(bytes_each.sum())
        self.shards = _shards(bytes_each)

    def missing(self) -> list[int]:
        """List the files that are not yet written."""
        return [shard for shard in range(len(self.shards)) if not self._file(shard).exists()]

    def write(self, shard: int, states: Sequence[Float[np.ndarray, "_ D"]]) -> None:
        """Write one file atomically; a second writer of the same file is harmless.

        Args:
            shard: its index.
            states: of its dialogues in order, one row per position.

        Raises:
            ValueError: a dialogue's positions, width or dtype are not as expected.
        """
        first, end = self.shards[shard]
        for dialogue, array in zip(range(first, end), states, strict=True):
            expected = (int(self._positions[dialogue]), self._width)
            if array.shape != expected or array.dtype != self._dtype:
                raise ValueError(
                    f"states of dialogue {dialogue}: expected {self._dtype}{list(expected)}, got "
                    f"{array.dtype}{list(array.shape)}"
                )
        final = self._file(shard)
        unfinished = self.folder / f"{final.name}.{uuid.uuid4().hex}.unfinished"
        # One record per group, since they are read one by one. Floats do not compress.
        writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
        for array in states:
            writer.write(np.ascontiguousarray(array).tobytes())
        writer.close()
        unfinished.replace(final)
        if not self.missing():
            for left in self.folder.glob("*.unfinished"):
                left.unlink(missing_ok=True)

    def lay_out(
        self, rows: Sequence[Sequence[int]], *, row_length: int
    ) -> Float[np.ndarray, "B T D"]:
        """Arrange the states of dialogues in rows, like `lay_out_rows` does with their tokens.

        Args:
            rows: for each row, its dialogues.
            row_length: positions per row.

        Returns:
            The states; zeros for padding.

        Raises:
            StatesError: a file is missing or damaged.
        """
        batch = np.zeros((len(rows), row_length, self._width), self._dtype)
        wanted = [dialogue for row in rows for dialogue in row]
        records = iter(self._read(wanted))
        for index, row in enumerate(rows):
            start = 0
            for _ in row:
                states = np.frombuffer(next(records), self._dtype).reshape(-1, self._width)
                batch[index, start : start + len(states)] = states
                start += len(states)
        return batch

    def row_bytes(self, row_length: int) -> int:
        """Bytes of one row of a batch."""
        return row_length * self._width * self._dtype.itemsize

    def _read(self, dialogues: list[int]) -> Sequence[bytes]:
        try:
            if self._source is None:
                files = [str(self._file(shard)) for shard in range(len(self.shards))]
                source = ArrayRecordDataSource(files)
                if len(source) != len(self._positions):
                    raise RuntimeError(f"{len(source)} records, not {len(self._positions)}")
                self._source = source
            return self._source.__getitems__(dialogues) if dialogues else []
        # ArrayRecord's error names the damaged bytes, but no remedy.
        except (RuntimeError, ValueError, OSError) as error:
            raise StatesError(
                f"{self.folder}: cached base states cannot be read: {error}; delete the folder, "
                "and the next run writes them again"
            ) from error

    def _file(self, shard: int) -> epath.Path:
        return self.folder / f"{shard:05}-of-{len(self.shards):05}.arrayrecord"


def open_base_states(
    folder: epath.PathLike,
    *,
    identity: Mapping[str, str | int],
    positions: Int64[np.ndarray, "N"],
    width: int,
    dtype: str,
) -> BaseStates:
    """Open a folder of cached states, or create one; its states must match `identity`.

    Args:
        folder: a local folder.
        identity: what the states are a function of, name → fingerprint or setting.
        positions: positions of each dialogue: its tokens without the last.
        width: of a hidden state, D.
        dtype: `float32` or `bfloat16`.

    Returns:
        The states; files may be missing, see `BaseStates.missing`.

    Raises:
        StatesError: the folder is stale (names each difference), or it is not local.
    """
    folder = epath.Path(folder).expanduser()
    if "://" in str(folder):
        raise StatesError(f"{folder}: ArrayRecord writes local files: set a local data.data_dir")
    wanted = {"format": _FORMAT, "dtype": dtype, "width": width, **identity}
    record = folder / "states.json"
    if record.exists():
        found = _read_record(record)
        different = [
            f"{name}: {_shown(found.get(name))} in the cache, {_shown(value)} in this run"
            for name, value in wanted.items()
            if found.get(name) != value
        ]
        if different:
            raise StatesError(
                f"the cached base states in {folder} are stale, as {record.name} tells: "
                f"{'; '.join(different)}. Delete the folder to write them again, set another "
                "data.data_dir, or cache_states = false"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, wanted)
    return BaseStates(folder, positions, width=width, dtype=dtype)


def _read_record(path: epath.Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except MalformedFileError as error:
        raise StatesError(
            f"{error}; the cached base states beside it cannot be told from others: delete the "
            "folder, and the next run writes them again"
        ) from error


def _shards(bytes_each: Int64[np.ndarray, "N"]) -> list[tuple[int, int]]:
    """The consecutive dialogues of each file, about `_SHARD_BYTES` in total."""
    number = np.cumsum(bytes_each) // _SHARD_BYTES
    ends = [*(np.flatnonzero(np.diff(number)) + 1).tolist(), len(bytes_each)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _shown(value: Any) -> str:
    """The beginning of a SHA-256; anything else as in other messages."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else shortened(value)
