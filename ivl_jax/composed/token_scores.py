"""How a composed model scores each token: the scores that losses and evaluations share.

In: final hidden states and the tokens that follow. Out: named scores per position, such as the
log-probability of the token that follows, the entropy, or the KL divergence from the base or from
a teacher.

`score_positions` makes the logits [B T V] of the positions it is given; long texts are scored in
chunks of positions (`split_positions`), so that no array of that size exists for a whole text.
All functions are pure, and differentiable where that makes sense.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from ivl_jax.composed.distributions import entropy, js_divergence, kl_divergence
from ivl_jax.composed.forward import (
    HiddenStates,
    NetworkLogits,
    compose,
    head_logits,
    network_logits,
)
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.composed.strength_policies import RowPolicies
from ivl_jax.composition import compose_logits, value_penalty
from ivl_jax.vocabulary.value_term import real_columns


class PositionLogits(NamedTuple):
    """Everything a score may use."""

    composition: Composition
    composed: Float32[Array, "B T V"]
    networks: NetworkLogits
    targets: Int[Array, "B T"]
    """The token that follows each position."""
    teacher_logits: Float32[Array, "B T V2"] | None = None
    """Logits of a teacher, which may have further tokens; None: there is none."""
    temperature: float | Float32[Array, ""] = 1.0
    """What `composed` was divided by, and what the base's logits are."""
    late: Sequence[Float32[Array, "B T V"]] = ()
    """`composed`, had the head of the first value network read one layer before its last alone."""

    @property
    def teacher(self) -> Float32[Array, "B T V"]:
        """The teacher's logits in the columns of the composed ones.

        Tokens beyond the student's vocabulary are dropped: −inf, so that a softmax renormalises.
        """
        logits = self.teacher_logits
        assert logits is not None, "a score of a teacher needs one"
        columns, width = self.composition.base.vocab_size, self.composed.shape[-1]
        if logits.shape[-1] == width:
            return jnp.where(real_columns(width, columns), logits, -jnp.inf)
        real, padding = logits[..., :columns], [(0, 0), (0, 0), (0, width - columns)]
        return jnp.pad(real, padding, constant_values=-jnp.inf)

    @property
    def base(self) -> Float32[Array, "B T V"]:
        """Logits of the base alone, −inf in the padding columns.

        A model without value networks is compared with its teacher, if there is one.
        """
        if not self.composition.values and self.teacher_logits is not None:
            return at_temperature(self.teacher, self.temperature)
        size = self.composition.base.vocab_size
        logits = compose_logits(self.networks.base, (), vocab_size=size)
        return at_temperature(logits, self.temperature)


Score = Callable[[PositionLogits], Array]


def _value_size(logits: PositionLogits, kind: Any) -> Float32[Array, "B T M"]:
    sizes = [
        value_penalty(each, kind=kind, vocab_size=network.vocab_size)
        for network, each in zip(logits.composition.values, logits.networks.values, strict=True)
    ]
    empty = jnp.zeros((*logits.targets.shape, 0), jnp.float32)
    return jnp.stack(sizes, axis=-1) if sizes else empty


def _depth_divergence(logits: PositionLogits) -> Float32[Array, "B T"]:
    whole = jax.lax.stop_gradient(logits.composed)
    divergences = [kl_divergence(whole, late) for late in logits.late]
    return jnp.mean(jnp.stack(divergences), axis=0)


SCORES: Mapping[str, Score] = {
    # log p(target), nats
    "log_prob": lambda at: log_probs(at.composed, at.targets),
    # whether the target has the largest logit, ties included
    "top1": lambda at: is_largest(at.composed, at.targets),
    # entropy of the next token, nats
    "entropy": lambda at: entropy(at.composed),
    # the same for the base alone
    "base_log_prob": lambda at: log_probs(at.base, at.targets),
    "base_top1": lambda at: is_largest(at.base, at.targets),
    "base_entropy": lambda at: entropy(at.base),
    # KL(composed ‖ base) of the next token, nats
    "base_kl": lambda at: kl_divergence(at.composed, at.base),
    # log p(target) under the teacher, nats; and the divergence from it: KL(teacher ‖ composed),
    # KL(composed ‖ teacher), Jensen–Shannon
    "teacher_log_prob": lambda at: log_probs(at.teacher, at.targets),
    "teacher_kl": lambda at: kl_divergence(at.teacher, at.composed),
    "teacher_reverse_kl": lambda at: kl_divergence(at.composed, at.teacher),
    "teacher_js": lambda at: js_divergence(at.teacher, at.composed),
    # mean over the vocabulary of |z_value| and z_value², [B T M]: one per value network
    "value_l1": lambda at: _value_size(at, "l1"),
    "value_l2": lambda at: _value_size(at, "l2"),
    # KL(all depths ‖ one layer before the last alone), mean over these; no gradient to the former
    "depth_kl": _depth_divergence,
}


