"""The loss of a composed model: an objective's weighted scores plus the penalty on value logits.

In: parameters of the trained network, frozen parameters of the base, one batch. Out: a sum, its
denominator and the sums behind the metrics; the caller divides once, over the global batch.

    loss = Σ_tokens Σ_scores w · score / N  +  λ · mean |z_value|  +  μ · mean KL(all ‖ one depth)

The logits [B T V] are by far the largest arrays of a step. They never exist all at once: the heads
run over chunks of positions, and a chunk's gradient is taken in the forward pass, while its logits
exist, so nothing of size V is stored or computed twice.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from ivl_jax.composed.forward import HiddenStates
from ivl_jax.composed.head_copies import copy_head
from ivl_jax.composed.network import ComposedParams, Composition, Network, ValueArrays
from ivl_jax.composed.token_scores import join_positions, score_positions, split_positions
from ivl_jax.config import AugmentationConfig, PenaltyKind, PenaltyPositions
from ivl_jax.data.batching import Batch
from ivl_jax.model.decoder import Params
from ivl_jax.model.lora import join
from ivl_jax.training.batch_forward import run_student, run_teacher, teacher_logits
from ivl_jax.training.chunked_sum import Frozen, chunked_sum, head_of
from ivl_jax.training.masked_sum import masked_sum, weighted_sum
from ivl_jax.training.objectives.objective import Objective
from ivl_jax.training.objectives.sft import SFT

Sums = dict[str, Float32[Array, ""]]
"""Named sums over a batch; their quotients are the figures (`Loss.figures`)."""


@dataclass(frozen=True)
class Loss:
    """The static half of a loss: networks, objective and penalty.

    The trained network is the first value network, or the base if there is none.
    """

    composition: Composition
    objective: Objective = SFT
    unknown_ids: tuple[int, ...] = ()
    """Base ids that the trained value network does not know: value logit 0."""
    penalty_kind: PenaltyKind = "none"
    penalty_weight: float = 0.0
    penalty_positions: PenaltyPositions = "real"
    augmentation: AugmentationConfig | None = None
    """How a training step varies the base, which evaluations do not; None: it does not."""
    depths_distillation: float = 0.0
    """μ, if the head reads several depths; then `hidden_states` of the trained network returns what
    it could read of each (`all_depths`)."""
    chunk_length: int = 1 << 30
    """Positions whose logits exist at once; see `choose_chunk_length`."""
    teacher: Composition | None = None
    """A frozen model that the objective compares with, with all tokens of the vocabulary: the
    teacher of a distillation, or the original of a model that is trained alone."""
    teacher_strengths: tuple[float, ...] = ()
    """α of each of its value networks."""

    def __post_init__(self) -> None:
        """Check that the penalty has value logits, and that there is a reference if needed."""
        if not self.has_base and self.penalty_kind != "none":
            raise ValueError(
                f'penalty_kind = "{self.penalty_kind}" is a penalty on value logits, which do not '
                'exist without a base model: use "none"'
            )
        if self.objective.needs_reference and not self.has_base and self.teacher is None:
            raise ValueError(
                f"the objective {self.objective.name} compares with a frozen reference: give a "
                "base, or the original of the model that is trained alone as the teacher"
            )
        if f"value_{self.penalty_kind}" in self.objective.scores:
            raise ValueError(
                f'penalty_kind = "{self.penalty_kind}": the objective {self.objective.name} weighs '
                f'the score value_{self.penalty_kind} itself: use "none"'
            )

    @property
    def has_base(self) -> bool:
        """Whether a value network is trained with a frozen base."""
        return bool(self.composition.values)

    @property
    def trained(self) -> Network:
        """The network that is trained."""
        return self.composition.values[0] if self.has_base else self.composition.base

    @property
    def figures(self) -> Mapping[str, tuple[str, str]]:
        """Name of a figure → the sums whose quotient it is."""
        return {
            **self.objective.figures,
            "mean_abs_value": ("magnitude", "real_tokens"),
            "depth_kl": ("depth_kl", "loss_tokens"),
        }


class Counts(NamedTuple):
    """The denominators of a batch, known before the forward pass."""

    objective: Float32[Array, ""]  # what the objective's sum is divided by
    penalty_tokens: Float32[Array, ""]  # positions that the penalty averages over
    loss_tokens: Float32[Array, ""]  # positions that the distillation of depths averages over


def count_tokens(loss: Loss, batch: Batch) -> Counts:
    """Count the denominators of the loss's means.

    Args:
        loss: the static half.
        batch: arrays [B T], or [A B T] for a whole global batch of micro-batches.

    Returns:
        The counts, float32 (exact below 2^24 tokens per batch).
    """
    return Counts(
        objective=loss.objective.count(batch),
        penalty_tokens=jnp.sum(_penalised(loss, batch), dtype=jnp.float32),
        loss_tokens=jnp.sum(batch.loss_mask, dtype=jnp.float32),
    )


def loss_sum(
    loss: Loss,
    params: Params,
    base_params: Params | None,
    batch: Batch,
    *,
    counts: Counts,
    penalty_share: float | Float32[Array, ""] = 1.0,
    with_base: bool = False,
    teacher_params: ComposedParams | None = None,
    frozen_params: Params | None = None,
) -> tuple[Float32[Array, ""], Float32[Array, ""], Sums]:
    """Sum the loss over one micro-batch.

    The penalty has another denominator (real tokens) than the objective. Its sum is therefore
    scaled by λ·N/N_penalty, both of the *global* batch, and then

        Σ_micro loss_sum / N  =  objective + λ·mean |z_value|

    holds exactly, however tokens are spread over micro-batches; likewise for the depths.

    Args:
        loss: the static half.
        params: parameters of the trained network; differentiable.
        base_params: frozen parameters of the base, which get no gradient; None iff a model is
            trained without a base. The head is enough if the batch contains the base's states.
        batch: one micro-batch, arrays [B T].
        counts: of the global batch that this micro-batch belongs to.
        penalty_share: the share of λ that applies now.
        with_base: also compute what the objective evaluates for the base alone.
        teacher_params: of the teacher, which gets no gradient; None iff the loss has none.
        frozen_params: the other parameters of the trained network, if `params` are an adapter.

    Returns:
        (sum, denominator, sums): the loss of the global batch is the sum over its micro-batches
        divided by the denominator, which is that of the global batch and at least 1. The sums
        contain `loss` (without the penalty), `penalty`, `magnitude`, `loss_tokens`, `real_tokens`,
        and the objective's own.

    Source:
        arXiv 2410.21027, sections 3.1 and 3.3; the authors' code averages the penalty over all
        positions (`penalty_positions = "all"`).

    Example:
        Two counted targets, a vocabulary of four tokens, and a model whose logits are all equal.

        >>> import jax, math, jax.numpy as jnp
        >>> from ivl_jax.composed.network import Network
        >>> from ivl_jax.model.architecture import ArchConfig
        >>> from ivl_jax.model.decoder import build_decoder, init_params, zero_head
        >>> arch = ArchConfig.from_hf({"model_type": "llama", "vocab_size": 4, "hidden_size": 8,
        ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        ...     "num_key_value_heads": 1, "rope_theta": 1e4, "tie_word_embeddings": True})
        >>> params = zero_head(init_params(arch, jax.random.key(0)))
        >>> ids = jnp.array([[0, 1, 2]])
        >>> batch = Batch(tokens=ids, targets=ids, loss_mask=jnp.array([[False, True, True]]),
        ...     positions=ids, segment_ids=jnp.ones_like(ids))
        >>> alone = Loss(Composition(Network(build_decoder(arch), arch, vocab_size=4)))
        >>> total, count, _ = loss_sum(
        ...     alone, params, None, batch, counts=count_tokens(alone, batch))
        >>> float(count), round(float(total / count), 4) == round(math.log(4), 4)
        (2.0, True)
    """
    if (base_params is None) == loss.has_base:
        raise ValueError("loss_sum takes base_params exactly when the loss has a base")
    if (teacher_params is None) != (loss.teacher is None):
        raise ValueError("loss_sum takes teacher_params exactly when the loss has a teacher")
    arrays: Any = batch
    denominator = jnp.maximum(counts.objective, 1.0)
    penalty_weight = loss.penalty_weight * penalty_share
    penalty_scale = penalty_weight * denominator / jnp.maximum(counts.penalty_tokens, 1.0)
    head = head_of(params)
    if frozen_params is not None:
        params = join(params, jax.lax.stop_gradient(frozen_params))
    networks = _networks(loss, params, jax.lax.stop_gradient(base_params))
    hidden = run_student(loss.composition, networks, batch)
    networks, teacher = jax.lax.stop_gradient((networks, teacher_params))
    teacher_hidden = run_teacher(loss.teacher, teacher, batch)
    objective, targets, first = loss.objective, arrays.targets, {}
    if objective.first_pass:
        states = jax.lax.stop_gradient(hidden), teacher_hidden
        first = _first_pass(loss, networks, teacher, states, targets)
    weights = dict(objective.weigh(batch, first))
    if loss.penalty_kind != "none":
        penalised = _penalised(loss, arrays).astype(jnp.float32)
        weights[f"value_{loss.penalty_kind}"] = penalty_scale * penalised
    if loss.depths_distillation:
        scale = loss.depths_distillation * denominator / jnp.maximum(counts.loss_tokens, 1.0)
        weights["depth_kl"] = scale * jnp.asarray(batch.loss_mask).astype(jnp.float32)
    rows, length = targets.shape
    if length > loss.chunk_length:
        head = copy_head(loss.trained, head, rows=rows)
    summed: Any = chunked_sum(
        functools.partial(_chunk_loss, loss, _score_names(loss, weights, with_base=with_base)),
        head,
        *_split(loss, hidden, (teacher_hidden, targets, weights), networks, teacher),
    )
    total, scores = summed
    return total, denominator, _sums(loss, batch, join_positions(length, scores), weights)


def first_pass_scores(
    loss: Loss,
    params: Params,
    base_params: Params | None,
    batch: Batch,
    teacher_params: ComposedParams | None = None,
    frozen_params: Params | None = None,
) -> dict[str, Float32[Array, "B T"]]:
    """The scores that the objective's weights depend on, of a batch that is trained on later.

    Args:
        loss: the static half.
        params: parameters of the trained network.
        base_params: frozen parameters of the base; None iff a model is trained without one.
        batch: one micro-batch, arrays [B T].
        teacher_params: of the teacher; None iff the loss has none.
        frozen_params: as in `loss_sum`.

    Returns:
        Name → score, for each of the objective's `first_pass`.
    """
    if frozen_params is not None:
        params = join(params, frozen_params)
    networks, targets = _networks(loss, params, base_params), jnp.asarray(batch.targets)
    hidden = run_student(loss.composition, networks, batch)
    states = hidden, run_teacher(loss.teacher, teacher_params, batch)
    return _first_pass(loss, networks, teacher_params, states, targets)


def _networks(loss: Loss, params: Params, base_params: Params | None) -> ComposedParams:
    if base_params is None:
        return ComposedParams(params)
    unknown = jnp.asarray(loss.unknown_ids, jnp.int32) if loss.unknown_ids else None
    return ComposedParams(base_params, (ValueArrays(params, unknown),))


def _with_head(loss: Loss, networks: ComposedParams, head: Params) -> ComposedParams:
    """The networks, with `head` as the head of the trained one."""
    if not loss.has_base:
        return networks._replace(base=networks.base | head)
    trained, *others = networks.values
    return networks._replace(values=(trained._replace(params=trained.params | head), *others))


def _penalised(loss: Loss, batch: Any) -> Bool[Array, "*A B T"]:
    real = batch.token_mask
    return jnp.ones_like(real) if loss.penalty_positions == "all" else real


def _score_names(loss: Loss, weights: Mapping[str, Array], *, with_base: bool) -> tuple[str, ...]:
    names = [*loss.objective.scores, *loss.objective.monitored, *weights]
    if loss.has_base:
        names += ["value_l1", *(loss.objective.evaluated if with_base else ())]
    return tuple(dict.fromkeys(names))


def _sums(
    loss: Loss, batch: Any, scores: Mapping[str, Array], weights: Mapping[str, Array]
) -> Sums:
    zero = jnp.zeros((), jnp.float32)

    def over(mask: Array, name: str) -> Float32[Array, ""]:
        return masked_sum(mask, scores[name]) if name in scores else zero

    objective = loss.objective
    own = jax.lax.stop_gradient(dict(objective.sums(batch, scores)))
    if objective.loss is None:
        value = sum((weighted_sum(weights[name], scores[name]) for name in objective.scores), zero)
    else:
        value = objective.loss(batch, scores)
    return own | {
        "loss": value,
        "penalty": over(_penalised(loss, batch), f"value_{loss.penalty_kind}"),
        "magnitude": over(batch.token_mask, "value_l1"),
        **({"depth_kl": over(batch.loss_mask, "depth_kl")} if "depth_kl" in scores else {}),
        "loss_tokens": jnp.sum(batch.loss_mask, dtype=jnp.float32),
        "real_tokens": jnp.sum(batch.token_mask, dtype=jnp.float32),
    }


def _first_pass(
    loss: Loss,
    networks: ComposedParams,
    teacher: ComposedParams | None,
    states: tuple[HiddenStates, HiddenStates | None],
    targets: Array,
) -> dict[str, Array]:
    """The scores that weights depend on, chunk by chunk, without a gradient."""
    strengths = jnp.ones((1, len(loss.composition.values)), jnp.float32)

    def one(chunk: Any) -> dict[str, Array]:
        (hidden, teacher_hidden), targets = chunk
        if loss.depths_distillation:
            mixed, _ = _by_depth(loss, hidden.values[0])
            hidden = hidden._replace(values=(mixed, *hidden.values[1:]))
        scores = score_positions(
            loss.composition,
            networks,
            hidden,
            targets,
            strengths=strengths,
            names=loss.objective.first_pass,
            temperature=loss.objective.temperature,
            teacher_logits=teacher_logits(
                loss.teacher, loss.teacher_strengths, teacher, teacher_hidden
            ),
        )
        return _of_trained(scores)

    scores = jax.lax.map(one, split_positions(loss.chunk_length, (states, targets)))
    return join_positions(targets.shape[1], scores)


def _split(
    loss: Loss,
    hidden: HiddenStates,
    others: Any,
    networks: ComposedParams,
    teacher: ComposedParams | None,
) -> tuple[Array, Frozen]:
    """The trained network's states in chunks [C B t D], and everything else that a chunk reads."""
    trained, rest = hidden.base, None
    if loss.has_base:
        trained, *values = hidden.values
        rest = hidden._replace(values=tuple(values))
    trained, positions = split_positions(
        loss.chunk_length, (trained, jax.lax.stop_gradient((rest, *others)))
    )
    return trained, Frozen(networks, teacher, positions)


