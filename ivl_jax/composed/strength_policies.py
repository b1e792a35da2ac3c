"""Strength policies: which share of the strengths α applies at each position.

    constant    all of α
    entropy     α · H / (H + s)     H: entropy of the base's prediction
    kl          α · s / (s + D)     D: KL(composition at α ‖ base)

H, D and the scale s in nats: half of α applies where H or D is s. `entropy` leaves the base alone
where it is sure, `kl` restrains value networks where they would change much. As s → 0 the first one
and as s → ∞ the second one becomes `constant`; in the other direction both become the base.

In: the base's logits and those of the composition at full strength, which are at hand wherever
logits are composed: no network runs again. Out: shares in [0, 1]. All functions are pure.
A policy is one function and one entry of `STRENGTH_POLICIES`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from ivl_jax.composed.distributions import entropy, kl_divergence
from ivl_jax.config import CONSTANT, StrengthPolicy


class PolicyInputs(NamedTuple):
    """What a policy may use."""

    base: Float32[Array, "B T V"]
    """Logits of the base (of a draft, where it proposes), −inf in padding columns."""
    composed: Float32[Array, "B T V"]
    """Logits of the composition at full strength, likewise."""
    scale: Float[Array, "#B 1"]
    """The policy's scale, nats."""


StrengthShare = Callable[[PolicyInputs], Float[Array, "B T"]]
"""The share of α that applies at each position, in [0, 1]."""


class PolicyRows(NamedTuple):
    """The rows of a batch that follow one policy."""

    applies: Bool[Array, "#B"]
    """Which rows; one for all, or one per row."""
    scale: Float[Array, "#B"]
    """The scale of each (nats); 1 in the others."""


RowPolicies = Mapping[str, PolicyRows]
"""Rows by the name of their policy; rows in none of them have all of α."""


def constant_share(inputs: PolicyInputs) -> Float[Array, "B T"]:
    """All of α."""
    return jnp.ones(inputs.base.shape[:-1], jnp.float32)


def entropy_share(inputs: PolicyInputs) -> Float[Array, "B T"]:
    """Nothing where the base is sure, more where it is not: H / (H + s).

    Example:
        >>> even = jnp.zeros((1, 1, 2))  # an entropy of log 2
        >>> entropy_share(PolicyInputs(even, even, jnp.log(jnp.array([[2.0]])))).tolist()
        [[0.5]]
    """
    uncertainty = entropy(inputs.base)
    return uncertainty / (uncertainty + inputs.scale)


def kl_share(inputs: PolicyInputs) -> Float[Array, "B T"]:
    """All of α where it changes nothing, less where it changes much: s / (s + D)."""
    # Rounding can make the divergence of equal distributions negative.
    change = jnp.maximum(kl_divergence(inputs.composed, inputs.base), 0.0)
    return inputs.scale / (inputs.scale + change)


STRENGTH_POLICIES: dict[str, StrengthShare] = {
    CONSTANT: constant_share,
    "entropy": entropy_share,
    "kl": kl_share,
}


def check_policy(policy: StrengthPolicy, *, where: str) -> None:
    """Refuse a policy that does not exist.

    Args:
        policy: as a command line or a request gives it.
        where: the flag or the field, for the message.

    Raises:
        ValueError: no such policy; lists those that there are.
    """
    if policy.name not in STRENGTH_POLICIES:
        raise ValueError(
            f"{where}: expected one of {', '.join(STRENGTH_POLICIES)}, got {policy.name!r:.100}"
        )


def rows_of(policy: StrengthPolicy) -> RowPolicies:
    """One policy for all rows of a batch; empty for the constant one, which computes nothing."""
    if policy.is_constant:
        return {}
    scale = jnp.asarray([policy.scale], jnp.float32)
    return {policy.name: PolicyRows(jnp.ones(1, bool), scale)}


def strength_shares(
    policies: RowPolicies, base: Float32[Array, "B T V"], composed: Float32[Array, "B T V"]
) -> Float32[Array, "B T"]:
    """The share of α that applies in each row at each position.

    Args:
        policies: rows by policy, none in two of them.
        base: logits of the base, −inf in padding columns.
        composed: logits of the composition at full strength, likewise.

    Returns:
        Shares; exactly 1 in the rows of no policy.
    """
    shares = jnp.ones(base.shape[:-1], jnp.float32)
    for name, rows in policies.items():
        one = STRENGTH_POLICIES[name](PolicyInputs(base, composed, rows.scale[:, None]))
        shares = jnp.where(rows.applies[:, None], one, shares)
    return shares
