"""What only some requests ask for, laid out for a batch: logit bias and strength policies.

In: the options of each row. Out: arrays that a state has only where a row asks for them: the
programs are otherwise those of batches that never had any. A state has them only while tokens are
generated for it, since the host knows what each row asks for: rows are moved without them.
"""

from collections.abc import Sequence

import numpy as np

from ivl_jax.composed.strength_policies import PolicyRows, RowPolicies
from ivl_jax.config import FULL_STRENGTH, GenerationOptions
from ivl_jax.decoding.device.state import DecodeState
from ivl_jax.decoding.logit_bias import lay_out_bias


def lay_out_policies(
    options: Sequence[GenerationOptions | None], *, rows: int
) -> RowPolicies | None:
    """Lay out the strength policies of rows.

    Args:
        options: of the first rows; None: the row continues nothing.
        rows: B.

    Returns:
        NumPy arrays by policy; None: every row has constant strengths.

    Example:
        >>> from ivl_jax.config import StrengthPolicy
        >>> options = [None, GenerationOptions(policy=StrengthPolicy("kl", scale=3.0))]
        >>> rows = lay_out_policies(options, rows=2)["kl"]
        >>> rows.applies.tolist(), rows.scale.tolist()
        ([False, True], [1.0, 3.0])
    """
    policies = [(option and option.policy) or FULL_STRENGTH for option in options]
    names = sorted({policy.name for policy in policies if not policy.is_constant})
    found = {}
    for name in names:
        applies, scale = np.zeros(rows, bool), np.ones(rows, np.float32)
        for row, policy in enumerate(policies):
            if policy.name == name:
                applies[row], scale[row] = True, policy.scale
        found[name] = PolicyRows(applies, scale)  # pyright: ignore[reportArgumentType]
    return found or None


def with_extras(state: DecodeState, options: Sequence[GenerationOptions | None]) -> DecodeState:
    """Give a state what some of its rows ask for.

    Args:
        state: B rows.
        options: of each row; None: it continues nothing.

    Returns:
        The state, for one program; `without_extras` takes it out of the result.
    """
    requests, rows = state.requests, len(options)
    sampling = requests.sampling._replace(bias=lay_out_bias(options, rows=rows))
    policies = lay_out_policies(options, rows=rows)
    return state._replace(requests=requests._replace(sampling=sampling, policies=policies))


def without_extras(state: DecodeState) -> DecodeState:
    """Take what only some rows ask for out of a state."""
    return with_extras(state, ())
