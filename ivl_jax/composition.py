"""Inverse value learning itself: how a value network joins a base model. Read this first.

In: logits of a base model, logits of any number of value networks. Out: the composed logits, the
value logits of each connection scheme, and the penalty on their size. All functions are pure.

    z_value = value(x)                              residual
    z_value = value(emb(x) + softmax(z_base) · E)   cascade
    z_value = value(softmax(z_base) · E)            cascade_no_text
    z_value = z_base · A, or z_base · D · A         linear (a baseline: D and A are matrices)
    z       = z_base + Σ_i α_i · M_i(z_value_i)       M_i a vocabulary map; mostly the identity

Source: arXiv 2410.21027, section 3. The authors' code adds in bfloat16; we compose in float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.config import Connection, PenaltyKind
from ivl_jax.model.decoder import (
    Constrain,
    Params,
    embed,
    embed_probabilities,
    hidden_states,
    logits_from_hidden,
)
from ivl_jax.model.kv_cache import KVCache
from ivl_jax.model.linear_map import linear_map_hidden
from ivl_jax.vocabulary.mapping import VocabularyMap, apply_vocabulary_map


class ValueTerm(NamedTuple):
    """One summand α · M(z_value) of a composition."""

    logits: Float[Array, "B T Vv"]
    """Value logits, one column an output row of the value network (padding rows included)."""
    strength: Float[Array, "#B"]
    """α: one for the batch, or one a row."""
    vocab_size: int
    """Columns that are real tokens of the value's tokenizer; those after them count as 0."""
    unknown_ids: Int[Array, " U"] | None = None
    """Ids of the base that mean something else to the value; their value logit counts as 0."""
    vocabulary_map: VocabularyMap | None = None
    """M: reads the value's logits in the base's vocabulary; None where the two share theirs."""
    centred: bool = False
    """Centre the value logits before they are mapped; without a map, nothing."""


def compose_logits(
    base_logits: Float[Array, "B T Vb"], value_terms: Sequence[ValueTerm], *, vocab_size: int
) -> Float[Array, "B T Vb"]:
    """Add value logits to base logits, and mask what is no token, once, after the sum.

    Args:
        base_logits: [B T Vb], any float dtype; the sum is computed in float32.
        value_terms: the summands; an empty sequence gives the base alone. Their widths may differ
            from Vb: tokens a value does not know get the value logit 0. A term with a vocabulary
            map has the columns of its own vocabulary; unmapped tokens get 0.
        vocab_size: number of real tokens of the base's tokenizer (tokens); the columns from there
            to Vb are padding.

    Returns:
        Composed logits [B T Vb] in float32, −inf in the padding columns.

    Raises:
        ValueError: `vocab_size` exceeds Vb, or a term's `vocab_size` exceeds its columns.

    Source:
        arXiv 2410.21027, section 3 (one value, α = 1). Sums over several values, strengths a row
        and negative strengths are the same expression; so is proxy-tuning (arXiv 2401.08565), whose
        two terms are a tuned and an untuned model with the strengths α and −α.

    Example:
        Three tokens and a padded row; the value knows the first two tokens only.

        >>> import jax.numpy as jnp
        >>> base = jnp.array([[[1.0, 2.0, 3.0, 9.0]]])
        >>> value = ValueTerm(jnp.array([[[10.0, 20.0]]]), jnp.array([0.5]), vocab_size=2)
        >>> compose_logits(base, [value], vocab_size=3).tolist()
        [[[6.0, 12.0, 3.0, -inf]]]
    """
    width = base_logits.shape[-1]
    if vocab_size > width:
        raise ValueError(
            f"vocab_size = {vocab_size} real tokens, but the base has only {width} output rows"
        )
    logits = base_logits.astype(jnp.float32)
    for term in value_terms:
        logits += term.strength[:, None, None].astype(jnp.float32) * _columns(term, width)
    return jnp.where(_real_columns(width, vocab_size), logits, -jnp.inf)


