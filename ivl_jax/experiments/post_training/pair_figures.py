"""How well a model tells the right answer of a pair from the wrong one.

In: pairs and the log-probabilities of their answers. Out: shares of pairs, in total and by what is
wrong about the wrong answer.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float


def pair_figures(
    pairs: Sequence[Mapping[str, str]],
    persons: Mapping[str, str],
    log_prob: Float[np.ndarray, "P 2"],
    base_log_prob: Float[np.ndarray, "P 2"],
) -> dict[str, int | float]:
    """Figures of pairs.

    A wrong answer that names the right person has the value wrong, which only a model that knows
    the fact can tell; one that names another person can be told from the question alone.

    Args:
        pairs: Rows with `prompt`, `chosen` and `rejected`.
        persons: Question → the person whom it is about.
        log_prob: Of the chosen and of the rejected answer, nats.
        base_log_prob: The same of the base alone.

    Returns:
        `pairs`, their number; `pair_accuracy`, the share in which the right answer gained more over
        the base than the wrong one; `pair_margin`, by how much, nats; `pair_order`, the share in
        which the right answer is the more likely one. If there are pairs of both kinds,
        `pair_share_value`, the share whose wrong answer names the right person, and the accuracies
        in these, `pair_accuracy_value`, and in the others, `pair_accuracy_person`.

    Example:
        >>> rows = [{"prompt": "Q", "chosen": "Ann sings.", "rejected": f"{who} paints."}
        ...     for who in ("Ann", "Bob")]
        >>> gains = np.array([[0.0, 1.0], [1.0, 0.0]])
        >>> found = pair_figures(rows, {"Q": "Ann"}, gains, np.zeros((2, 2)))
        >>> found["pair_accuracy"], found["pair_accuracy_value"], found["pair_accuracy_person"]
        (0.5, 0.0, 1.0)
    """
    gain = log_prob - base_log_prob
    margin = gain[:, 0] - gain[:, 1]
    found = {
        "pairs": len(pairs),
        "pair_accuracy": float(np.mean(margin > 0)),
        "pair_margin": float(np.mean(margin)),
        "pair_order": float(np.mean(log_prob[:, 0] > log_prob[:, 1])),
    }
    same = np.array([persons[pair["prompt"]] in pair["rejected"] for pair in pairs])
    if same.any() and not same.all():
        found["pair_share_value"] = float(np.mean(same))
        found["pair_accuracy_value"] = float(np.mean(margin[same] > 0))
        found["pair_accuracy_person"] = float(np.mean(margin[~same] > 0))
    return found
