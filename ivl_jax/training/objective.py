"""What is minimised: cross-entropy of the composed logits plus the penalty on the value logits.

In: parameters of the value network, frozen parameters of the base model, one batch. Out: a sum, its
denominator and the sums behind the metrics; the caller divides once, over the global batch.

    loss = Σ loss_mask·CE(z_base + z_value, target) / Σ loss_mask + λ·mean |z_value|

The logits [B T V] are the largest arrays of a step by far. They never exist at once: the head runs
over chunks of positions, and the gradient of a chunk is taken in the forward pass, while its logits
are at hand, so nothing of size V is stored or computed twice.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from ivl_jax.composition import ValueTerm, compose_logits, value_hidden, value_penalty
from ivl_jax.config import Connection, PenaltyKind, PenaltyPositions
from ivl_jax.data.batching import Batch
from ivl_jax.model.decoder import Constrain, Params, hidden_states, logits_from_hidden


@dataclass(frozen=True)
class Objective:
    """The static half of a loss: which decoders, how connected, which penalty."""

    graphdef: nnx.GraphDef
    """The decoder that is trained: the value network, or any model trained alone."""
    base_graphdef: nnx.GraphDef | None
    """The frozen base model's decoder; None trains one model alone (fine-tuning, pre-training)."""
    vocab_size: int
    """Real tokens of the base's tokenizer; output columns after them are padding."""
    value_vocab_size: int
    """Real tokens of the trained model; equals `vocab_size` unless the base appended tokens."""
    unknown_ids: tuple[int, ...] = ()
    """Base ids that the value network does not know (never in its text): value logit 0."""
    connection: Connection = "residual"
    penalty_kind: PenaltyKind = "none"
    penalty_weight: float = 0.0
    penalty_positions: PenaltyPositions = "real"
    chunk_length: int = 1 << 30
    """Positions whose logits exist at once; see `choose_chunk_length`."""
    constrain: Constrain | None = None
    """Sharding constraint for the trained model's activations."""
    base_constrain: Constrain | None = None
    """Sharding constraint for the base model's activations."""

    def __post_init__(self) -> None:
        """Check what would make the loss meaningless."""
        if self.base_graphdef is None and self.penalty_kind != "none":
            raise ValueError(
                f'penalty_kind = "{self.penalty_kind}" is a penalty on value logits; without a '
                'base model there are none: use "none"'
            )


class LossAux(NamedTuple):
    """Sums over one batch, all float32 scalars; their quotients are the metrics."""

    nll: Float32[Array, ""]  # Σ over counted targets of −log p, nats
    correct: Float32[Array, ""]  # counted targets that have the largest logit
    loss_tokens: Float32[Array, ""]  # counted targets
    penalty: Float32[Array, ""]  # Σ over penalised positions of the mean over V of |z| or z²
    magnitude: Float32[Array, ""]  # Σ over real positions of the mean over V of |z_value|
    real_tokens: Float32[Array, ""]  # real (not padding) positions
    base_nll: Float32[Array, ""]  # as nll, of the base alone; 0 where not asked for
    base_correct: Float32[Array, ""]  # as correct, of the base alone; 0 where not asked for


class Counts(NamedTuple):
    """The denominators of a batch, known before any compute."""

    loss_tokens: Float32[Array, ""]  # counted targets
    penalty_tokens: Float32[Array, ""]  # positions that the penalty averages over


