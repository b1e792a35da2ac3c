"""Why a row cannot continue, as a sentence that names the networks to blame.

In: which networks' logits are finite in the row. Out: what is wrong, and the remedy.
"""

from collections.abc import Sequence

from ivl_jax.decoding.engine_model import EngineModel


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
