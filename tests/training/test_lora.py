"""Training an adapter alone: the gradient of merged kernels, and runs that hold nothing else."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.checkpoint import ValueFolderError, load_value, read_value_metadata
from ivl_jax.checkpoint.__main__ import main as checkpoint_command
from ivl_jax.checkpoint.arrays import stored_leaves
from ivl_jax.composed.network import Composition, Layout, Network
from ivl_jax.composition import SCHEMES
from ivl_jax.config import ConfigError, LoraConfig, MeshConfig, TrainConfig, check_train_config
from ivl_jax.decoding.compose import compose
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import abstract_params, build_decoder
from ivl_jax.model.lora import adapter_shapes, init_adapter, join, merge
from ivl_jax.model.projection import KernelForm, Lora
from ivl_jax.sharding import DEFAULT_RULES, make_mesh, parameter_shardings, single_device_mesh
from ivl_jax.training.adapter import make_adapter
from ivl_jax.training.loop import run
from ivl_jax.training.loss import Loss, count_tokens, loss_sum
from ivl_jax.training.models import choose_models
from ivl_jax.training.optimizer import decay_mask, make_optimizer
from ivl_jax.training.setup import (
    make_run_mesh,
    place_trained,
    prepare,
    prepare_data,
    state_shapes,
)
from ivl_jax.weights.fingerprint import weights_fingerprint
from tests.training.conftest import save_tiny_model
from tests.training.runs import assert_same_run, crash_and_resume, records
from tests.training.tiny import VOCAB, make_arch, make_batch, make_params, on_device

# make_mesh says that some of eight virtual devices are used.
pytestmark = pytest.mark.usefixtures("caplog")
LORA = Lora(rank=2, alpha=4.0, targets="all-linear")


@pytest.fixture
def lora_config(tiny_config) -> TrainConfig:
    """Six steps of an adapter of the tiny value network."""
    lora = LoraConfig(rank=2, alpha=4.0)
    return replace(tiny_config, value=replace(tiny_config.value, lora=lora))


def make_lora_loss(arch, form, layout):
    base = Network(build_decoder(arch), arch, VOCAB, layout=layout)
    graphdef = build_decoder(arch, form=form)
    value = Network(graphdef, arch, VOCAB, scheme=SCHEMES["residual"], layout=layout)
    return Loss(Composition(base, (value,)), penalty_kind="l1", penalty_weight=0.7, chunk_length=5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_gradient_is_that_of_merged_kernels_also_on_a_mesh(tied):
    arch = make_arch(tie_word_embeddings=tied)
    base, frozen = make_params(make_arch(), 0), make_params(arch, 1)
    batch = on_device(make_batch())
    adapter = jax.tree.map(
        lambda leaf: leaf if leaf.any() else leaf + 0.3, init_adapter(arch, LORA, jax.random.key(2))
    )

    def total(adapter, frozen, base, *, merged, layout=None):
        form = KernelForm() if merged else KernelForm(lora=LORA)
        loss = make_lora_loss(arch, form, layout)
        options = {"counts": count_tokens(loss, batch)}
        if merged:
            whole = merge(join(adapter, frozen), LORA, dtype=jnp.float32)
            return loss_sum(loss, whole, base, batch, **options)[0]
        return loss_sum(loss, adapter, base, batch, frozen_params=frozen, **options)[0]

    def gradient(*trees, **options):
        return jax.jit(jax.value_and_grad(functools.partial(total, **options)))(*trees)

    base = base if not tied else make_params(arch, 0)
    expected = gradient(adapter, frozen, base, merged=True)
    found = gradient(adapter, frozen, base, merged=False)
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    trees = [jax.device_put(x, parameter_shardings(x, mesh)) for x in (adapter, frozen, base)]
    sharded = gradient(*trees, merged=False, layout=Layout(mesh, DEFAULT_RULES))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1])) > 0.1
    for one in (found, sharded):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), one, expected
        )


def test_the_train_state_of_a_value_of_a_billion_parameters_is_below_100_mb():
    """TinyLlama-1.1B, rank 8, all linear projections; parameters and both moments in float32."""
    arch = ArchConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        }
    )
    numbers = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(arch)))
    assert numbers > 1_000_000_000
    adapter = adapter_shapes(arch, Lora(8, 16.0, "all-linear"), scan_layers=True)
    optimizer = make_optimizer(
        lambda _: 1e-4,
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        max_gradient_norm=1.0,
    )
    moments = jax.eval_shape(optimizer.init, adapter)
    leaves = jax.tree.leaves((adapter, moments))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapter))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert 60_000_000 < held < 100_000_000
    assert all(jax.tree.leaves(decay_mask(adapter)))


def test_a_run_learns_and_saves_only_its_adapter_which_can_be_merged(
    lora_config, tiny_pair, tmp_path
):
    result = run(lora_config)
    first = records(result.run_dir)[0]["held_out"]
    assert result.held_out["nll"] < first["nll"] - 0.05

    state = stored_leaves(result.run_dir / "checkpoints" / "6" / "state")
    trained = {name.rsplit(".", 1)[1] for name in state if name.startswith("params.")}
    assert trained == {"lora_a", "lora_b"}
    assert not [name for name in state if "kernel" in name or "embedding" in name]
    record = read_value_metadata(result.output).adapter
    model = tiny_pair / "value"
    assert record["model"]["fingerprint"] == weights_fingerprint(model)
    assert record["model"]["name"] == str(model)
    value = load_value(result.output)
    assert value.metadata.steps == 6

    merged = tmp_path / "merged"
    assert checkpoint_command(["export-value", str(result.run_dir), str(merged), "--merge"]) == 0
    again = tmp_path / "again"
    assert checkpoint_command(["export-value", str(result.output), str(again), "--merge"]) == 0
    for folder in (merged, again):
        assert read_value_metadata(folder).adapter is None
        jax.tree.map(np.testing.assert_array_equal, load_value(folder).params, value.params)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(lora_config, monkeypatch, tmp_path):
    whole = run(replace(lora_config, run_dir=str(tmp_path / "whole")))
    resumed = crash_and_resume(monkeypatch, run, lora_config)
    assert_same_run(whole, resumed)


def test_an_adapter_is_trained_further_from_its_value_folder(lora_config, tmp_path):
    first = run(lora_config)
    value = replace(lora_config.value, path=str(first.output))
    second = run(replace(lora_config, value=value, run_dir=str(tmp_path / "second")))
    start = records(second.run_dir)[0]["held_out"]["nll"]
    assert start == pytest.approx(first.held_out["nll"], rel=1e-6)
    assert second.held_out["nll"] < start
    one, other = (read_value_metadata(each.output).adapter for each in (first, second))
    assert one == other


@pytest.mark.slow
def test_a_run_starts_where_training_all_parameters_would_and_its_folder_decodes(
    lora_config, tiny_config, tiny_pair, tmp_path
):
    short = replace(tiny_config.step, max_steps=1)
    result = run(replace(lora_config, step=short))
    plain = run(replace(tiny_config, run_dir=str(tmp_path / "plain"), step=short))
    first, other = (records(each.run_dir)[0]["held_out"]["nll"] for each in (result, plain))
    assert first == pytest.approx(other, rel=1e-6)
    base, folder = str(tiny_pair / "base"), str(result.output)
    found = compose(base, folder, value_models=str(tiny_pair / "value"))
    expected = compose(base, load_value(folder))
    texts = [model.generate("1 + 1?", max_new_tokens=3).text for model in (found, expected)]
    assert texts[0] == texts[1]
    refused = ["export-value", str(plain.run_dir), str(tmp_path / "no"), "--merge"]
    assert checkpoint_command(refused) == 1


@pytest.mark.slow
def test_a_mesh_and_scanned_layers_train_the_same_adapter(lora_config, tmp_path):
    one = run(lora_config)
    other = run(
        replace(
            lora_config,
            run_dir=str(tmp_path / "mesh"),
            mesh=MeshConfig(data=1, fsdp=2, tensor=2),
            step=replace(lora_config.step, scan_layers=True),
        )
    )
    params = [load_value(result.output).params for result in (one, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *params)
    assert other.held_out["nll"] == pytest.approx(one.held_out["nll"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connection", "param_dtype"), [("cascade", "bfloat16"), ("hidden", "int8")]
)
def test_other_connections_and_stored_forms_learn_too(lora_config, connection, param_dtype):
    lora = replace(lora_config.value.lora, param_dtype=param_dtype)
    value = replace(lora_config.value, connection=connection, lora=lora)
    result = run(replace(lora_config, value=value))
    first = records(result.run_dir)[0]["held_out"]["nll"]
    assert result.held_out["nll"] < first - 0.05
    read = load_value(result.output)
    if connection == "hidden":
        assert np.abs(np.asarray(read.params["base_projection"]["kernel"])).max() > 0


@pytest.mark.parametrize("param_dtype", ["bfloat16", "int8"])
def test_all_that_is_trained_is_in_float32(lora_config, param_dtype):
    lora = replace(lora_config.value.lora, param_dtype=param_dtype)
    value = replace(lora_config.value, connection="hidden", lora=lora)
    config = replace(lora_config, value=value)
    mesh = make_run_mesh(config)
    models = choose_models(config, mesh)
    state = state_shapes(config, models, mesh)
    made = make_adapter(config, models, place_trained(config, models, mesh), jax.random.key(0))
    types = jax.tree.map(lambda leaf: leaf.dtype, (made, state.params))
    assert types[0] == types[1]
    assert set(jax.tree.leaves(types[0])) == {jnp.dtype("float32")}


@pytest.mark.slow
def test_a_network_that_reads_hidden_states_resumes_beside_bfloat16(lora_config, monkeypatch):
    lora = replace(lora_config.value.lora, param_dtype="bfloat16")
    value = replace(lora_config.value, connection="hidden", lora=lora)
    resumed = crash_and_resume(monkeypatch, run, replace(lora_config, value=value))
    assert resumed.steps == resumed.total_steps


def test_frozen_weights_are_an_argument_with_no_gradient_and_no_state(lora_config):
    mesh = make_run_mesh(lora_config)
    models = choose_models(lora_config, mesh)
    prepared = prepare(lora_config, models, prepare_data(lora_config, models, mesh), mesh)
    frozen = {leaf.shape for leaf in jax.tree.leaves(prepared.frozen)}
    assert (320, 16) in frozen  # the vocabulary, padded
    state = state_shapes(lora_config, models, mesh)
    sizes = [sum(x.size for x in jax.tree.leaves(part)) for part in (state.params, state.opt_state)]
    assert sizes[1] == 2 * sizes[0] + 2
    assert sizes[0] < sum(x.size for x in jax.tree.leaves(prepared.frozen)) / 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"init": "base", "path": ""},
            r'value.init = "base" starts with a zero head, which an adapter never',
        ),
        ({"init": "scratch"}, r'value.init = "scratch" has none: set value.init = "pretrained"'),
        ({"init": "scratch", "path": "", "connection": "linear"}, "adapts pre-trained weights"),
    ],
)
def test_without_pre_trained_weights_there_is_nothing_to_adapt(lora_config, value, message):
    with pytest.raises(ConfigError, match=message):
        replace(lora_config.value, **value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "value.lora.rank must be ≥ 0, got -1"),
        ({"rank": 2, "alpha": 0.0}, r"value.lora.alpha must be > 0, got 0.0"),
        ({"model": "M"}, 'value.lora.model = "M" names the model of an adapter: set'),
    ],
)
def test_impossible_fields_of_an_adapter_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


def test_a_model_trained_alone_has_no_adapter(lora_config):
    with pytest.raises(ConfigError, match=r'value.lora.rank = 2 cannot be combined with .* "sft"'):
        check_train_config(replace(lora_config, method="sft"))


def test_a_value_folder_that_cannot_be_trained_further_is_refused(lora_config, tmp_path):
    short = replace(lora_config.step, max_steps=1)
    folder = run(replace(lora_config, step=short)).output
    mesh = single_device_mesh()

    def choose(**fields):
        choose_models(
            replace(lora_config, value=replace(lora_config.value, path=str(folder), **fields)), mesh
        )

    with pytest.raises(ConfigError, match=r"expected value.lora.rank = 2, .* got 4, 4.0"):
        choose(lora=LoraConfig(rank=4, alpha=4.0))
    with pytest.raises(ConfigError, match=r'was trained with value.connection = "residual"'):
        choose(connection="cascade")
    other = save_tiny_model(tmp_path / "other", seed=5, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"expected the fingerprint \w+, found"):
        choose(lora=replace(lora_config.value.lora, model=str(other)))
    with pytest.raises(ValueFolderError, match=r"expected the fingerprint"):
        load_value(folder, value_model=other)
    needless = replace(lora_config.value.lora, model=str(other))
    with pytest.raises(ConfigError, match=r"needs a LoRA value folder as value.path"):
        choose_models(replace(lora_config, value=replace(lora_config.value, lora=needless)), mesh)
