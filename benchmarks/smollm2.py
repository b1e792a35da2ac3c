"""SmolLM2-135M-Instruct, for benchmarks whose figures depend on what a real model writes.

In: `SMOLLM2_FOLDER`, the environment variable that names its folder. Out: the folder, or why there
is none.
"""

import os
from pathlib import Path

from ivl_jax.weights.hf_folder import SINGLE_FILE

_VARIABLE = "SMOLLM2_FOLDER"
NO_FOLDER = (
    f"{_VARIABLE} does not name a folder of SmolLM2-135M-Instruct, a model whose text random "
    "weights cannot stand in for; `python ../shared/tools/smollm2.py FOLDER` makes one"
)
"""Why a benchmark is skipped without it."""


def find_folder() -> Path | None:
    """The model's folder; None: the variable is not set, or no weights are there."""
    given = os.environ.get(_VARIABLE, "")
    return Path(given) if given and (Path(given) / SINGLE_FILE).is_file() else None
