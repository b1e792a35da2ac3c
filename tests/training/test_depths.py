"""A value network whose head reads several depths: its loss, and whole runs, one on a mesh."""

import dataclasses
import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.checkpoint import load_value
from ivl_jax.checkpoint.__main__ import main as checkpoint_command
from ivl_jax.composed.network import Composition, Network
from ivl_jax.composition import SCHEMES
from ivl_jax.config import (
    ConfigError,
    LoraConfig,
    MeshConfig,
    StepConfig,
    TrainConfig,
    ValueConfig,
    check_train_config,
    unused_options,
)
from ivl_jax.decoding.compose import compose
from ivl_jax.model.decoder import build_decoder, hidden_states, logits_from_hidden
from ivl_jax.sharding import single_device_mesh
from ivl_jax.training.loop import run
from ivl_jax.training.loss import Loss, count_tokens, loss_sum
from ivl_jax.training.models import choose_models
from ivl_jax.weights.language_model import load_language_model
from tests.training.runs import records
from tests.training.tiny import VOCAB, make_arch, make_batch, make_params, on_device

# make_mesh says that one of eight virtual devices is used.
pytestmark = pytest.mark.usefixtures("caplog")
DEPTHS, WEIGHT = 3, 0.3
PLAIN = make_arch(num_hidden_layers=3)
ARCH = dataclasses.replace(PLAIN, head_depths=DEPTHS)
BASE, FRESH = make_params(PLAIN, 0), make_params(ARCH, 1)
ROUTED = FRESH | {
    "depths": jax.tree.map(
        lambda leaf: 0.2 * jax.random.normal(jax.random.key(leaf.ndim), leaf.shape),
        FRESH["depths"],
    )
}
BATCH = on_device(make_batch())


def make_loss(arch=ARCH, **overrides):
    weight = WEIGHT if arch.head_depths > 1 else 0.0
    value = build_decoder(arch, all_depths=arch.head_depths > 1)
    networks = (
        Network(build_decoder(PLAIN), PLAIN, VOCAB),
        (Network(value, arch, VOCAB, scheme=SCHEMES["residual"]),),
    )
    options = {"penalty_kind": "l1", "penalty_weight": 0.7, "depths_distillation": weight}
    return Loss(Composition(*networks), **(options | overrides))


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(static, params, batch):
    def mean(params):
        counts = count_tokens(static, batch)
        total, denominator, sums = loss_sum(static, params, BASE, batch, counts=counts)
        return total / denominator, sums

    return jax.value_and_grad(mean, has_aux=True)(params)


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@jax.jit
def logits_by_depth(params):
    """Base logits; value logits of the mixture, then of each late layer alone."""
    where = {"positions": BATCH.positions, "segment_ids": BATCH.segment_ids}
    graphdef, plain = build_decoder(ARCH, all_depths=True), build_decoder(PLAIN)
    states, _ = hidden_states(graphdef, params, BATCH.tokens, **where)
    each = [logits_from_hidden(graphdef, params, one) for one in jnp.split(states, DEPTHS, -1)]
    base, _ = hidden_states(plain, BASE, BATCH.tokens, **where)
    return logits_from_hidden(plain, BASE, base), each


def test_the_loss_is_its_definition():
    (loss, sums), _ = loss_and_gradient(make_loss(), ROUTED, BATCH)
    base, each = logits_by_depth(ROUTED)
    base, mixed, *late = (np.asarray(logits, np.float64)[..., :VOCAB] for logits in (base, *each))
    log_p = log_softmax(base + mixed)
    mask, real = np.asarray(BATCH.loss_mask), np.asarray(BATCH.segment_ids) > 0
    nll = -np.take_along_axis(log_p, np.asarray(BATCH.targets)[..., None], -1)[..., 0]
    kl = np.mean(
        [(np.exp(log_p) * (log_p - log_softmax(base + one))).sum(-1) for one in late], axis=0
    )
    expected = (
        nll[mask].mean() + 0.7 * np.abs(mixed).mean(-1)[real].mean() + WEIGHT * kl[mask].mean()
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(sums["depth_kl"] / sums["loss_tokens"]) == pytest.approx(kl[mask].mean(), rel=1e-5)
    assert kl[mask].mean() > 0.01


@pytest.mark.parametrize("chunk_length", [5, 1])
def test_chunks_of_positions_give_the_same_loss_and_gradient(chunk_length):
    whole, gradient = loss_and_gradient(make_loss(), ROUTED, BATCH)
    parts, same = loss_and_gradient(make_loss(chunk_length=chunk_length), ROUTED, BATCH)
    assert float(parts[0]) == pytest.approx(float(whole[0]), rel=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), same, gradient
    )


