"""pass@k for the harness's code tasks; used by the YAML files in this folder.

In: the tests of a problem, its samples. Out: the unbiased estimate, from n ≥ k samples, of the
share of problems that k samples solve.
"""

from collections.abc import Sequence


def pass_at_k(
    references: Sequence[str] | str, predictions: Sequence[Sequence[str]], k: Sequence[int]
) -> dict[str, float]:
    """Run one problem's samples against its tests, like the harness.

    Args:
        references: the problem's tests.
        predictions: its samples, as a nested list.
        k: numbers of samples.

    Returns:
        `pass@k` → estimate, 0 to 1.

    Source:
        The estimator is that of arXiv 2107.03374, computed by the `code_eval` metric.
    """
    # Imported here: it downloads the metric, and refuses without HF_ALLOW_CODE_EVAL=1.
    from lm_eval.tasks.humaneval.utils import pass_at_k as of_the_harness

    tests = [references] if isinstance(references, str) else list(references)
    return of_the_harness(tests, [list(samples) for samples in predictions], list(k))
