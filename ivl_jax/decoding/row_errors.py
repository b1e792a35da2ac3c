"""Why a row cannot continue, as a sentence that names the networks to blame.

In: which networks' logits are finite in the row. Out: what is wrong, and the remedy.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from ivl_jax.decoding.engine_model import EngineModel, Places, Used


def row_errors(
    model: EngineModel,
    values: Places,
    failed: Mapping[int, Used],
    finite: Bool[np.ndarray, "B N"],
) -> dict[int, str]:
    """The errors of rows that cannot continue.

    Args:
        model: what the rows are decoded with.
        values: its value networks.
        failed: the rows, and what each of them uses.
        finite: of every row of the batch, as `row_error` takes them.

    Returns:
        A sentence per failed row.
    """
    errors = {}
    for place, used in failed.items():
        base, *each, composed = finite[place].tolist()
        # A network that the row does not use has read something else there.
        each = [
            flag or value not in used.strengths for flag, value in zip(each, values, strict=True)
        ]
        errors[place] = row_error(model, [base, *each, composed])
    return errors


def row_error(model: EngineModel, finite: Sequence[bool]) -> str:
    """The error of a row that cannot continue.

    Args:
        model: what the row is decoded with.
        finite: whether the logits are finite: the base's, each value network's, the composed ones.

    Returns:
        The sentence.
    """
    *networks, composed = finite
    guilty = [name for name, ok in zip(model.names, networks, strict=True) if not ok]
    if not guilty and not composed:
        return (
            "the logits of every network are finite, but not their weighted sum: expected smaller "
            "strengths; one that large leaves nothing of the base"
        )
    if not guilty:
        guilty = ["the draft" if model.composition.draft is not None else "the proposer"]
    return (
        f"the logits of {' and of '.join(guilty)} are not finite (NaN or infinite), so that no "
        "next token can be chosen: its weights hold such numbers, or overflow in this dtype; check "
        "the weights, or decode in float32"
    )