class _Targets(NamedTuple):
    """What a chunk of positions is compared with; every field [B t]."""

    targets: Int[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    real: Bool[Array, "B T"]
    penalised: Bool[Array, "B T"]


class _Heads(NamedTuple):
    """Parameters that a chunk needs beside the differentiated head; never differentiated."""

    params: Params
    base_params: Params | None
    penalty_scale: Float32[Array, ""]


def count_tokens(objective: Objective, batch: Batch) -> Counts:
    """Count what the two means of the loss average over.

    Args:
        objective: says which positions are penalised.
        batch: arrays [B T], or [A B T] for a whole global batch of micro-batches.

    Returns:
        Both counts, float32 (exact below 2^24 tokens a batch).
    """
    penalised = _penalised(objective, batch)
    return Counts(
        loss_tokens=jnp.sum(batch.loss_mask, dtype=jnp.float32),
        penalty_tokens=jnp.sum(penalised, dtype=jnp.float32),
    )


def loss_sum(
    objective: Objective,
    params: Params,
    base_params: Params | None,
    batch: Batch,
    *,
    counts: Counts,
    with_base: bool = False,
) -> tuple[Float32[Array, ""], Float32[Array, ""], LossAux]:
    """Sum the loss over one micro-batch.

    The penalty has another denominator (real tokens) than the cross-entropy (counted targets). Its
    sum is therefore scaled by λ·N_loss/N_penalty, both of the *global* batch, and then

        Σ_micro loss_sum / N_loss  =  mean CE + λ·mean |z_value|

    holds exactly, however tokens are spread over micro-batches.

    Args:
        objective: the static half.
        params: parameters of the trained model; differentiable.
        base_params: frozen parameters of the base; None iff the objective has no base. They get no
            gradient. Its head is enough where the batch carries the base's states.
        batch: one micro-batch, arrays [B T].
        counts: of the global batch this micro-batch belongs to.
        with_base: also sum the base's own NLL and accuracy (evaluation).

    Returns:
        (sum, denominator, aux): the loss of the global batch is the sum over its micro-batches
        divided by the denominator, nats per token; the denominator is that of the global batch, at
        least 1.

    Source:
        arXiv 2410.21027, sections 3.1 and 3.3; the authors' code averages the penalty over all
        positions (`penalty_positions = "all"`).

    Example:
        Two counted targets on a vocabulary of four, and a model that gives equal logits.

        >>> import jax, jax.numpy as jnp
        >>> from ivl_jax.model.architecture import ArchConfig
        >>> from ivl_jax.model.decoder import build_decoder, init_params, zero_head
        >>> arch = ArchConfig.from_hf({"model_type": "llama", "vocab_size": 4, "hidden_size": 8,
        ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        ...     "num_key_value_heads": 1, "rope_theta": 1e4, "tie_word_embeddings": True})
        >>> params = zero_head(init_params(arch, jax.random.key(0)))
        >>> ids = jnp.array([[0, 1, 2]])
        >>> batch = Batch(tokens=ids, targets=ids, loss_mask=jnp.array([[False, True, True]]),
        ...     positions=ids, segment_ids=jnp.ones_like(ids))
        >>> alone = Objective(build_decoder(arch), None, vocab_size=4, value_vocab_size=4)
        >>> total, count, _ = loss_sum(
        ...     alone, params, None, batch, counts=count_tokens(alone, batch))
        >>> float(count), round(float(total / count), 4) == round(math.log(4), 4)
        (2.0, True)
    """
    if (base_params is None) != (objective.base_graphdef is None):
        raise ValueError("loss_sum takes base_params exactly when the objective has a base")
    denominator = jnp.maximum(counts.loss_tokens, 1.0)
    scale = objective.penalty_weight * denominator / jnp.maximum(counts.penalty_tokens, 1.0)
    base_params = jax.lax.stop_gradient(base_params)
    arrays: Any = batch
    hidden, base_source = _run_decoders(objective, params, base_params, arrays)

    head = _head_of(params)
    heads = _Heads(jax.lax.stop_gradient(params), base_params, scale)
    targets = _Targets(
        targets=arrays.targets,
        loss_mask=arrays.loss_mask,
        real=arrays.token_mask,
        penalised=_penalised(objective, arrays),
    )
    chunks: Any = _split(objective.chunk_length, (hidden, base_source, targets))
    one_chunk = functools.partial(_chunk_loss, objective, with_base)
    hidden_chunks, *rest = chunks
    summed: Any = _sum_over_chunks(one_chunk, head, hidden_chunks, tuple(rest), heads)
    total, aux = summed
    return total, denominator, aux


def choose_chunk_length(
    rows: int, length: int, vocab_rows: int, *, max_logits: int, min_tokens: int
) -> int:
    """Choose how many positions' logits exist at once.

    Args:
        rows: rows of a micro-batch on one device.
        length: positions a row, T.
        vocab_rows: output rows of the wider head, V.
        max_logits: logits of one model that one device should hold at once.
        min_tokens: tokens of a chunk, over all rows, below which it does not pay, whatever the
            vocabulary: each chunk reads both heads and adds to the gradient of one.

    Returns:
        Positions a chunk, so that the chunks of T are even and hold at most `max_logits` each, or
        `min_tokens` if that is more (but at least one position).
    """
    positions = max(1, max(max_logits // vocab_rows, min_tokens) // rows)
    return math.ceil(length / math.ceil(length / positions))


def _penalised(objective: Objective, batch: Any) -> Bool[Array, "*A B T"]:
    real = batch.token_mask
    return jnp.ones_like(real) if objective.penalty_positions == "all" else real


def _head_of(params: Params) -> Params:
    """What `logits_from_hidden` reads; the only subtree a chunk's gradient is taken of.

    A tied head is turned round once a step: the gradient of `h · Eᵀ` by E would turn the logits'
    gradient [B T V] round instead, at half the speed (2,048 × 128, CPU).
    """
    if "lm_head" in params:
        return {"lm_head": params["lm_head"]}
    return {"lm_head": {"kernel": params["embed_tokens"]["embedding"].T}}


def _run_decoders(
    objective: Objective, params: Params, base_params: Params | None, batch: Any
) -> tuple[Array, Array | None]:
    """Hidden states [B T D] of the trained model; the base's, or its logits for a cascade."""
    common: dict[str, Any] = {"positions": batch.positions, "segment_ids": batch.segment_ids}
    if base_params is None or objective.base_graphdef is None:
        hidden, _ = hidden_states(
            objective.graphdef, params, batch.tokens, constrain=objective.constrain, **common
        )
        return hidden, None
    base = batch.base_states
    if base is None:
        base, _ = hidden_states(
            objective.base_graphdef,
            base_params,
            batch.tokens,
            constrain=objective.base_constrain,
            **common,
        )
    if objective.connection != "residual":
        base = _base_logits(objective, base_params, base)
    hidden, _ = value_hidden(
        objective.connection,
        objective.graphdef,
        params,
        batch.tokens,
        base_logits=None if objective.connection == "residual" else base,
        vocab_size=objective.vocab_size,
        constrain=objective.constrain,
        **common,
    )
    return hidden, base


def _base_logits(objective: Objective, base_params: Params, hidden: Array) -> Array:
    assert objective.base_graphdef is not None
    logits = logits_from_hidden(objective.base_graphdef, base_params, hidden)
    return _constrained(objective.base_constrain, logits)


def _constrained(constrain: Constrain | None, logits: Array) -> Array:
    return logits if constrain is None else constrain(logits, ("batch", "length", "vocabulary"))


def _chunk_loss(
    objective: Objective,
    with_base: bool,
    head: Params,
    hidden: Float[Array, "B T D"],
    rest: tuple[Array | None, _Targets],
    heads: _Heads,
) -> tuple[Float32[Array, ""], LossAux]:
    """Loss sum of one chunk of positions, from hidden states."""
    base_source, where = rest
    logits = logits_from_hidden(objective.graphdef, heads.params | head, hidden)
    logits = _constrained(objective.constrain, logits)
    zero = jnp.zeros((), jnp.float32)
    penalty = magnitude = base_nll = base_correct = zero
    if heads.base_params is None or base_source is None:
        composed = compose_logits(logits, (), vocab_size=objective.vocab_size)
    else:
        size = objective.value_vocab_size
        if objective.connection == "residual":
            base_source = _base_logits(objective, heads.base_params, base_source)
        unknown = jnp.asarray(objective.unknown_ids, jnp.int32) if objective.unknown_ids else None
        term = ValueTerm(logits, jnp.ones(1, jnp.float32), size, unknown)
        composed = compose_logits(base_source, [term], vocab_size=objective.vocab_size)
        magnitude, _ = value_penalty(
            jax.lax.stop_gradient(logits), where.real, kind="l1", vocab_size=size
        )
        penalty, _ = value_penalty(
            logits, where.penalised, kind=objective.penalty_kind, vocab_size=size
        )
        if with_base:
            alone = compose_logits(base_source, (), vocab_size=objective.vocab_size)
            base_nll, base_correct = _cross_entropy(alone, where.targets, where.loss_mask)
    nll, correct = _cross_entropy(composed, where.targets, where.loss_mask)
    aux = LossAux(
        nll=nll,
        correct=correct,
        loss_tokens=jnp.sum(where.loss_mask, dtype=jnp.float32),
        penalty=penalty,
        magnitude=magnitude,
        real_tokens=jnp.sum(where.real, dtype=jnp.float32),
        base_nll=base_nll,
        base_correct=base_correct,
    )
    return nll + heads.penalty_scale * penalty, jax.lax.stop_gradient(aux)


def _cross_entropy(
    logits: Float32[Array, "B T V"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Σ mask·(−log softmax(logits)[target]) and how many targets have the largest logit.

    A comparison with a column index fuses with what is around it; a gather of [B T V] would not,
    and its gradient would be a scatter. The maximum is needed by the softmax anyway; an arg-max is
    a slow reduction on CPU. A tie counts as correct.
    """
    columns = jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None, :]
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    log_sum = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    chosen = jnp.sum(jnp.where(columns == targets[..., None], logits, 0.0), axis=-1)
    nll = jnp.sum(jnp.where(mask, log_sum - chosen, 0.0))
    return nll, jnp.sum(mask & (chosen >= largest), dtype=jnp.float32)


def _split(chunk_length: int, tree: Any) -> Any:
    """[B T …] to [C B t …]; T is padded with zeros (masks with False) to a multiple of t."""

    def one(array: Array) -> Array:
        rows, length = array.shape[:2]
        size = min(chunk_length, length)
        count = math.ceil(length / size)
        padding = [(0, 0), (0, count * size - length), *[(0, 0)] * (array.ndim - 2)]
        array = jnp.pad(array, padding) if count * size > length else array
        return jnp.moveaxis(array.reshape(rows, count, size, *array.shape[2:]), 1, 0)

    return jax.tree.map(one, tree)


_ChunkLoss = Callable[..., tuple[Array, LossAux]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_chunks(
    chunk_loss: _ChunkLoss, head: Params, hidden: Array, rest: Any, heads: _Heads
) -> tuple[Array, LossAux]:
    """Σ over chunks of (loss, aux); differentiable in `head` and `hidden` through the loss only."""

    def one(hidden_and_rest: Any) -> tuple[Array, LossAux]:
        return chunk_loss(head, *hidden_and_rest, heads)

    return _scan_sum(lambda chunk: (one(chunk), None), (hidden, rest))[0]


def _sum_forward(
    chunk_loss: _ChunkLoss, head: Params, hidden: Array, rest: Any, heads: _Heads
) -> tuple[tuple[Array, LossAux], Any]:
    with_gradient = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)

    def one(chunk: Any) -> tuple[Any, Array]:
        (loss, aux), (head_gradient, hidden_gradient) = with_gradient(head, *chunk, heads)
        return (loss, aux, head_gradient), hidden_gradient

    (loss, aux, head_gradient), hidden_gradient = _scan_sum(one, (hidden, rest))
    return (loss, aux), (head_gradient, hidden_gradient)


def _sum_backward(chunk_loss: _ChunkLoss, gradients: Any, cotangents: Any) -> Any:
    del chunk_loss
    scaled = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients)
    return (*scaled, None, None)


_sum_over_chunks.defvjp(_sum_forward, _sum_backward)


def _scan_sum(one: Callable[[Any], tuple[Any, Any]], chunks: Any) -> tuple[Any, Any]:
    """Add up the first result over chunks and stack the second; one chunk needs no loop."""
    count = jax.tree.leaves(chunks)[0].shape[0]
    first = jax.tree.map(lambda array: array[0], chunks)
    if count == 1:
        total, stacked = one(first)
        return total, jax.tree.map(lambda array: array[None], stacked)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, first)[0])

    def body(total: Any, chunk: Any) -> tuple[Any, Any]:
        added, stacked = one(chunk)
        return jax.tree.map(jnp.add, total, added), stacked

    return jax.lax.scan(body, zeros, chunks)
