"""One optimizer step and one evaluation step, each a single compiled program.

In: the train state, the frozen base's parameters, a batch. Out: the next state and metrics. The
same program trains a value network beside its base and, where the objective has no base, a model
alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32, Key

from ivl_jax.data.batching import Batch
from ivl_jax.model.decoder import Params
from ivl_jax.sharding import batch_sharding, replicated
from ivl_jax.training.objective import LossAux, Objective, count_tokens, loss_sum


class TrainState(NamedTuple):
    """Everything that a step changes; the base model is no part of it."""

    step: Int32[Array, ""]  # optimizer steps taken
    params: Params  # parameters of the trained model, float32 master weights
    opt_state: optax.OptState  # moments of `params` only
    key: Key[Array, ""]  # the run's key; whatever draws folds the step into it


class StepMetrics(NamedTuple):
    """Means over the global batch of one step, float32 scalars."""

    loss: Float32[Array, ""]  # nll + λ·penalty
    nll: Float32[Array, ""]  # nats per counted token, of the composed logits
    accuracy: Float32[Array, ""]  # share of counted tokens with the largest composed logit
    penalty: Float32[Array, ""]  # mean |z| or z² over penalised positions; 0 without a penalty
    mean_abs_value: Float32[Array, ""]  # mean |z_value| over real tokens and vocabulary
    gradient_norm: Float32[Array, ""]  # global norm before clipping
    learning_rate: Float32[Array, ""]  # used in this step
    loss_tokens: Float32[Array, ""]  # counted tokens of the global batch
    real_tokens: Float32[Array, ""]  # tokens of the global batch that are not padding


TrainStep = Callable[[TrainState, Params | None, Batch], tuple[TrainState, StepMetrics]]
EvalStep = Callable[[Params, Params | None, Batch], LossAux]


def state_shardings(
    abstract_params: Params,
    param_shardings: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Decide where each array of a train state lives: moments beside their parameters.

    Args:
        abstract_params: shapes of the parameters.
        param_shardings: their shardings, same structure.
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
    """Make the state of step 0 around parameters; the moments are born sharded.

    Args:
        params: float32 parameters, placed as `shardings.params`; donated.
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
        key: a key of the run's kind.
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
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    shardings: TrainState,
    base_shardings: Params | None,
    mesh: Mesh,
) -> TrainStep:
    """Compile one optimizer step; the only place where training is jitted.

    Args:
        objective: the static half of the loss.
        optimizer: the optax chain.
        schedule: the learning rate the chain follows, reported in the metrics.
        shardings: of the state.
        base_shardings: of the frozen base's parameters; None without a base.
        mesh: all of them live on it.

    Returns:
        A function (state, base parameters or None, batch [A B T]) → (state, metrics). A is the
        number of micro-batches: their gradients are summed by a scan and divided once, by the
        counts of the whole global batch. The state is donated, the base never.
    """

    def step(
        state: TrainState, base_params: Params | None, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        gradient, denominator, aux, counts = _summed_gradient(
            objective, state.params, base_params, batch, shardings.params
        )
        gradient = jax.tree.map(lambda leaf: leaf / denominator.astype(leaf.dtype), gradient)
        # optax mixes dtypes and ranks by design; ours stay strict where a test asks for it.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            norm = optax.tree.norm(gradient)
            rate = jnp.asarray(schedule(state.step), jnp.float32)
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, changes)
        penalty = aux.penalty / jnp.maximum(counts.penalty_tokens, 1.0)
        nll = aux.nll / denominator
        metrics = StepMetrics(
            loss=nll + objective.penalty_weight * penalty,
            nll=nll,
            accuracy=aux.correct / denominator,
            penalty=penalty,
            mean_abs_value=aux.magnitude / jnp.maximum(aux.real_tokens, 1.0),
            gradient_norm=norm,
            learning_rate=rate,
            loss_tokens=aux.loss_tokens,
            real_tokens=aux.real_tokens,
        )
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return jax.jit(
        step,
        in_shardings=(shardings, base_shardings, batch_sharding(mesh, micro_batched=True)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def make_eval_step(
    objective: Objective, *, shardings: Params, base_shardings: Params | None, mesh: Mesh
) -> EvalStep:
    """Compile one evaluation step: base alone and base + value on the same batch.

    Args:
        objective: the static half of the loss.
        shardings: of the trained parameters.
        base_shardings: of the base's parameters; None without a base.
        mesh: all of them live on it.

    Returns:
        A function (parameters, base parameters or None, batch [B T]) → sums; nothing is donated.
    """

    def evaluate(params: Params, base_params: Params | None, batch: Batch) -> LossAux:
        counts = count_tokens(objective, batch)
        _, _, aux = loss_sum(
            objective, params, base_params, batch, counts=counts, with_base=base_params is not None
        )
        return aux

    return jax.jit(
        evaluate,
        in_shardings=(shardings, base_shardings, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def split_micro_batches(batch: Batch, count: int) -> Batch:
    """Reshape a batch [B T] to `count` micro-batches [A B/A T] (NumPy: no copy)."""
    return jax.tree.map(lambda rows: rows.reshape(count, -1, *rows.shape[1:]), batch)


def _summed_gradient(
    objective: Objective,
    params: Params,
    base_params: Params | None,
    batch: Batch,
    shardings: Params,
) -> tuple[Params, Array, LossAux, Any]:
    """Σ over micro-batches of the gradient of loss_sum, the one denominator, and the aux sums."""
    counts = count_tokens(objective, batch)

    def loss(params: Params, micro: Batch) -> tuple[Array, tuple[Array, LossAux]]:
        total, denominator, aux = loss_sum(objective, params, base_params, micro, counts=counts)
        return total, (denominator, aux)

    def one(micro: Batch) -> tuple[Params, Array, LossAux]:
        (_, (denominator, aux)), gradient = jax.value_and_grad(loss, has_aux=True)(params, micro)
        # Where the parameters are split, so are their gradients: reduce-scatter, not all-reduce.
        return jax.lax.with_sharding_constraint(gradient, shardings), denominator, aux

    first = jax.tree.map(lambda rows: rows[0], batch)
    if batch.tokens.shape[0] == 1:
        return *one(first), counts

    def body(total: tuple[Params, LossAux], micro: Batch) -> tuple[Any, Array]:
        gradient, denominator, aux = one(micro)
        return jax.tree.map(jnp.add, total, (gradient, aux)), denominator

    shapes = jax.eval_shape(one, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0], shapes[2]))
    (gradient, aux), denominators = jax.lax.scan(body, zeros, batch)
    return gradient, denominators[0], aux, counts
