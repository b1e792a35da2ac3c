"""The step: one trace, exact accumulation, frozen base, equal numbers on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.composed.network import Layout
from ivl_jax.model.decoder import abstract_params, untie_head, zero_head
from ivl_jax.sharding import (
    LAYOUTS,
    bytes_per_device,
    make_mesh,
    parameter_shardings,
    place_batch,
    single_device_mesh,
)
from ivl_jax.training.optimizer import (
    Schedules,
    make_optimizer,
    make_penalty_schedule,
    make_schedule,
)
from ivl_jax.training.step import (
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    split_micro_batches,
    state_shardings,
)
from tests.training.tiny import VOCAB_ROWS, make_arch, make_batch, make_loss, make_params

ARCH = make_arch()
STEPS = 4


def make_adamw(total_steps=STEPS):
    schedule = make_schedule(
        learning_rate=1e-2,
        schedule="cosine",
        warmup_fraction=0.25,
        final_fraction=0.1,
        total_steps=total_steps,
    )
    return schedule, make_optimizer(
        schedule, weight_decay=0.01, beta1=0.9, beta2=0.999, epsilon=1e-8, max_gradient_norm=1.0
    )


class Run:
    """Base, state and step on one mesh."""

    def __init__(
        self, mesh, *, layout="full", base_layout="full", alone=False, penalty=None, **loss
    ):
        self.mesh = mesh
        rules, base_rules = LAYOUTS[layout], LAYOUTS[base_layout]
        shapes = abstract_params(ARCH, vocab_rows=VOCAB_ROWS)
        params_at = parameter_shardings(shapes, mesh, rules)
        self.base_at = None if alone else parameter_shardings(shapes, mesh, base_rules)
        loss |= {"chunk_length": 5, "layout": Layout(mesh, rules)}
        if not alone:
            loss["base_layout"] = Layout(mesh, base_rules)
        self.loss = make_loss(ARCH, alone=alone, **loss)
        schedule, optimizer = make_adamw()
        schedules = Schedules(schedule, penalty)
        self.shardings = state_shardings(shapes, params_at, optimizer, mesh)
        self.base = None if alone else jax.device_put(make_params(ARCH, 0), self.base_at)
        params = jax.device_put(make_params(ARCH, 1), params_at)
        self.state = init_state(params, optimizer, jax.random.key(7), self.shardings)
        self.abstract = abstract_state(shapes, optimizer, jax.random.key(7), self.shardings)
        self.step = make_train_step(
            self.loss,
            optimizer,
            schedules,
            shardings=self.shardings,
            base_shardings=self.base_at,
            mesh=mesh,
        )

    def train(self, *, micro_batches=1, steps=STEPS, rows=8):
        history = []
        for number in range(steps):
            batch = split_micro_batches(make_batch(number, rows=rows), micro_batches)
            batch = place_batch(batch, self.mesh, micro_batched=True)
            self.state, metrics = self.step(self.state, self.base, batch)
            history.append({name: float(value) for name, value in metrics.items()})
        return history


@pytest.fixture(scope="module")
def reference():
    run = Run(single_device_mesh())
    before = jax.device_get(run.base)
    return run, run.train(), before


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_loss_falls_on_a_batch_it_sees_again():
    run = Run(single_device_mesh(), penalty_kind="none")
    batch = place_batch(split_micro_batches(make_batch(), 1), run.mesh, micro_batched=True)
    losses = []
    for _ in range(STEPS):
        run.state, metrics = run.step(run.state, run.base, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05


def test_base_stays_bitwise_unchanged_and_has_no_optimizer_state(reference):
    run, _, before = reference
    for old, new in zip(leaves(before), leaves(run.base), strict=True):
        np.testing.assert_array_equal(old, new)
    sizes = {
        name: sum(leaf.size for leaf in leaves(getattr(run.state, name)))
        for name in ("params", "opt_state")
    }
    counters = 2
    assert sizes["opt_state"] == 2 * sizes["params"] + counters


def test_the_step_is_traced_once(reference):
    run, _, _ = reference
    assert run.step._cache_size() == 1


def test_metrics_are_the_means_they_say(reference):
    _, history, _ = reference
    batch = make_batch(0)
    first = history[0]
    assert first["loss"] == pytest.approx(first["nll"] + 0.7 * first["penalty"], rel=1e-6)
    assert first["penalty"] == pytest.approx(first["mean_abs_value"], rel=1e-6)
    assert first["loss_tokens"] == batch.loss_mask.sum()
    assert first["real_tokens"] == (batch.segment_ids > 0).sum()
    assert first["learning_rate"] == pytest.approx(1e-2)
    assert 0 <= first["accuracy"] <= 1
    assert first["gradient_norm"] > 0


@pytest.mark.parametrize("micro_batches", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_micro_batches_of_uneven_token_counts_equal_one_large_batch(reference, micro_batches):
    whole, history, _ = reference
    run = Run(single_device_mesh())
    parts = run.train(micro_batches=micro_batches)
    counts = {int(part.sum()) for part in np.split(make_batch(0).loss_mask, micro_batches)}
    assert len(counts) > 1
    for one, many in zip(history, parts, strict=True):
        assert many == pytest.approx(one, rel=2e-5)
    for a, b in zip(leaves(run.state.params), leaves(whole.state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"),
    [
        (2, 2, 2),
        *(
            pytest.param(*mesh, marks=pytest.mark.slow)
            for mesh in [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 1, 2)]
        ),
    ],
)
def test_every_mesh_gives_the_numbers_of_one_device_and_holds_its_share(
    reference, data, fsdp, tensor
):
    _, history, _ = reference
    run = Run(make_mesh(data=data, fsdp=fsdp, tensor=tensor))
    for one, eight in zip(history, run.train(), strict=True):
        assert eight == pytest.approx(one, rel=1e-5)
    assert_holds_its_share(run, fsdp * tensor)


def assert_holds_its_share(run, ways):
    scales = ("norm", "scale")
    whole = split = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path((run.state.params, run.base)):
        if any(name in str(path) for name in scales):
            whole += leaf.nbytes
        else:
            split += leaf.nbytes
    # Matrices are split by fsdp · tensor; norm scales are whole. Moments are two more copies.
    moments = 2 * sum(
        leaf.nbytes // (1 if "norm" in str(path) else ways)
        for path, leaf in jax.tree_util.tree_leaves_with_path(run.state.params)
    )
    scalars = 4 + 2 * 4  # the step and two counters; the PRNG key is counted apart
    held = bytes_per_device((run.state._replace(key=jnp.zeros(())), run.base))
    on_every = whole + split // ways + moments + scalars
    assert len(held) == 8
    assert {bytes_ for device, bytes_ in held.items() if device} == {on_every}


def test_base_and_value_may_have_different_layouts_and_several_micro_batches(reference):
    _, history, _ = reference
    run = Run(
        make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4]), layout="fsdp", base_layout="tensor"
    )
    for one, four in zip(history, run.train(micro_batches=2), strict=True):
        assert four == pytest.approx(one, rel=2e-5)
    assert run.base["lm_head"]["kernel"].addressable_shards[0].data.shape == (16, 32)
    assert run.state.params["lm_head"]["kernel"].addressable_shards[0].data.shape == (8, 64)


@pytest.mark.parametrize(
    ("schedule", "shares"), [("linear_warmup", (0.25, 0.5)), ("linear_decay", (1.0, 0.75))]
)
def test_a_scheduled_penalty_takes_its_share_of_the_weight_at_each_step(schedule, shares):
    run = Run(single_device_mesh(), penalty=make_penalty_schedule(schedule, total_steps=STEPS))
    history = run.train(steps=2)
    for share, figures in zip(shares, history, strict=True):
        assert figures["penalty_weight"] == pytest.approx(0.7 * share)
        expected = figures["nll"] + 0.7 * share * figures["penalty"]
        assert figures["loss"] == pytest.approx(expected, rel=1e-6)
    constant = Run(single_device_mesh(), penalty_weight=0.7 * shares[0])
    first = constant.train(steps=1)[0]
    assert history[0]["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-5)
    assert "penalty_weight" not in first


def test_a_constant_penalty_has_no_schedule_and_the_others_end_at_their_bounds():
    assert make_penalty_schedule("constant", total_steps=3) is None
    for name, ends in (("linear_warmup", (1 / 3, 1.0)), ("linear_decay", (1.0, 1 / 3))):
        made = make_penalty_schedule(name, total_steps=3)
        assert [float(made(step)) for step in (0, 2)] == pytest.approx(ends)
        assert float(make_penalty_schedule(name, total_steps=1)(0)) == 1.0


def test_a_model_trained_alone_takes_the_same_step():
    run = Run(single_device_mesh(), alone=True)
    history = run.train(steps=2)
    assert history[0]["loss"] == history[0]["nll"]
    assert history[0]["mean_abs_value"] == 0.0


def test_abstract_state_describes_the_state_exactly(reference):
    run, _, _ = reference

    def describe(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)

    assert describe(run.abstract) == describe(run.state)


def test_evaluation_at_step_zero_with_a_zeroed_head_equals_the_base():
    mesh = single_device_mesh()
    run = Run(mesh)
    evaluate = make_eval_step(
        run.loss, shardings=run.shardings.params, base_shardings=run.base_at, mesh=mesh
    )
    aux = evaluate(zero_head(untie_head(run.base)), run.base, place_batch(make_batch(), mesh))
    assert float(aux["nll"]) == float(aux["base_nll"]) > 0
    assert float(aux["magnitude"]) == 0
