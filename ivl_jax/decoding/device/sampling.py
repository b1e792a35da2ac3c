"""From logits to the next token, row by row, on device.

In: composed logits, what each row asks for (temperature, top-k, top-p, min-p, logit bias) and one
key per row. Out: one token id per row. All functions are pure, and every setting is an array:
changing it never compiles anything.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key


class LogitBias(NamedTuple):
    """What each row adds to the logits of some tokens."""

    token_ids: Int[Array, "B K"]
    """Ids of the vocabulary, each at most once per row; where the number is 0, any."""
    biases: Float[Array, "B K"]
    """The numbers; 0 fills up."""


class Sampling(NamedTuple):
    """How each row's next token is chosen from its logits."""

    temperature: Float[Array, " B"]
    """Logits are divided by it; 0 is greedy (arg-max, the lowest id among equals)."""
    top_k: Int[Array, " B"]
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: Float[Array, " B"]
    """Keep the fewest likeliest tokens that hold this probability mass; 1 keeps all."""
    min_p: Float[Array, " B"]
    """Drop tokens below this share of the likeliest token's probability; 0 keeps all."""
    bias: LogitBias | None = None
    """Added to the logits before all else; None: no row adds anything, and nothing is computed."""


def row_keys(seeds: Integer[Array, " B"], sample_indices: Int[Array, " B"]) -> Key[Array, " B"]:
    """Make one key per row.

    Args:
        seeds: [B] seed of each row's request.
        sample_indices: [B] which sample of that seed the row is (for example the prompt's line in
            the input file).

    Returns:
        [B] typed threefry keys; that generator gives a key the same numbers in every batch.
    """

    def one(seed: Integer[Array, ""], index: Int[Array, ""]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)

    return jax.vmap(one)(seeds, sample_indices)


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The token with the largest logit in each row, the lowest id among equals, [B] int32.

    Two reductions that XLA vectorises on CPU; its arg-max takes three times as long. A row with a
    NaN has no largest logit: 0.
    """
    width = logits.shape[-1]
    columns = jnp.arange(width, dtype=jnp.int32)[None, :]
    is_largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(is_largest, columns, width), axis=-1)
    return jnp.where(first < width, first, 0)


def are_finite(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """Whether a token can be chosen in each row: its largest logit is a finite number.

    A NaN or +inf anywhere in a row shows there, and so does a row of −inf only. The reduction is
    the one that `likeliest` makes: compiled together they are one.
    """
    return jnp.isfinite(jnp.max(logits, axis=-1))


def add_bias(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Add each row's logit bias.

    Args:
        logits: [B V] float32; −inf in padding columns, which no bias names.
        sampling: what each row asks for.

    Returns:
        [B V] float32; a row that adds nothing keeps its values.
    """
    if sampling.bias is None:
        return logits
    token_ids, biases = sampling.bias
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[rows, token_ids].add(biases)


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Divide by the temperature, then apply top-k, top-p and min-p in this order.

    Args:
        logits: [B V] float32; −inf in padding columns.
        sampling: what each row asks for; a row of temperature 0 is not divided.

    Returns:
        [B V] float32, shifted so that the largest is 0; −inf where a token is dropped. Its softmax
        is the distribution that `sample_tokens` draws from. Tokens whose logit equals the last kept
        one are kept too, so the result does not depend on an order among equals.

    Source:
        The order and the meaning of each filter are those of transformers' logits processors.
    """
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    # Shifted first: a tiny temperature then gives −inf for the others, never inf − inf.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature[:, None]
    needs_order = (sampling.top_k > 0) | (sampling.top_p < 1)
    # Sorting 32,000 logits costs more than a small value network's forward: only when asked for.
    threshold = jax.lax.cond(
        jnp.any(needs_order),
        lambda: _order_threshold(scaled, sampling),
        lambda: jnp.full(scaled.shape[:1], -jnp.inf, scaled.dtype),
    )
    threshold = jnp.maximum(threshold, jnp.log(sampling.min_p))
    return jnp.where(scaled >= threshold[:, None], scaled, -jnp.inf)


def sample_tokens(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    keys: Key[Array, " B"],
    token_indices: Int[Array, " B"],
) -> Int[Array, " B"]:
    """Choose one token per row.

    A row's token depends on its own logits, settings, key and token index only: not on the other
    rows, nor on how many padding columns the vocabulary has.

    Args:
        logits: [B V] float32 composed logits; −inf in padding columns.
        sampling: what each row asks for.
        keys: [B] one key per row, the same at every step.
        token_indices: [B] how many tokens the row has generated before this one; folded into
            the key.

    Returns:
        [B] int32 token ids.
    """

    def one(key: Key[Array, ""], index: Int[Array, ""], row: Float[Array, " V"]) -> Int[Array, ""]:
        return jax.random.categorical(jax.random.fold_in(key, index), row).astype(jnp.int32)

    logits = add_bias(logits, sampling)
    greedy = likeliest(logits)
    is_sampled: Bool[Array, " B"] = sampling.temperature > 0
    sampled = jax.lax.cond(
        jnp.any(is_sampled),
        lambda: jax.vmap(one)(keys, token_indices, filter_logits(logits, sampling)),
        lambda: greedy,
    )
    return jnp.where(is_sampled, sampled, greedy)


def _order_threshold(scaled: Float[Array, "B V"], sampling: Sampling) -> Float[Array, " B"]:
    """The smallest logit that top-k and top-p keep."""
    width = scaled.shape[-1]
    descending = -jnp.sort(-scaled, axis=-1)
    count = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, width), width)
    kth = jnp.take_along_axis(descending, count[:, None] - 1, axis=-1)
    probabilities = jax.nn.softmax(jnp.where(descending >= kth, descending, -jnp.inf), axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = sampling.top_p[:, None]
    # A running sum may round to 1 before the last token: top_p = 1 keeps all by definition.
    kept = (descending >= kth) & ((mass_before < top_p) | (top_p >= 1))
    # The likeliest token is kept even where float32 rounds top_p to 0.
    last = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True) - 1, 0)
    return jnp.take_along_axis(descending, last, axis=-1)[:, 0]
