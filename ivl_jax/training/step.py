"""One optimizer step and one evaluation step, each a single compiled program.

In: the train state, the frozen base's parameters, a batch. Out: the next state and metrics. The
same program trains a value network with its base or, if the loss has no base, a model alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32, Key

from ivl_jax.composed.network import ComposedParams
from ivl_jax.data.batching import Batch
from ivl_jax.model.decoder import Params
from ivl_jax.sharding import batch_sharding, replicated
from ivl_jax.training.augmentation import augment
from ivl_jax.training.loss import Loss, Sums, count_tokens, first_pass_scores, loss_sum
from ivl_jax.training.optimizer import Schedules


class TrainState(NamedTuple):
    """Everything that a step changes; the base model is not part of it."""

    step: Int32[Array, ""]  # optimizer steps taken
    params: Params  # parameters of the trained model, float32 master weights
    opt_state: optax.OptState  # moments of `params` only
    key: Key[Array, ""]  # the run's key; random draws fold the step into it


StepMetrics = dict[str, Float32[Array, ""]]
"""Figures of one step over its global batch: `loss` (penalty included), the objective's figures
(`nll` in nats per counted token, `accuracy`, …), `penalty` (mean |z| or z² over penalised
positions), `mean_abs_value` (over real tokens and vocabulary), `depth_kl` (if depths are distilled,
nats per counted token), `gradient_norm` (global, before clipping), `learning_rate`, `loss_tokens`
and `real_tokens` (counted, and not padding), and `penalty_weight` if λ has a schedule. With
augmentation they are those of the varied base."""
TrainStep = Callable[..., tuple[TrainState, StepMetrics]]
"""(state, base parameters or None, batch[, parameters of the teacher or None[, frozen parameters of
the trained network]]) → (state, metrics)."""
EvalStep = Callable[..., Sums]
"""(parameters, base parameters or None, batch[, …]) → sums; the rest as in `TrainStep`."""
FirstPass = Callable[..., Mapping[str, Array]]
"""(parameters, base parameters or None, batch [A B T][, …]) → scores [A B T]; the rest as in
`TrainStep`."""


def state_shardings(
    abstract_params: Params,
    param_shardings: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Decide where each array of a train state lives: moments are sharded like their parameters.

    Args:
        abstract_params: shapes of the parameters.
        param_shardings: their shardings, in the same structure.
        optimizer: the optax chain.
        mesh: scalars are replicated on it.

    Returns:
        A `TrainState` of `NamedSharding`s.
    """
    whole: Any = replicated(mesh)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract_params),
        param_shardings,
        transform_non_params=lambda _: whole,
    )
    return TrainState(step=whole, params=param_shardings, opt_state=opt_state, key=whole)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    shardings: TrainState,
) -> TrainState:
    """Make the state of step 0 from parameters; the moments are created sharded.

    Args:
        params: float32 parameters, sharded as `shardings.params`; donated.
        optimizer: the optax chain.
        key: the run's typed PRNG key.
        shardings: from `state_shardings`.

    Returns:
        The state at step 0.
    """

    def make(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)

    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)


