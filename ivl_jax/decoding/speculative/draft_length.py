"""How many tokens should be proposed: what they bring against what they cost.

In: the networks' sizes, and how many of the latest proposals were accepted. Out: the length of the
next block, chosen on device; 0 is plain decoding. Only speed depends on it, never what greedy
decoding generates nor the distribution that sampling draws from.

A round of k proposals costs what the proposer takes for them, one pass of the base over a block of
k + 1, and one of the value networks, or k + 1 passes over one token where the proposer runs them.
Beside a value network with its own vocabulary these are k passes and one over the block. With every
proposal accepted with probability a, a round brings 1 + a + … + aᵏ tokens.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.composed.network import ComposedParams, Composition, Network, ValueArrays
from ivl_jax.decoding.device.proposals import BLOCK_WIDTHS, LONGEST, Proposer
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params

# A proposer is tried out as if this share of this many proposals had been accepted.
_PRIOR_ACCEPTANCE = 0.75
_PRIOR_WEIGHT = 3.0
# The weight of a proposal of the round before, where one of this round has 1: some 20 rounds count.
_MEMORY = 0.95
# The speed-up required before proposing: an estimate from 20 rounds is no more precise.
_LEAST_GAIN = 1.03


@dataclass(frozen=True)
class _Device:
    """What one pass of a network costs on a kind of device."""

    bandwidth: float
    """Bytes of weights a second that one row reads."""
    int8_byte: float
    """How many times as long a byte of an int8 kernel takes: it is made a float first."""
    layer_seconds: float
    """Seconds a layer takes regardless of its size."""
    pass_seconds: float
    """Seconds a pass takes besides its layers: logits are composed, a token is chosen."""
    round_seconds: float
    """Seconds a round with proposals takes besides its passes."""
    rows: tuple[int, ...]
    """Rows multiplied at once…"""
    times: tuple[float, ...]
    """… and how many times as long that takes as one row."""

    def seconds(self, network: Network, params: Params, rows: int) -> float:
        """Seconds of a pass over this many tokens, all rows of the batch together."""
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
    composition: Composition, params: ComposedParams, proposer: Proposer, *, batch: int
) -> Float[np.ndarray, " K"]:
    """Estimate what a round of 0, 1, … proposals costs.

    Args:
        composition: the static half.
        params: the arrays, of which only the shapes are looked at.
        proposer: where proposals come from.
        batch: rows decoded together.

    Returns:
        One cost for each of 0 … `LONGEST` proposals, relative to that of none.
    """
    device = _CPU if jax.default_backend() == "cpu" else _ACCELERATOR

    values = list(zip(composition.values, params.values, strict=True))
    run_ahead = [one for one in values if proposer.runs_values and not one[0].mapped]
    block_is_read = bool(composition.mapped) or not proposer.runs_values

    def passes(each: list[tuple[Network, ValueArrays]], rows: int) -> float:
        return sum((device.seconds(network, own.params, rows) for network, own in each), 0.0)

    def seconds(count: int) -> float:
        rows = batch * block_width(count)
        base = device.seconds(composition.base, params.base, rows)
        if not count:
            return base + passes(values, batch)
        proposing = count * proposer.seconds(composition, params, device.seconds, batch)
        reading = count * passes(run_ahead, batch)
        reading += passes(values, rows if block_is_read else batch)
        return proposing + reading + base + device.round_seconds

    costs = [seconds(count) for count in range(LONGEST + 1)]
    return np.asarray(costs, np.float32) / np.float32(costs[0])


def block_width(count: int) -> int:
    """The smallest block that holds this many proposals and the token before them."""
    return next(width for width in BLOCK_WIDTHS if width > count)


def choose_length(
    costs: Float[np.ndarray, " K"],
    *,
    proposed: Float[Array, " B"],
    accepted: Float[Array, " B"],
    available: Int[Array, " B"],
    running: Bool[Array, " B"],
) -> Int[Array, ""]:
    """Choose the number of proposals that brings most tokens for its cost.

    Args:
        costs: of `round_costs`.
        proposed: [B] proposals of each row that were verified, later ones weighing more.
        accepted: [B] those of them that were accepted.
        available: [B] how many tokens can be proposed for each row.
        running: [B] the rows that count.

    Returns:
        0 … `LONGEST`.

    Example:
        >>> one = jnp.ones(1)
        >>> costs = np.asarray([1.0, 1.4, 1.9, 2.4], np.float32)
        >>> [
        ...     int(
        ...         choose_length(
        ...             costs,
        ...             proposed=99 * one,
        ...             accepted=accepted * one,
        ...             available=jnp.full(1, 7),
        ...             running=one > 0,
        ...         )
        ...     )
        ...     for accepted in (9.0, 60.0, 90.0)
        ... ]
        [0, 1, 3]
    """
    successes = jnp.sum(jnp.where(running, accepted, 0.0)) + _PRIOR_ACCEPTANCE * _PRIOR_WEIGHT
    trials = jnp.sum(jnp.where(running, proposed, 0.0)) + _PRIOR_WEIGHT
    lengths = jnp.arange(len(costs), dtype=jnp.int32)
    reached = running[:, None] & (lengths[None, :] <= available[:, None])
    rows = jnp.maximum(jnp.sum(running), 1).astype(jnp.float32)
    share = jnp.sum(reached, axis=0).astype(jnp.float32) / rows
    powers = (successes / trials) ** lengths.astype(jnp.float32)
    gains = jnp.cumsum(powers * share) / costs
    best = jnp.argmax(gains).astype(jnp.int32)
    return jnp.where(jnp.max(gains) >= _LEAST_GAIN, best, jnp.int32(0))


def remember(before: Float[Array, " B"], latest: Int[Array, " B"]) -> Float[Array, " B"]:
    """Add a round's count to those before it, which fade.

    While nothing is proposed both counts of `choose_length` fade, until it tries the draft again.
    """
    return _MEMORY * before + latest.astype(jnp.float32)
