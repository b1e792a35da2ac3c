"""Which proposed tokens are accepted: the rule that makes speculative decoding lossless.

In: what was proposed, the logits that it was drawn from and those of the composition at the same
place, row by row. Out: whether each proposal is accepted, and what takes its place where it is not.
All functions are pure.

    greedy    a proposal is accepted where it is the composition's own arg-max
    sampled   a proposal x ~ q is accepted with probability min(1, p(x) / q(x)), and otherwise
              replaced by a draw from max(0, p − q), normalised

p and q are the distributions left by logit bias, temperature, top-k, top-p and min-p, so what comes
out is drawn from p, whatever q is; a proposer that says one token for certain has q = 1 there.

Source: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.
"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ivl_jax.decoding.device.sampling import Sampling, add_bias, filter_logits, likeliest


class _Draw(enum.IntEnum):
    """What a random number is for; folded into the row's key after the token index."""

    PROPOSAL = 1
    ACCEPTANCE = 2
    REPLACEMENT = 3


def propose(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    keys: Key[Array, " B"],
    token_indices: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, "B V"]]:
    """Choose a draft's next token for each row.

    Args:
        logits: [B V] float32 of the draft; −inf in padding columns.
        sampling: what each row asks for.
        keys: [B] one key per row, the same at every step.
        token_indices: [B] how many tokens the row has generated before this one.

    Returns:
        [B] int32 token ids, and the logits [B V] whose softmax is q; as they came where no row
        samples.
    """
    logits = add_bias(logits, sampling)
    greedy = likeliest(logits)
    is_sampled = sampling.temperature > 0

    def sampled() -> tuple[Int[Array, " B"], Float[Array, "B V"]]:
        q_logits = filter_logits(logits, sampling)
        drawn = _draw(_keys(keys, token_indices, _Draw.PROPOSAL), q_logits)
        return jnp.where(is_sampled, drawn, greedy), q_logits

    return jax.lax.cond(jnp.any(is_sampled), sampled, lambda: (greedy, logits))


def verify(
    proposals: Int[Array, " B"],
    q_logits: Float[Array, "B V"] | None,
    logits: Float[Array, "B V"],
    sampling: Sampling,
    keys: Key[Array, " B"],
    token_indices: Int[Array, " B"],
) -> tuple[Bool[Array, " B"], Int[Array, " B"]]:
    """Decide whether each row's proposal is accepted.

    Args:
        proposals: [B] what was proposed.
        q_logits: [B V] of `propose`; None: the proposals were certain.
        logits: [B V] float32 of the composition at the same place; −inf in padding columns.
        sampling: as in `propose`, like the rest.
        keys: [B] one key per row.
        token_indices: [B] how many tokens the row has generated before this one.

    Returns:
        [B] whether the proposal is accepted, and [B] the token for its place where it is not.
    """
    logits = add_bias(logits, sampling)
    best = likeliest(logits)
    is_sampled = sampling.temperature > 0

    def greedy() -> tuple[Bool[Array, " B"], Int[Array, " B"]]:
        return proposals == best, best

    def mixed() -> tuple[Bool[Array, " B"], Int[Array, " B"]]:
        p = jax.nn.softmax(filter_logits(logits, sampling), axis=-1)
        if q_logits is None:
            columns = jnp.arange(p.shape[-1], dtype=jnp.int32)[None, :]
            q = (columns == proposals[:, None]).astype(p.dtype)
        else:
            q = jax.nn.softmax(q_logits, axis=-1)
        p_chosen, q_chosen = (
            jnp.take_along_axis(each, proposals[:, None], axis=-1)[:, 0] for each in (p, q)
        )
        uniform = jax.vmap(jax.random.uniform)(_keys(keys, token_indices, _Draw.ACCEPTANCE))
        accepted = uniform * q_chosen < p_chosen
        residual = jnp.maximum(p - q, 0.0)
        # Equal but for rounding: then hardly anything is refused, and p is as good.
        has_mass = jnp.sum(residual, axis=-1, keepdims=True) > 0
        left = jnp.log(jnp.where(has_mass, residual, p))
        drawn = _draw(_keys(keys, token_indices, _Draw.REPLACEMENT), left)
        return (
            jnp.where(is_sampled, accepted, proposals == best),
            jnp.where(is_sampled, drawn, best),
        )

    return jax.lax.cond(jnp.any(is_sampled), mixed, greedy)


def _keys(keys: Key[Array, " B"], token_indices: Int[Array, " B"], draw: _Draw) -> Key[Array, " B"]:
    def one(key: Key[Array, ""], index: Int[Array, ""]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(key, index), int(draw))

    return jax.vmap(one)(keys, token_indices)


def _draw(keys: Key[Array, " B"], logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
