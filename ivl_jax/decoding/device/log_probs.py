"""Log-probabilities of generated tokens, on device: of the token itself and of the likeliest ones.

In: composed logits, the tokens that were chosen from them. Out: `LogProbs`, in nats, of the
composed distribution as it is: before logit bias, temperature, top-k, top-p and min-p.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ivl_jax.composed.token_scores import candidate_scores
from ivl_jax.decoding.device.state import LogProbs


def empty_log_probs(rows: int, places: int, *, top: int) -> LogProbs:
    """Room for log-probabilities.

    Args:
        rows: B.
        places: slots of a row, or places of a block.
        top: likeliest tokens kept for each, K.

    Returns:
        Zeros.
    """
    shape = (rows, places)
    return LogProbs(
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, top), jnp.int32),
        jnp.zeros((*shape, top), jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )


def score_chosen(
    logits: Float[Array, "B V"],
    base_logits: Float[Array, "B V"],
    tokens: Int[Array, " B"],
    *,
    top: int,
) -> LogProbs:
    """Score one generated token per row.

    Args:
        logits: [B V] float32 composed logits; −inf in padding columns.
        base_logits: [B V] float32 logits of the base alone, anything in padding columns.
        tokens: [B] what was chosen.
        top: likeliest tokens to keep, K ≤ V.

    Returns:
        Log-probabilities of one place, [B 1] and [B 1 K]; −inf where there are no more tokens.
    """
    # Ties are broken by the lowest id, as greedy decoding breaks them.
    ids = jax.lax.top_k(logits, top)[1]
    candidates = jnp.concatenate([tokens[:, None], ids], axis=1)
    scores, _ = candidate_scores(logits, candidates)
    base = jnp.where(jnp.isneginf(logits), -jnp.inf, base_logits)
    alone, _ = candidate_scores(base, tokens[:, None])
    return LogProbs(scores[:, :1], ids[:, None], scores[:, None, 1:], alone)


def latest_log_probs(held: LogProbs, starts: Int[Array, " B"], *, width: int) -> LogProbs:
    """Pick what was generated lately, so that the host fetches no more than that.

    Args:
        held: of a state, [B S] and [B S K].
        starts: [B] first slot to fetch of each row.
        width: slots from there on, W.

    Returns:
        [B W] and [B W K]; arbitrary beyond the last slot.
    """
    slots = starts[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]

    def picked(array: Array) -> Array:
        where = slots.reshape(*slots.shape, *[1] * (array.ndim - 2))
        return jnp.take_along_axis(array, where, axis=1, mode="clip")

    return jax.tree.map(picked, held)
