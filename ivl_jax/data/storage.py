"""Stores demonstrations as a TFDS dataset in ArrayRecord form.

In: demonstrations by split. Out: a folder that TFDS reads, and random access to each split. Needs
no TensorFlow, neither for writing nor for reading.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.utils import tqdm_utils

from ivl_jax.data.formats import Demonstration, Message, UntrainedMessage

_BAR_FROM_ROWS = 50_000  # show TFDS's progress bar from here on: about five seconds of writing


class IvlDemonstrations(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes demonstrations in the order of their source; not part of the TFDS catalogue."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        splits: Mapping[str, Callable[[], Iterator[Demonstration]]],
        *,
        in_pairs: bool,
        **options: Any,
    ):
        self._splits = splits
        self._in_pairs = in_pairs
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        turns = {"role": text(), "content": text(), "weight": np.int64}
        dialogues = ("messages", "rejected") if self._in_pairs else ("messages",)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Dialogues to learn from, each with the file and line it came from.",
            features=tfds.features.FeaturesDict(
                {
                    "row_id": text(),
                    **{name: tfds.features.Sequence(turns) for name in dialogues},
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {name: self._generate_examples(rows()) for name, rows in self._splits.items()}

    def _generate_examples(self, rows: Iterator[Demonstration]) -> Iterator[tuple[int, Any]]:
        for index, row in enumerate(rows):
            stored: dict[str, Any] = {"row_id": row.row_id, "messages": _to_records(row.messages)}
            if self._in_pairs:
                stored["rejected"] = _to_records(row.rejected)
            yield index, stored


class DemonstrationSplit(Sequence[Demonstration]):
    """Random access to one split of a stored dataset, through TFDS's data source.

    Attributes:
        fingerprint: Identifies content, format and split rule of the source, and the split.
    """

    def __init__(self, folder: epath.Path, split: str, *, fingerprint: str):
        with _quiet_tfds():
            builder: Any = tfds.builder_from_directory(str(folder))
            self._source = builder.as_data_source(split)
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        """Returns one demonstration, or a list of them for a slice."""
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"demonstration {index} of {len(self)}")
        return _demonstration(self._source[int(index) % len(self)])

    def __getitems__(self, indices: Sequence[int]) -> list[Demonstration]:
        """Returns several demonstrations, read together."""
        return [_demonstration(row) for row in self._source.__getitems__(list(indices))]


def write_dataset(
    splits: Mapping[str, Callable[[], Iterator[Demonstration]]],
    *,
    folder: epath.Path,
    rows: int,
    in_pairs: bool = False,
) -> None:
    """Writes a dataset.

    Args:
        splits: Split name to a function that yields its demonstrations; no split is empty.
        folder: Where TFDS will find it; must not exist.
        rows: Total number of demonstrations; for many, a progress bar is shown.
        in_pairs: Whether they are preferences, of two dialogues each.
    """
    scratch = folder.parent / f"{folder.name}-scratch"
    config = tfds.core.BuilderConfig(name="rows", version=IvlDemonstrations.VERSION)
    tqdm_utils.display_progress_bar(rows >= _BAR_FROM_ROWS)
    try:
        with _quiet_tfds():
            builder = IvlDemonstrations(
                splits,
                in_pairs=in_pairs,
                data_dir=str(scratch),
                file_format="array_record",
                config=config,
            )
            builder.download_and_prepare()
        epath.Path(builder.data_dir).rename(folder)
        scratch.rmtree()
    finally:
        tqdm_utils.display_progress_bar(enable=True)


def dataset_folder(data_dir: epath.Path, name: str) -> epath.Path:
    """Returns the folder of one dataset among all stored ones."""
    return data_dir / "ivl_demonstrations" / name / str(IvlDemonstrations.VERSION)


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Suppresses TFDS's messages about catalogue datasets, such as downloads of unknown size."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _to_records(turns: Sequence[Message]) -> list[dict[str, Any]]:
    return [{**turn._asdict(), "weight": turn.weight} for turn in turns]


def _demonstration(row: Mapping[str, Any]) -> Demonstration:
    return Demonstration(
        messages=_to_messages(row["messages"]),
        row_id=np.asarray(row["row_id"]).item().decode(),
        rejected=_to_messages(row["rejected"]) if "rejected" in row else (),
    )


def _to_messages(turns: Mapping[str, Any]) -> tuple[Message, ...]:
    return tuple(
        (Message if weight else UntrainedMessage)(role.decode(), content.decode())
        for role, content, weight in zip(
            turns["role"], turns["content"], turns["weight"], strict=True
        )
    )