def abstract_state(
    abstract_params: Params,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    shardings: TrainState,
) -> TrainState:
    """Describe a state by shape, dtype and sharding: what a checkpoint is restored into.

    Args:
        abstract_params: shapes of the parameters.
        optimizer: the optax chain.
        key: a PRNG key of the same type as the run's.
        shardings: from `state_shardings`.

    Returns:
        A `TrainState` of `ShapeDtypeStruct`s with shardings; allocates nothing.
    """
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(
        step=step,
        params=abstract_params,
        opt_state=jax.eval_shape(optimizer.init, abstract_params),
        key=jax.eval_shape(lambda: key),
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedules: Schedules,
    *,
    shardings: TrainState,
    base_shardings: Params | None,
    mesh: Mesh,
    teacher_shardings: ComposedParams | None = None,
    frozen_shardings: Params | None = None,
) -> TrainStep:
    """Compile one optimizer step; the only place where training is jitted.

    Args:
        loss: its static half.
        optimizer: the optax chain.
        schedules: of the learning rate that the chain follows, and of λ; in the metrics.
        shardings: of the state.
        base_shardings: of the frozen base's parameters; None without a base.
        mesh: the mesh of all these shardings.
        teacher_shardings: of the teacher's parameters; None without a teacher.
        frozen_shardings: of the trained network's frozen parameters; None unless an adapter is
            trained.

    Returns:
        A function (state, base parameters or None, batch [A B T]) → (state, metrics), with the
        teacher's parameters as a fourth argument if the loss has a teacher, and the frozen
        parameters of the trained network as a fifth if there are any. A is the number of
        micro-batches: their gradients are summed by a scan and divided once, by the counts of the
        whole global batch. The state is donated, the frozen parameters never are.
    """

    def step(
        state: TrainState,
        base_params: Params | None,
        batch: Batch,
        teacher_params: ComposedParams | None = None,
        frozen_params: Params | None = None,
    ) -> tuple[TrainState, StepMetrics]:
        frozen = (base_params, teacher_params, frozen_params)
        if loss.augmentation is not None:
            batch = augment(loss.augmentation, batch, jax.random.fold_in(state.key, state.step))
        share = 1.0 if schedules.penalty is None else _at(schedules.penalty, state.step)
        gradient, denominator, sums, counts = _summed_gradient(
            loss, state.params, frozen, batch, shardings.params, penalty_share=share
        )
        gradient = jax.tree.map(lambda leaf: leaf / denominator.astype(leaf.dtype), gradient)
        # optax mixes dtypes and ranks by design; our own code stays strict in tests.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            norm = optax.tree.norm(gradient)
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, changes)
        penalty = sums["penalty"] / jnp.maximum(counts.penalty_tokens, 1.0)
        added = loss.penalty_weight * share * penalty
        if loss.depths_distillation:
            added += (
                loss.depths_distillation * sums["depth_kl"] / jnp.maximum(counts.loss_tokens, 1.0)
            )
        metrics = {
            "loss": sums["loss"] / denominator + added,
            **quotients(loss, sums),
            "penalty": penalty,
            "gradient_norm": norm,
            "learning_rate": _at(schedules.learning_rate, state.step),
            "loss_tokens": sums["loss_tokens"],
            "real_tokens": sums["real_tokens"],
        }
        if schedules.penalty is not None:
            metrics["penalty_weight"] = loss.penalty_weight * share
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return jax.jit(
        step,
        in_shardings=(
            shardings,
            base_shardings,
            batch_sharding(mesh, micro_batched=True),
            *_given(teacher_shardings, frozen_shardings),
        ),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def make_eval_step(
    loss: Loss,
    *,
    shardings: Params,
    base_shardings: Params | None,
    mesh: Mesh,
    teacher_shardings: ComposedParams | None = None,
    frozen_shardings: Params | None = None,
) -> EvalStep:
    """Compile one evaluation step: base alone and base + value on the same batch.

    Args:
        loss: its static half.
        shardings: of the trained parameters.
        base_shardings: of the base's parameters; None without a base.
        mesh: the mesh of all these shardings.
        teacher_shardings: of the teacher's parameters; None without a teacher.
        frozen_shardings: as in `make_train_step`.

    Returns:
        A function (parameters, base parameters or None, batch [B T]) → sums, with the further
        arguments of the training step; nothing is donated.
    """

    def evaluate(
        params: Params,
        base_params: Params | None,
        batch: Batch,
        teacher_params: ComposedParams | None = None,
        frozen_params: Params | None = None,
    ) -> Sums:
        _, _, sums = loss_sum(
            loss,
            params,
            base_params,
            batch,
            counts=count_tokens(loss, batch),
            with_base=base_params is not None,
            teacher_params=teacher_params,
            frozen_params=frozen_params,
        )
        return sums

    return jax.jit(
        evaluate,
        in_shardings=(
            shardings,
            base_shardings,
            batch_sharding(mesh),
            *_given(teacher_shardings, frozen_shardings),
        ),
        out_shardings=replicated(mesh),
    )


def make_first_pass(
    loss: Loss,
    *,
    shardings: Params,
    base_shardings: Params | None,
    mesh: Mesh,
    teacher_shardings: ComposedParams | None = None,
    frozen_shardings: Params | None = None,
) -> FirstPass:
    """Compile the first pass of a batch that several steps train on; see `first_pass_scores`.

    Args:
        loss: its static half.
        shardings: of the trained parameters.
        base_shardings: of the base's parameters; None without a base.
        mesh: the mesh of all these shardings.
        teacher_shardings: of the teacher's parameters; None without a teacher.
        frozen_shardings: as in `make_train_step`.

    Returns:
        A function that gives the scores of all micro-batches; nothing is donated.
    """

    def scores(
        params: Params,
        base_params: Params | None,
        batch: Batch,
        teacher_params: ComposedParams | None = None,
        frozen_params: Params | None = None,
    ) -> Mapping[str, Array]:
        def one(micro: Batch) -> Mapping[str, Array]:
            return first_pass_scores(
                loss, params, base_params, micro, teacher_params, frozen_params
            )

        return jax.lax.map(one, batch)

    rows = batch_sharding(mesh, micro_batched=True)
    return jax.jit(
        scores,
        in_shardings=(
            shardings,
            base_shardings,
            rows,
            *_given(teacher_shardings, frozen_shardings),
        ),
        out_shardings=rows,
    )


def quotients(loss: Loss, sums: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a loss from its sums; those whose sums are missing are left out."""
    return {
        name: sums[total] / jnp.maximum(sums[count], 1.0)
        for name, (total, count) in loss.figures.items()
        if total in sums and count in sums
    }


def split_micro_batches(batch: Batch, count: int) -> Batch:
    """Reshape a batch [B T] to `count` micro-batches [A B/A T] (NumPy: no copy)."""
    return jax.tree.map(lambda rows: rows.reshape(count, -1, *rows.shape[1:]), batch)


def _at(schedule: optax.Schedule, step: Array) -> Float32[Array, ""]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jnp.asarray(schedule(step), jnp.float32)


def _given(
    *shardings: ComposedParams | Params | None,
) -> tuple[ComposedParams | Params | None, ...]:
    """Those of the optional arguments that a call has: up to the last one that is not None."""
    while shardings and shardings[-1] is None:
        shardings = shardings[:-1]
    return shardings


def _summed_gradient(
    loss: Loss,
    params: Params,
    frozen: tuple[Params | None, ComposedParams | None, Params | None],
    batch: Batch,
    shardings: Params,
    *,
    penalty_share: float | Array,
) -> tuple[Params, Array, Sums, Any]:
    """Σ over micro-batches of the gradient of loss_sum, the common denominator, and the sums."""
    counts = count_tokens(loss, batch)
    base_params, teacher_params, frozen_params = frozen

    def of_micro(params: Params, micro: Batch) -> tuple[Array, tuple[Array, Sums]]:
        total, denominator, sums = loss_sum(
            loss,
            params,
            base_params,
            micro,
            counts=counts,
            penalty_share=penalty_share,
            teacher_params=teacher_params,
            frozen_params=frozen_params,
        )
        return total, (denominator, sums)

    def one(micro: Batch) -> tuple[Params, Array, Sums]:
        gradient_of = jax.value_and_grad(of_micro, has_aux=True)
        (_, (denominator, sums)), gradient = gradient_of(params, micro)
        # Gradients are sharded like their parameters: reduce-scatter instead of all-reduce.
        return jax.lax.with_sharding_constraint(gradient, shardings), denominator, sums

    first = jax.tree.map(lambda rows: rows[0], batch)
    if batch.tokens.shape[0] == 1:
        return *one(first), counts

    def body(total: tuple[Params, Sums], micro: Batch) -> tuple[Any, Array]:
        gradient, denominator, sums = one(micro)
        return jax.tree.map(jnp.add, total, (gradient, sums)), denominator

    shapes = jax.eval_shape(one, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0], shapes[2]))
    (gradient, sums), denominators = jax.lax.scan(body, zeros, batch)
    return gradient, denominators[0], sums, counts
