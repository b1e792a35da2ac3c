"""pass@k of the harness' code tasks; named by the YAML files beside it.

In: the tests of a problem, its samples. Out: the share of problems that k samples solve, estimated
without bias from n ≥ k samples.
"""

from collections.abc import Sequence


def pass_at_k(
    references: Sequence[str] | str, predictions: Sequence[Sequence[str]], k: Sequence[int]
) -> dict[str, float]:
    """Run one problem's samples against its tests, as the harness does.

    Args:
        references: the problem's tests.
        predictions: its samples, a list in a list.
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