def value_hidden(
    connection: Connection,
    graphdef: nnx.GraphDef,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    base_logits: Float[Array, "B T Vb"] | None,
    vocab_size: int,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
    constrain: Constrain | None = None,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Run the value network under a connection scheme, up to its head.

    Args:
        connection: `residual`, `cascade`, `cascade_no_text` or `linear`.
        graphdef: static part of the value network: a decoder, or with `linear` a linear map.
        params: its parameters.
        tokens: [B T] token ids.
        base_logits: [B T Vb] of the base at the same positions; the residual scheme reads only the
            text and needs none.
        vocab_size: real tokens of the base's tokenizer; padding columns of `base_logits` never
            enter the softmax of a cascade, nor a linear map.
        positions: [B T] position of each token, and its slot in `cache`.
        segment_ids: [B T], 0 is padding; None is one segment a row.
        cache: the value network's own cache, or None.
        constrain: sharding constraint for activations, or None.

    Returns:
        Hidden states [B T D] for `logits_from_hidden`, and the cache with this call's keys and
        values (None without one).

    Raises:
        ValueError: any scheme but the residual one without `base_logits`.

    Source:
        arXiv 2410.21027, section 3.2. In the cascades the prediction made at position t enters the
        value's input at position t. `linear` is the paper's linear probe on logits.
    """
    input_embeddings = None
    if connection != "residual":
        if base_logits is None:
            raise ValueError(f"the connection scheme {connection} reads base_logits, got None")
        if connection == "linear":
            real = _real_columns(base_logits.shape[-1], vocab_size)
            return linear_map_hidden(graphdef, params, jnp.where(real, base_logits, 0.0)), cache
        probabilities = _probabilities(base_logits, vocab_size)
        input_embeddings = embed_probabilities(graphdef, params, probabilities)
        if connection == "cascade":
            input_embeddings += embed(graphdef, params, tokens)
    return hidden_states(
        graphdef,
        params,
        tokens if input_embeddings is None else None,
        positions=positions,
        segment_ids=segment_ids,
        cache=cache,
        input_embeddings=input_embeddings,
        constrain=constrain,
    )


def value_forward(
    connection: Connection,
    graphdef: nnx.GraphDef,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    base_logits: Float[Array, "B T Vb"] | None,
    vocab_size: int,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
    constrain: Constrain | None = None,
) -> tuple[Float[Array, "B T Vv"], KVCache | None]:
    """Run the value network under a connection scheme, head included.

    Args:
        connection: as in `value_hidden`, like every other argument.
        graphdef: static part of the value network's decoder.
        params: its parameters.
        tokens: [B T] token ids.
        base_logits: [B T Vb] of the base at the same positions; unused by the residual scheme.
        vocab_size: real tokens of the base's tokenizer.
        positions: [B T] position of each token, and its slot in `cache`.
        segment_ids: [B T], 0 is padding; None is one segment a row.
        cache: the value network's own cache, or None.
        constrain: sharding constraint for activations, or None.

    Returns:
        Value logits [B T Vv] in float32, and the cache (None without one).
    """
    hidden, cache = value_hidden(
        connection,
        graphdef,
        params,
        tokens,
        base_logits=base_logits,
        vocab_size=vocab_size,
        positions=positions,
        segment_ids=segment_ids,
        cache=cache,
        constrain=constrain,
    )
    return logits_from_hidden(graphdef, params, hidden), cache


def value_penalty(
    value_logits: Float[Array, "B T Vv"],
    token_mask: Bool[Array, "B T"],
    *,
    kind: PenaltyKind,
    vocab_size: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over tokens of the mean over the vocabulary of |z_value| or z_value².

    Args:
        value_logits: [B T Vv].
        token_mask: [B T], the tokens that count.
        kind: `l1`, `l2`, or `none` (the sum is 0).
        vocab_size: real columns; padding columns do not count.

    Returns:
        The sum and its denominator, the number of tokens that count. Their quotient over the global
        batch is the penalty, in logits (`l1`) or squared logits (`l2`).

    Source:
        arXiv 2410.21027, section 3.3. The authors' code averages over all positions, padding and
        prompt included: pass a mask of ones for that.

    Example:
        >>> import jax.numpy as jnp
        >>> z = jnp.array([[[1.0, -3.0, 99.0], [5.0, 5.0, 5.0]]])
        >>> total, count = value_penalty(z, jnp.array([[True, False]]), kind="l1", vocab_size=2)
        >>> (float(total), float(count))
        (2.0, 1.0)
    """
    count = jnp.sum(token_mask, dtype=jnp.float32)
    if kind == "none":
        return jnp.zeros((), jnp.float32), count
    magnitude = jnp.abs(value_logits) if kind == "l1" else jnp.square(value_logits)
    real = _real_columns(value_logits.shape[-1], vocab_size)
    per_token = jnp.sum(jnp.where(real, magnitude, 0.0), axis=-1) / vocab_size
    return jnp.sum(jnp.where(token_mask, per_token, 0.0)), count


def _real_columns(width: int, vocab_size: int) -> Bool[Array, "1 1 V"]:
    return (jnp.arange(width) < vocab_size)[None, None, :]


def _columns(term: ValueTerm, width: int) -> Float[Array, "B T V"]:
    """The term's logits over the base's columns, 0 where the value knows no such token."""
    if term.vocab_size > term.logits.shape[-1]:
        raise ValueError(
            f"a value term has vocab_size = {term.vocab_size}, "
            f"but only {term.logits.shape[-1]} columns"
        )
    logits = term.logits.astype(jnp.float32)
    if term.vocabulary_map is not None:
        logits = apply_vocabulary_map(logits, term.vocabulary_map, centred=term.centred)
    elif term.vocab_size < logits.shape[-1]:
        logits = jnp.where(_real_columns(logits.shape[-1], term.vocab_size), logits, 0.0)
    value_width = logits.shape[-1]
    if width < value_width:
        logits = logits[..., :width]
    elif width > value_width:
        logits = jnp.pad(logits, ((0, 0), (0, 0), (0, width - value_width)))
    if term.unknown_ids is not None:
        logits = logits.at[..., term.unknown_ids].set(0.0)
    return logits


def _probabilities(base_logits: Float[Array, "B T V"], vocab_size: int) -> Float[Array, "B T V"]:
    real = _real_columns(base_logits.shape[-1], vocab_size)
    return jax.nn.softmax(jnp.where(real, base_logits.astype(jnp.float32), -jnp.inf), axis=-1)