def test_without_distillation_a_fresh_head_has_the_loss_and_gradient_of_the_last_layer_alone():
    alone = make_loss(dataclasses.replace(ARCH, head_depths=1))
    plain = {name: part for name, part in FRESH.items() if name != "depths"}
    (expected, _), of_plain = loss_and_gradient(alone, plain, BATCH)
    networks = make_loss().composition
    value = replace(networks.values[0], graphdef=build_decoder(ARCH))
    unweighted = replace(
        make_loss(), composition=replace(networks, values=(value,)), depths_distillation=0.0
    )
    (loss, sums), gradient = loss_and_gradient(unweighted, FRESH, BATCH)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert "depth_kl" not in sums
    routed = gradient.pop("depths")["router"]
    assert all(np.abs(leaf).min() > 0 for leaf in jax.tree.leaves(routed))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-7), gradient, of_plain
    )


def test_the_distillation_teaches_late_layers_and_not_what_they_are_taught():
    static = make_loss(penalty_kind="none", penalty_weight=0.0, depths_distillation=1e4)
    _, gradient = loss_and_gradient(static, FRESH, BATCH)
    _, without = loss_and_gradient(replace(static, depths_distillation=1e-9), FRESH, BATCH)
    taught = jax.tree.map(lambda one, other: np.abs(one - other).max(), gradient, without)
    assert np.min(taught["depths"]["norm_offset"]) > 1
    assert max(jax.tree.leaves(taught["layers"][1])) > 1
    # Only the teacher reads the last layer.
    assert max(jax.tree.leaves(taught["layers"][2])) < 1e-4


@pytest.fixture
def two_layers(tiny_config, tiny_pair) -> TrainConfig:
    """The tiny config with a value network of two layers, both read by its head."""
    value = ValueConfig(path=str(tiny_pair / "base"), depths=2)
    return replace(tiny_config, value=value, step=StepConfig(max_steps=6, batch_size=4))


def test_a_run_starts_as_one_with_the_last_layer_and_its_folder_has_the_head(
    two_layers, tiny_pair, tmp_path, capsys
):
    result = run(replace(two_layers, mesh=MeshConfig(fsdp=2, tensor=2)))
    one = replace(
        two_layers, run_dir=str(tmp_path / "one"), value=replace(two_layers.value, depths=1)
    )
    plain = run(one)
    first, same = (records(each.run_dir)[0]["held_out"] for each in (result, plain))
    assert first["nll"] == pytest.approx(same["nll"], rel=1e-5)
    assert "depth_kl" not in same
    assert result.held_out["depth_kl"] < first["depth_kl"]
    assert result.held_out["nll"] < first["nll"] - 0.1
    value = load_value(result.output)
    assert value.arch.head_depths == 2
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(value.params["depths"]))
    model = compose(load_language_model(tiny_pair / "base"), value)
    assert model.generate("3 + 3?", max_new_tokens=4).text is not None
    out = str(tmp_path / "hf")
    assert checkpoint_command(["export-hf", str(result.output), out]) == 1
    assert "a mixture of the last 2 layers (value.depths), which no" in capsys.readouterr().err


@pytest.mark.parametrize("init", ["base", "scratch"])
def test_every_initialisation_may_have_several_depths(two_layers, init):
    path = "" if init == "base" else two_layers.value.path
    value = replace(two_layers.value, init=init, path=path)
    models = choose_models(replace(two_layers, value=value), single_device_mesh())
    assert models.arch.head_depths == 2


@pytest.mark.slow
def test_an_adapter_has_its_own_router_which_its_folder_keeps(two_layers):
    value = replace(two_layers.value, lora=LoraConfig(rank=2, alpha=4.0))
    result = run(replace(two_layers, value=value))
    found = load_value(result.output)
    assert found.arch.head_depths == 2
    assert np.abs(found.params["depths"]["router"]["kernel"]).max() > 0
    further = replace(value, path=str(result.output), depths=1)
    with pytest.raises(ConfigError, match=r"trained with value\.depths = 2, got 1: set the former"):
        choose_models(replace(two_layers, value=further), single_device_mesh())


def test_more_depths_than_layers_are_refused(two_layers):
    value = replace(two_layers.value, depths=3)
    with pytest.raises(ConfigError, match=r"value\.depths = 3: the value network has 2 layers"):
        choose_models(replace(two_layers, value=value), single_device_mesh())


def test_depths_need_a_value_network_with_layers(two_layers):
    with pytest.raises(ConfigError, match=r"value\.depths = 2 needs layers, and value\.connection"):
        ValueConfig(connection="linear", init="scratch", depths=2)
    with pytest.raises(ConfigError, match=r"value\.depths must be ≥ 1, got 0"):
        ValueConfig(depths=0)
    with pytest.raises(ConfigError, match=r"value\.depths_distillation must be ≥ 0, got -1"):
        ValueConfig(depths_distillation=-1.0)
    with pytest.raises(ConfigError, match=r"value\.depths = 2 cannot be combined with method = "):
        check_train_config(replace(two_layers, method="sft"))
    unused = replace(two_layers, value=ValueConfig(depths_distillation=0.5))
    assert "value.depths_distillation = 0.5 has no effect with value.depths = 1" in str(
        unused_options(unused)
    )
