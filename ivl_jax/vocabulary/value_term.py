"""One summand of a composition, α · M(z_value), over the columns of the base's vocabulary.

In: a value network's logits over its own vocabulary. Out: the summand for each column of the
base's logits. All functions are pure.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from ivl_jax.vocabulary.mapping import VocabularyMap, apply_vocabulary_map


class ValueTerm(NamedTuple):
    """One summand α · M(z_value) of a composition."""

    logits: Float[Array, "B T Vv"]
    """z_value, padding columns included."""
    strength: Float[Array, "#B"] | Float[Array, "B T"]
    """α: one for the batch, per row or per position; 0 adds nothing, whatever the logits are."""
    vocab_size: int
    """Number of real tokens of the value's tokenizer; later columns count as 0."""
    unknown_ids: Int[Array, " U"] | None = None
    """Base ids that the value network does not know; their value logit counts as 0."""
    vocabulary_map: VocabularyMap | None = None
    """M: maps the value's logits to the base's vocabulary; None where the two share one."""
    centred: bool = False
    """Whether to centre the value logits before they are mapped; no effect without a map."""


def real_columns(width: int, vocab_size: int) -> Bool[Array, "1 1 V"]:
    """Which of `width` logit columns are real tokens; later columns are padding."""
    return (jnp.arange(width) < vocab_size)[None, None, :]


def in_base_columns(term: ValueTerm, width: int) -> Float32[Array, "B T Vb"]:
    """What a term adds to a base's logits; 0 for tokens that the value network does not know.

    Args:
        term: the summand.
        width: columns of the base's logits, Vb.

    Returns:
        α · M(z_value), [B T Vb] in float32.

    Raises:
        ValueError: the term's `vocab_size` exceeds its columns.
    """
    columns = term.logits.shape[-1]
    if term.vocab_size > columns:
        raise ValueError(
            f"a value term has vocab_size = {term.vocab_size}, but only {columns} columns"
        )
    logits = term.logits.astype(jnp.float32)
    if term.vocabulary_map is not None:
        logits = apply_vocabulary_map(logits, term.vocabulary_map, centred=term.centred)
    elif term.vocab_size < columns:
        logits = jnp.where(real_columns(columns, term.vocab_size), logits, 0.0)
    missing = width - logits.shape[-1]
    if missing > 0:
        logits = jnp.pad(logits, ((0, 0), (0, 0), (0, missing)))
    elif missing < 0:
        logits = logits[..., :width]
    if term.unknown_ids is not None:
        logits = logits.at[..., term.unknown_ids].set(0.0)
    strength = term.strength.astype(jnp.float32)
    strength = strength[:, None, None] if strength.ndim == 1 else strength[:, :, None]
    return jnp.where(strength == 0, 0.0, strength * logits)
