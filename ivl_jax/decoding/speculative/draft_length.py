"""How many tokens a draft should propose: what they bring against what they cost.

In: the networks' sizes, and how many of the latest proposals were kept. Out: the length of the next
block, chosen on device; 0 is plain decoding. Only speed depends on it, never what greedy decoding
generates nor the distribution that sampling draws from.

A round of k proposals costs k passes of the draft over two tokens a row and k + 1 of the value
networks over one, and one pass of the base over a block of k + 1. With every proposal kept with
probability a, it brings 1 + a + … + aᵏ tokens.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.composed.network import ComposedParams, Composition, Network
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params

BLOCK_WIDTHS = (1, 2, 4, 8)
"""Tokens that the base may read at once, the one before the proposals included."""
LONGEST = BLOCK_WIDTHS[-1] - 1
"""Proposals in a round, at most."""

# A draft is tried out as if this share of this many proposals had been kept.
_PRIOR_ACCEPTANCE = 0.75
_PRIOR_WEIGHT = 3.0
# What a proposal of the round before weighs beside one of this round: some 20 rounds count.
_MEMORY = 0.95
# Proposing has to promise this much: an estimate from 20 rounds is no better.
_LEAST_GAIN = 1.03


@dataclass(frozen=True)
class _Device:
    """What one pass of a network costs on a kind of device."""

    bandwidth: float
    """Bytes of weights a second that one row reads."""
    int8_byte: float
    """How many times as long a byte of an int8 kernel takes: it is made a float first."""
    layer_seconds: float
    """Seconds a layer takes whatever its size."""
    pass_seconds: float
    """Seconds a pass takes beside its layers: logits are composed, a token is chosen."""
    round_seconds: float
    """Seconds a round takes beside its passes where something is proposed."""
    rows: tuple[int, ...]
    """Rows multiplied at once…"""
    times: tuple[float, ...]
    """… and how many times as long that takes as one row."""

    def seconds(self, network: Network, params: Params, rows: int) -> float:
        """Seconds of a pass over so many tokens, all rows of the batch together."""
        arch = network.arch
        layers = arch.num_hidden_layers if isinstance(arch, ArchConfig) else 1
        slower = float(np.interp(rows, self.rows, self.times))
        if rows > self.rows[-1]:
            slower *= rows / self.rows[-1]
        fixed = layers * self.layer_seconds + self.pass_seconds
        return self._bytes_read(params) * slower / self.bandwidth + fixed

    def _bytes_read(self, params: Params) -> float:
        """Bytes that every pass reads, as if of floats; of an untied embedding few rows."""
        parts = {name: part for name, part in params.items() if name != "embed_tokens"}
        leaves = jax.tree.leaves(parts if "lm_head" in params else params)
        return sum(
            (
                leaf.size * (self.int8_byte if leaf.dtype == jnp.int8 else leaf.dtype.itemsize)
                for leaf in leaves
            ),
            0.0,
        )


# CPU: two cores, kernels (out, in), `python -m benchmarks speculative`; five to seven rows take as
# long as eight there; a step of a base in int8 takes 1 / 1.45 of the float32 one, `… int8`.
# Accelerators: memory decides until some 200 rows.
_CPU = _Device(
    bandwidth=20e9,
    int8_byte=2.7,
    layer_seconds=50e-6,
    pass_seconds=120e-6,
    round_seconds=450e-6,
    rows=(1, 2, 4, 8, 16, 32),
    times=(1.0, 1.25, 1.4, 1.65, 2.3, 3.6),
)
_ACCELERATOR = _Device(
    bandwidth=1.5e12,
    int8_byte=1.0,
    layer_seconds=20e-6,
    pass_seconds=20e-6,
    round_seconds=50e-6,
    rows=(1, 256),
    times=(1.0, 1.3),
)


def round_costs(
    composition: Composition, params: ComposedParams, *, batch: int
) -> Float[np.ndarray, " K"]:
    """What a round of 0, 1, … proposals costs.

    Args:
        composition: the static half, with a draft.
        params: the arrays, of which only the shapes are looked at.
        batch: rows decoded together.

    Returns:
        One cost for each of 0 … `LONGEST` proposals, beside 1 for none.
    """
    assert composition.draft is not None
    assert params.draft is not None
    device = _CPU if jax.default_backend() == "cpu" else _ACCELERATOR
    values = sum(
        device.seconds(network, own.params, batch)
        for network, own in zip(composition.values, params.values, strict=True)
    )
    draft = device.seconds(composition.draft, params.draft.params, 2 * batch)
    costs = [
        count * draft
        + (count + 1) * values
        + device.seconds(composition.base, params.base, batch * block_width(count))
        + (device.round_seconds if count else 0.0)
        for count in range(LONGEST + 1)
    ]
    return np.asarray(costs, np.float32) / np.float32(costs[0])


def block_width(count: int) -> int:
    """The smallest block that holds so many proposals and the token before them."""
    return next(width for width in BLOCK_WIDTHS if width > count)


def choose_length(
    costs: Float[np.ndarray, " K"],
    *,
    judged: Float[Array, " B"],
    accepted: Float[Array, " B"],
    running: Bool[Array, " B"],
) -> Int[Array, ""]:
    """Choose the number of proposals that brings most tokens for its cost.

    Args:
        costs: of `round_costs`.
        judged: [B] proposals of each row that were decided upon, later ones weighing more.
        accepted: [B] those of them that were kept.
        running: [B] the rows that count.

    Returns:
        0 … `LONGEST`.

    Example:
        >>> one = jnp.ones(1)
        >>> costs = np.asarray([1.0, 1.4, 1.9, 2.4], np.float32)
        >>> [
        ...     int(choose_length(costs, judged=99 * one, accepted=kept * one, running=one > 0))
        ...     for kept in (9.0, 60.0, 90.0)
        ... ]
        [0, 1, 3]
    """
    kept = jnp.sum(jnp.where(running, accepted, 0.0)) + _PRIOR_ACCEPTANCE * _PRIOR_WEIGHT
    acceptance = kept / (jnp.sum(jnp.where(running, judged, 0.0)) + _PRIOR_WEIGHT)
    powers = acceptance ** jnp.arange(len(costs), dtype=jnp.float32)
    gains = jnp.cumsum(powers) / costs
    best = jnp.argmax(gains).astype(jnp.int32)
    return jnp.where(jnp.max(gains) >= _LEAST_GAIN, best, jnp.int32(0))


def remember(before: Float[Array, " B"], latest: Int[Array, " B"]) -> Float[Array, " B"]:
    """Add a round's count to those before it, which fade.

    While nothing is proposed both counts of `choose_length` fade, until it tries the draft again.
    """
    return _MEMORY * before + latest.astype(jnp.float32)
