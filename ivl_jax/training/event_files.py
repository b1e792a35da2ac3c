"""A run's TensorBoard events, local or copied to an object store.

In: figures of a step. Out: event files in the run directory. Event files are appended to, which an
object store cannot do: there, they are written locally and copied as a whole when flushed.
"""

import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from etils import epath

from ivl_jax.folder_copies import copy_files, file_names
from ivl_jax.paths import is_local

_NOT_IN_A_TAG = re.compile(r"[^-/\w.]")


class EventFiles:
    """Writes scalars to one folder of event files."""

    def __init__(self, folder: epath.Path, *, first_step: int) -> None:
        """Open a new event file.

        Args:
            folder: where TensorBoard finds it.
            first_step: steps taken before; later events of earlier starts are hidden.
        """
        # Imported here: protobuf takes a third of a second to import, and only a run needs it.
        from tensorboardX import SummaryWriter

        self._folder = folder
        self._held = ExitStack()
        self._local = folder
        if not is_local(folder):
            scratch = tempfile.TemporaryDirectory(prefix="ivl_jax-events-")
            self._local = epath.Path(self._held.enter_context(scratch))
        # Events of steps that a killed process took after its last checkpoint are hidden.
        purge_step = first_step + 1 if first_step else None
        self._writer: Any = SummaryWriter(str(self._local), purge_step=purge_step)

    def add(self, group: str, figures: Mapping[str, float], step: int) -> None:
        """Add scalars, which a local TensorBoard shows at once.

        Args:
            group: what precedes their names.
            figures: name → value.
            step: their step.
        """
        for name, value in figures.items():
            # A reward's name may have a colon, which TensorBoard's names may not.
            tag = _NOT_IN_A_TAG.sub("_", f"{group}/{name}")
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def copy(self) -> None:
        """Copy what has been added to an object store; nothing to do for a local folder."""
        if self._local != self._folder:
            copy_files(self._local, self._folder, file_names(self._local))

    def close(self) -> None:
        """Write what is left and close."""
        with self._held:
            self._writer.close()
            self.copy()