def _chunk_loss(
    loss: Loss, names: tuple[str, ...], head: Params, trained: Array, frozen: Frozen
) -> tuple[Float32[Array, ""], dict[str, Array]]:
    """Loss sum of one chunk of positions, and its scores."""
    rest, teacher_hidden, targets, weights = frozen.positions
    trained, late = _by_depth(loss, trained)
    hidden = HiddenStates(trained, ())
    if loss.has_base:
        hidden = rest._replace(values=(trained, *rest.values))
    scores = _of_trained(
        score_positions(
            loss.composition,
            _with_head(loss, frozen.params, head),
            hidden,
            targets,
            strengths=jnp.ones((1, len(loss.composition.values)), jnp.float32),
            names=names,
            temperature=loss.objective.temperature,
            teacher_logits=teacher_logits(
                loss.teacher, loss.teacher_strengths, frozen.teacher, teacher_hidden
            ),
            late_hidden=late,
        )
    )
    zero = jnp.zeros((), jnp.float32)
    total = sum((weighted_sum(weight, scores[name]) for name, weight in weights.items()), zero)
    return total, jax.lax.stop_gradient(scores)


def _by_depth(loss: Loss, states: Array) -> tuple[Array, list[Array]]:
    """What the head of the trained network reads, and what it could read of each late layer."""
    count = loss.trained.arch.head_depths if loss.depths_distillation else 1
    mixed, *late = jnp.split(states, count, axis=-1)
    return mixed, late


def _of_trained(scores: dict[str, Array]) -> dict[str, Array]:
    """Reduce scores per value network, [B T M], to those of the trained one."""
    return {name: score[..., 0] if score.ndim == 3 else score for name, score in scores.items()}
