"""Inverse value learning itself: how a value network is added to a base model. Read this first.

    z_value = value(emb(x))                         residual
    z_value = value(emb(x) + softmax(z_base) · E)   cascade
    z_value = value(softmax(z_base) · E)            cascade_no_text
    z_value = value(emb(x) + h_base · P)            hidden (h_base: final hidden states of the base)
    z_value = z_base · A, or z_base · D · A         linear (a baseline: D and A are matrices)
    z       = z_base + Σ_i α_i · M_i(z_value_i)     M_i a vocabulary map; mostly the identity

In: tokens and what a base computed from them. Out: value logits, composed logits, the penalty.
All functions are pure.
Source: arXiv 2410.21027, section 3; `hidden` is ours. The authors add in bfloat16, we in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ivl_jax.config import PenaltyKind
from ivl_jax.model.decoder import (
    Params,
    embed,
    embed_probabilities,
    hidden_states,
    logits_from_hidden,
    project_base_hidden,
)
from ivl_jax.model.kv_cache import KVCache
from ivl_jax.model.linear_map import linear_map_hidden
from ivl_jax.vocabulary.value_term import ValueTerm, in_base_columns, real_columns


class SchemeInputs(NamedTuple):
    """What a value network may read, at the same positions; None for what it does not read."""

    tokens: Int[Array, "B T"]
    base_logits: Float[Array, "B T Vb"] | None = None
    base_hidden: Float[Array, "B T Db"] | None = None  # the base's final hidden states
    vocab_size: int = 0  # real columns of base_logits; the padding columns never enter


@dataclass(frozen=True)
class ConnectionScheme:
    """How a value network's input is made; a new scheme is one more entry of `SCHEMES`."""

    name: str
    # (value graphdef, its parameters, inputs) → input embeddings [B T D]
    make_input: Callable[[nnx.GraphDef, Params, SchemeInputs], Array]
    reads_base_logits: bool = False
    reads_base_hidden: bool = False
    has_layers: bool = True  # False: the head reads its input directly, and there is no cache

    @property
    def reads_base(self) -> bool:
        """Whether it reads more than the text, which rules out vocabulary maps and drafts."""
        return self.reads_base_logits or self.reads_base_hidden


def _text(graphdef: nnx.GraphDef, params: Params, inputs: SchemeInputs) -> Array:
    return embed(graphdef, params, inputs.tokens)


def _prediction(graphdef: nnx.GraphDef, params: Params, inputs: SchemeInputs) -> Array:
    logits = _real_logits(inputs, padding=-jnp.inf).astype(jnp.float32)
    return embed_probabilities(graphdef, params, jax.nn.softmax(logits, axis=-1))


def _text_and_prediction(graphdef: nnx.GraphDef, params: Params, inputs: SchemeInputs) -> Array:
    return _prediction(graphdef, params, inputs) + _text(graphdef, params, inputs)


def _text_and_hidden(graphdef: nnx.GraphDef, params: Params, inputs: SchemeInputs) -> Array:
    projected = project_base_hidden(graphdef, params, cast(Array, inputs.base_hidden))
    return _text(graphdef, params, inputs) + projected


def _linear_map(graphdef: nnx.GraphDef, params: Params, inputs: SchemeInputs) -> Array:
    return linear_map_hidden(graphdef, params, _real_logits(inputs, padding=0.0))


def _real_logits(inputs: SchemeInputs, *, padding: float) -> Float[Array, "B T Vb"]:
    logits = cast(Array, inputs.base_logits)
    return jnp.where(real_columns(logits.shape[-1], inputs.vocab_size), logits, padding)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        ConnectionScheme("residual", _text),
        ConnectionScheme("cascade", _text_and_prediction, reads_base_logits=True),
        ConnectionScheme("cascade_no_text", _prediction, reads_base_logits=True),
        ConnectionScheme("hidden", _text_and_hidden, reads_base_hidden=True),
        ConnectionScheme("linear", _linear_map, reads_base_logits=True, has_layers=False),
    )
}


