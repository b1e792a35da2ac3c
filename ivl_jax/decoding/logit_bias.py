"""What requests add to the logits of tokens that they name, laid out for a batch.

In: the options of each row. Out: a `LogitBias` whose width is one of two, or None where no row has
any: the programs are then those of batches that never had one.
"""

from collections.abc import Sequence

import numpy as np

from ivl_jax.config import MOST_LOGIT_BIASES, GenerationOptions
from ivl_jax.decoding.device.sampling import LogitBias

# Most requests ban or favour a few tokens; each width compiles programs of its own.
_WIDTHS = (16, MOST_LOGIT_BIASES)


def lay_out_bias(options: Sequence[GenerationOptions | None], *, rows: int) -> LogitBias | None:
    """Lay out what each row adds to its logits.

    Args:
        options: of the first rows; None: the row continues nothing.
        rows: B.

    Returns:
        NumPy arrays; None: no row adds anything.

    Example:
        >>> options = [None, GenerationOptions(logit_bias={7: -100, 5: 1})]
        >>> bias = lay_out_bias(options, rows=2)
        >>> bias.token_ids[:, :3].tolist(), bias.biases[:, :3].tolist()
        ([[0, 0, 0], [5, 7, 0]], [[0.0, 0.0, 0.0], [1.0, -100.0, 0.0]])
    """
    each = [dict(option.logit_bias) if option else {} for option in options]
    most = max(map(len, each), default=0)
    if not most:
        return None
    width = next(width for width in _WIDTHS if width >= most)
    token_ids, biases = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.float32)
    for row, bias in enumerate(each):
        token_ids[row, : len(bias)] = list(bias.keys())
        biases[row, : len(bias)] = list(bias.values())
    return LogitBias(token_ids, biases)  # pyright: ignore[reportArgumentType]
