"""A run's figures on Weights & Biases.

In: figures of a step. Out: one W&B run per run directory, which a resume continues.
"""

import tempfile
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from etils import epath

from ivl_jax.paths import is_local, write_atomically
from ivl_jax.toml_files import read_toml
from ivl_jax.training.run_directory import CONFIG_FILE

_ID_FILE = "wandb_id"
_STEP = "step"


class WandbRun:
    """Logs scalars to a W&B run.

    Project, entity and mode are those of the environment (`WANDB_PROJECT`, `WANDB_ENTITY`,
    `WANDB_MODE`), the project `ivl_jax` if none is named.
    """

    def __init__(self, folder: epath.Path, *, first_step: int) -> None:
        """Start the W&B run, or continue the one of an earlier start.

        Args:
            folder: the run directory, which has its config.
            first_step: steps taken before this start.
        """
        # Imported here: it takes a second, and only a run with this tracker needs it.
        import wandb

        self._held = ExitStack()
        local = folder
        if not is_local(folder):
            scratch = tempfile.TemporaryDirectory(prefix="ivl_jax-wandb-")
            local = epath.Path(self._held.enter_context(scratch))
        id_file = folder / _ID_FILE
        if not id_file.exists():
            write_atomically(id_file, uuid.uuid4().hex[:8].encode())
        settings = wandb.Settings(silent=True, console="off")
        self._run: Any = wandb.init(
            project=settings.project or "ivl_jax",
            name=folder.name,
            id=id_file.read_text().strip(),
            resume="allow" if first_step else None,
            dir=str(local),
            config=read_toml(folder / CONFIG_FILE),
            settings=settings,
        )
        # A resume repeats steps after its checkpoint, which W&B's own step count would refuse.
        self._run.define_metric("*", step_metric=_STEP)

    def add(self, group: str, figures: Mapping[str, float], step: int) -> None:
        """Add scalars.

        Args:
            group: what precedes their names.
            figures: name → value.
            step: their step.
        """
        self._run.log({f"{group}/{name}": value for name, value in figures.items()} | {_STEP: step})

    def copy(self) -> None:
        """Nothing: W&B uploads by itself."""

    def close(self) -> None:
        """Upload what is left and finish."""
        with self._held:
            self._run.finish()
