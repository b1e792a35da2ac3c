"""The recorded fine-tunings of the embedded family: chosen settings with their test figures.

In: `assets/family/finetuned_MODEL.json`, which `python -m ivl_jax.experiments.finetune_sweep`
writes when the search for a model has ended. Out: `Reference`s. The demo shows them, and the
experiments divide by them.
"""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ivl_jax.assets import family_folder
from ivl_jax.experiments.finetune.settings import Criterion, Model, Setting


class Reference(NamedTuple):
    """A model's best fine-tuning by one criterion."""

    setting: Setting
    """With the first seed."""
    tests: Mapping[int, Mapping[str, float]]
    """Seed → `nll` (nats per answer token of all test items), `fact_nll`, `docstring_nll`,
    `exact_match` on facts and `validation_nll`; of L-continued also `new_exact_match`."""
    tried: int
    """Runs among which it was chosen, other seeds left out."""

    def mean(self, figure: str) -> float:
        """A test figure's mean over seeds."""
        return statistics.fmean(test[figure] for test in self.tests.values())


def record_file(model: Model) -> Path:
    """Where the references of a model are recorded."""
    return family_folder("L").parent / f"finetuned_{model}.json"


def read_reference(
    model: Model, criterion: Criterion = "nll", *, items_sha256: str | None = None
) -> Reference | None:
    """Read a recorded reference.

    Args:
        model: Whose fine-tuning.
        criterion: What it was chosen by, on validation.
        items_sha256: Of the test items that its figures have to be about; None: of any.

    Returns:
        The reference; None if there is none, or only one that was measured on other items.
    """
    file = record_file(model)
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if criterion not in record["chosen"]:
        return None
    if items_sha256 not in (None, record["test_items_sha256"]):
        return None
    chosen = record["chosen"][criterion]
    tests = {test["seed"]: test for test in chosen["test"]}
    return Reference(Setting(**chosen["setting"]), tests, record["tried"])