def compose_logits(
    base_logits: Float[Array, "B T Vb"], value_terms: Sequence[ValueTerm], *, vocab_size: int
) -> Float[Array, "B T Vb"]:
    """Add value logits to base logits in float32, then mask the padding columns with −inf.

    Args:
        base_logits: [B T Vb], any float dtype.
        value_terms: the summands; an empty list gives the base alone. Tokens that a value does not
            know, or that its map leaves out, get value logit 0.
        vocab_size: number of real tokens of the base's tokenizer; later columns are padding.

    Returns:
        Composed logits [B T Vb] in float32.

    Raises:
        ValueError: a `vocab_size` exceeds the number of logit columns.

    Source:
        arXiv 2410.21027, section 3 (one value, α = 1). Proxy-tuning (arXiv 2401.08565) is the same
        sum: a tuned and an untuned model as values, at the strengths α and −α.

    Example:
        >>> import jax.numpy as jnp
        >>> base = jnp.array([[[1.0, 2.0, 3.0, 9.0]]])  # three tokens and a padding column
        >>> value = ValueTerm(jnp.array([[[10.0, 20.0]]]), jnp.array([0.5]), vocab_size=2)
        >>> compose_logits(base, [value], vocab_size=3).tolist()
        [[[6.0, 12.0, 3.0, -inf]]]
    """
    width = base_logits.shape[-1]
    if vocab_size > width:
        raise ValueError(f"{vocab_size} real tokens, but the base has only {width} output rows")
    logits = base_logits.astype(jnp.float32)
    for term in value_terms:
        logits += in_base_columns(term, width)
    return jnp.where(real_columns(width, vocab_size), logits, -jnp.inf)


def value_hidden(
    scheme: ConnectionScheme,
    graphdef: nnx.GraphDef,
    params: Params,
    inputs: SchemeInputs,
    **decoder_arguments: Any,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Run a value network up to its head.

    Args:
        scheme: an entry of `SCHEMES`, or one of your own.
        graphdef: static part of the value network.
        params: its parameters.
        inputs: what it may read.
        **decoder_arguments: `positions`, `segment_ids`, `cache`, `prompt_lengths`, `constrain`
            of `hidden_states`.

    Returns:
        Hidden states [B T D] for `logits_from_hidden`, and the new cache (None without one).

    Raises:
        ValueError: the scheme reads something that `inputs` does not contain.
    """
    for name in ("base_logits", "base_hidden"):
        if getattr(scheme, f"reads_{name}") and getattr(inputs, name) is None:
            raise ValueError(f"the connection scheme {scheme.name} reads {name}, got None")
    embeddings = scheme.make_input(graphdef, params, inputs)
    if not scheme.has_layers:
        return embeddings, decoder_arguments.get("cache")
    return hidden_states(graphdef, params, None, input_embeddings=embeddings, **decoder_arguments)


def value_forward(
    scheme: ConnectionScheme,
    graphdef: nnx.GraphDef,
    params: Params,
    inputs: SchemeInputs,
    **decoder_arguments: Any,
) -> tuple[Float[Array, "B T Vv"], KVCache | None]:
    """Value logits in float32 and the new cache; takes the same arguments as `value_hidden`."""
    hidden, cache = value_hidden(scheme, graphdef, params, inputs, **decoder_arguments)
    return logits_from_hidden(graphdef, params, hidden), cache


def value_penalty(
    value_logits: Float[Array, "B T Vv"], *, kind: PenaltyKind, vocab_size: int
) -> Float[Array, "B T"]:
    """Per token, the mean over the real vocabulary of |z_value| (`l1`) or z_value² (`l2`).

    Source: arXiv 2410.21027, section 3.3. The objective chooses which tokens are averaged.

    Example:
        >>> import jax.numpy as jnp
        >>> z = jnp.array([[[1.0, -3.0, 99.0]]])
        >>> value_penalty(z, kind="l1", vocab_size=2).tolist()
        [[2.0]]
    """
    if kind == "none":
        return jnp.zeros(value_logits.shape[:-1], jnp.float32)
    magnitude = jnp.abs(value_logits) if kind == "l1" else jnp.square(value_logits)
    real = real_columns(value_logits.shape[-1], vocab_size)
    return jnp.sum(jnp.where(real, magnitude, 0.0), axis=-1) / vocab_size
