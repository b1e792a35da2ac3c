"""The page of all experiments: the matrix's, then the section of each study that has a record.

In: figures of the matrix, the folder of the pages and records. Out: `experiments.md`, `results.md`
and their figures.
"""

from collections.abc import Sequence
from pathlib import Path

from ivl_jax.experiments.baselines.report import update_page as update_baselines
from ivl_jax.experiments.figures_by_seed import Figures
from ivl_jax.experiments.lifts.report import update_page as update_lifts
from ivl_jax.experiments.post_training.report import update_page as update_post_training
from ivl_jax.experiments.real.report import update_real_section
from ivl_jax.experiments.transfer.report import write_report


def write_page(figures: Figures, docs: Path, *, seeds: Sequence[int]) -> None:
    """Write the page anew.

    Args:
        figures: As for `transfer.report.write_report`, like the others.
        docs: Folder of the pages, and of the records of the other studies.
        seeds: Of the trainings.

    Raises:
        NotesError: A claim of the notes does not hold for these figures.
    """
    write_report(figures, docs, seeds=seeds)
    for update in (update_post_training, update_baselines, update_lifts, update_real_section):
        update(docs)