def score_positions(
    composition: Composition,
    params: ComposedParams,
    hidden: HiddenStates,
    targets: Int[Array, "B T"],
    *,
    strengths: Float[Array, "#B M"],
    names: Sequence[str],
    policies: RowPolicies | None = None,
    teacher_logits: Float32[Array, "B T V2"] | None = None,
    temperature: float | Float32[Array, ""] = 1.0,
    late_hidden: Sequence[Float[Array, "B T D"]] = (),
) -> dict[str, Array]:
    """Score positions.

    Args:
        composition: the static half.
        params: the arrays of all networks; only their heads are read.
        hidden: final hidden states at these positions.
        targets: [B T] the token that follows each.
        strengths: [B M] α of each value network, or one row for all.
        names: keys of `SCORES`; only these are computed.
        policies: strength policies by name; None: constant strengths.
        teacher_logits: of a teacher at the same positions, for scores that compare with one.
        temperature: composed logits and the base's are divided by it, so that scores are those of
            the distribution that is sampled at this temperature; value logits are not.
        late_hidden: what the head of the first value network could read of each layer before its
            last, for `depth_kl`.

    Returns:
        Name → scores [B T]; [B T M] for `value_l1` and `value_l2`.
    """
    logits = network_logits(composition, params, hidden)

    def composed_with(logits: NetworkLogits) -> Float32[Array, "B T V"]:
        added = compose(composition, params.values, logits, strengths=strengths, policies=policies)
        return at_temperature(added, temperature)

    late = [
        composed_with(logits._replace(values=(one, *logits.values[1:])))
        for one in (
            head_logits(composition.values[0], params.values[0].params, states)
            for states in late_hidden
        )
    ]
    composed = composed_with(logits)
    at = PositionLogits(composition, composed, logits, targets, teacher_logits, temperature, late)
    return {name: SCORES[name](at) for name in names}


def at_temperature(
    logits: Float32[Array, "*B V"], temperature: float | Float32[Array, ""]
) -> Float32[Array, "*B V"]:
    """Logits of the distribution that is sampled at a temperature."""
    if not isinstance(temperature, float):
        # So that the padding columns have a derivative with respect to the temperature: 0.
        return jnp.where(jnp.isneginf(logits), logits, logits / temperature)
    return logits if temperature == 1.0 else logits / temperature


def log_probs(logits: Float32[Array, "*B V"], targets: Int[Array, "*B"]) -> Float32[Array, "*B"]:
    """Log softmax(logits)[target], in nats.

    A comparison with a column index fuses with the operations around it; a gather from [B T V]
    would not, and its gradient would be a scatter.
    """
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    log_sum = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    return _chosen(logits, targets) - log_sum


def is_largest(logits: Float32[Array, "*B V"], targets: Int[Array, "*B"]) -> Bool[Array, "*B"]:
    """Whether the target has the largest logit, ties included (an arg-max is slow on CPU)."""
    return _chosen(logits, targets) >= jnp.max(logits, axis=-1)


def candidate_scores(
    logits: Float32[Array, "B V"], candidates: Int[Array, "B C"]
) -> tuple[Float32[Array, "B C"], Bool[Array, "B C"]]:
    """Log p of several candidate next tokens, and which of them have the largest logit."""
    chosen = jnp.take_along_axis(logits, candidates, axis=-1)
    log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return chosen - log_sum, chosen >= jnp.max(logits, axis=-1, keepdims=True)


def choose_chunk_length(
    rows: int, length: int, vocab_rows: int, *, max_logits: int, min_tokens: int = 1
) -> int:
    """Choose how many positions' logits exist at once.

    Args:
        rows: rows of a batch on one device.
        length: positions per row, T.
        vocab_rows: output rows of the widest head, V.
        max_logits: logits of one network that one device should hold at once.
        min_tokens: tokens per chunk, over all rows, below which smaller chunks do not pay,
            whatever the vocabulary: each chunk reads all heads.

    Returns:
        Positions per chunk, such that the chunks of T are even and hold at most `max_logits` each,
        or `min_tokens` if that is more (but at least one position).
    """
    positions = max(1, max(max_logits // vocab_rows, min_tokens) // rows)
    return math.ceil(length / math.ceil(length / positions))


def split_positions(chunk_length: int, tree: Any) -> Any:
    """[B T …] to [C B t …]; T is padded with zeros (masks with False) to a multiple of t."""

    def one(array: Array) -> Array:
        rows, length = array.shape[:2]
        size = min(chunk_length, length)
        count = math.ceil(length / size)
        padding = [(0, 0), (0, count * size - length), *[(0, 0)] * (array.ndim - 2)]
        array = jnp.pad(array, padding) if count * size > length else array
        return jnp.moveaxis(array.reshape(rows, count, size, *array.shape[2:]), 1, 0)

    return jax.tree.map(one, tree)


def join_positions(length: int, tree: Any) -> Any:
    """[C B t …] back to [B T …], without the padding."""

    def one(array: Array) -> Array:
        together = jnp.moveaxis(array, 0, 1)
        rows, parts, size, *rest = together.shape
        return together.reshape(rows, parts * size, *rest)[:, :length]

    return jax.tree.map(one, tree)


def _chosen(logits: Float32[Array, "*B V"], targets: Int[Array, "*B"]) -> Float32[Array, "*B"]:
    columns = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    columns = columns.reshape((1,) * (logits.ndim - 1) + (-1,))
    return jnp.sum(jnp.where(columns == targets[..., None], logits, 0.0), axis=-1)
