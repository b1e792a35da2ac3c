"""Decoding is planned from config.json alone, by the programs that infer.py compiles."""

import dataclasses
import json

import jax
import pytest

from ivl_jax.config import ComposedModelConfig, ConfigError, MeshConfig
from ivl_jax.decoding.loading import decoding_mesh
from ivl_jax.model.decoder import abstract_params
from ivl_jax.plan import __main__ as command
from ivl_jax.plan import decoding
from ivl_jax.plan.compiled import Compiled
from ivl_jax.plan.decode_flags import DecodeConfig, check_decode_flags, read_decode_flags
from ivl_jax.plan.decode_report import decode_table
from ivl_jax.plan.decoding import DecodingPlan, plan_decoding
from ivl_jax.plan.machines import Machine
from ivl_jax.sharding import DEFAULT_RULES, make_mesh, padded_vocab_rows
from tests.model.families import CONFIGS, tiny_arch

HERE = Machine("cpu-2", "cpu:2", 2, 1 << 30, 1e12, 1e12, 1e9)
ARCH = tiny_arch("llama3")


@pytest.fixture
def folder(tmp_path):
    """A model without weights; devices are this process's first two."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama3"]))
    return str(tmp_path)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(decoding, "describe_devices", lambda machine: jax.devices()[:2])


def flags(base, *, batch=2, context=64, **changes):
    model = ComposedModelConfig(base=base, **({"value": (base,)} | changes))
    return DecodeConfig(model, batch=batch, context=context)


@pytest.fixture
def uncompiled(monkeypatch):
    """Plans that need only shapes."""
    monkeypatch.setattr(decoding, "lower_prefill", lambda *_, **__: None)
    monkeypatch.setattr(decoding, "lower_chunk", lambda *_, **__: None)
    compiled = Compiled(True, 1, 2)
    monkeypatch.setattr(decoding, "compile_program", lambda *_, **__: compiled)


@pytest.mark.usefixtures("here")
def test_a_plan_counts_parameters_caches_and_what_a_step_reads(folder, caplog):
    mesh = MeshConfig(fsdp=1, tensor=1, data=2)  # each device has all parameters, and one row
    plan = plan_decoding(flags(folder, mesh=mesh), HERE)
    rows = padded_vocab_rows(
        ARCH.vocab_size, make_mesh(data=2, devices=jax.devices()[:2]), DEFAULT_RULES
    )
    leaves = jax.tree.leaves(abstract_params(ARCH, vocab_rows=rows))
    vocabulary = 4 * rows * ARCH.hidden_size
    untied = vocabulary if ARCH.tie_word_embeddings else 0
    assert plan.base == plan.values == 4 * sum(leaf.size for leaf in leaves) + untied
    slots = 64 * 2 * ARCH.num_hidden_layers * ARCH.num_key_value_heads * ARCH.head_dim
    assert plan.caches == 2 * 4 * slots  # of base and value, in float32
    assert plan.bytes_per_step == plan.base + plan.values - 2 * vocabulary + plan.caches
    assert plan.tokens_per_second == 2 * 1e9 / plan.bytes_per_step
    assert plan.fits
    assert plan.peak == max(plan.prefill.peak, plan.chunk.peak)
    assert plan.peak > plan.base + plan.values + plan.caches
    assert "unknown length" not in caplog.text  # a chunk's loop counts as one token


@pytest.mark.usefixtures("here", "uncompiled")
def test_an_int8_base_and_a_tensor_axis_take_less(folder):
    whole = plan_decoding(flags(folder, mesh=MeshConfig(data=2, fsdp=1)), HERE)
    split = plan_decoding(flags(folder, mesh=MeshConfig(fsdp=1, tensor=2), int8_base=True), HERE)
    assert split.values < 0.6 * whole.values
    assert split.base < 0.7 * split.values  # the embedding stays a float
    assert split.tokens_per_second > 1.5 * whole.tokens_per_second


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mesh"),
    [
        (28, 4, {"data": 2, "fsdp": 1, "tensor": 4}),
        (9, 3, {"data": 8, "fsdp": 1, "tensor": 1}),
        (8, 2, {"data": 1, "fsdp": 1, "tensor": 8}),
    ],
)
def test_the_mesh_is_that_of_infer_py(heads, kv_heads, mesh):
    config = DecodeConfig(ComposedModelConfig(base="none"))
    base = dataclasses.replace(ARCH, num_attention_heads=heads, num_key_value_heads=kv_heads)
    found = decoding._mesh(config, base, jax.devices())
    assert dict(found.shape) == mesh
    assert found == decoding_mesh(config.model.mesh, base)


@pytest.mark.usefixtures("here", "uncompiled")
def test_rows_are_padded_until_every_device_has_as_many(folder):
    plan = plan_decoding(flags(folder, batch=3, mesh=MeshConfig(data=2, fsdp=1)), HERE)
    assert plan.rows == 4
    assert plan.tokens_per_second == 3 * 1e9 / plan.bytes_per_step
    text = decode_table(flags(folder, batch=3), HERE, plan, "VALUE")
    assert "3 row(s) of 64 tokens, 1 of padding, float32" in text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"value": ()}, "--value is missing.*or none for the base alone"),
        ({"draft": "ngram"}, "--draft is not planned"),
        ({"map": ("some.safetensors",)}, "--map is not planned"),
        ({"base": ""}, "--base is missing"),
    ],
)
def test_flags_that_cannot_be_planned_are_named(changes, problem):
    model = ComposedModelConfig(**({"base": "BASE", "value": ("VALUE",)} | changes))
    with pytest.raises(ConfigError, match=f"(?s)decoding cannot be planned:.*{problem}"):
        check_decode_flags(DecodeConfig(model), None)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"context": 10**6}, f"exceeds the smallest context.*{ARCH.max_position_embeddings} tok"),
        ({"mesh": MeshConfig(tensor=3, fsdp=1)}, "mesh: .*does not fit 2 device"),
    ],
)
def test_a_batch_that_the_machine_cannot_hold_is_refused_before_compiling(
    folder, monkeypatch, changes, problem
):
    monkeypatch.setattr(decoding, "abstract_composition", None)
    with pytest.raises(ConfigError, match=problem):
        plan_decoding(flags(folder, **changes), HERE)


def test_a_training_run_gives_base_dtype_and_value_network(config, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f'run_dir = "runs/none"\n[base]\npath = "{tmp_path}"\n[value]\ninit = "base"\n'
        'connection = "cascade"\n[data]\ntrain = ["none.json"]\nmax_length = 16\n[step]\n'
        'compute_dtype = "bfloat16"\n'
    )
    arguments = ["--config", str(file), "--batch", "4"]
    config, run = read_decode_flags(arguments, program="plan", description="")
    assert (config.model.base, config.model.dtype, config.batch) == (str(tmp_path), "bfloat16", 4)
    check_decode_flags(config, run)
    networks = decoding._networks(config.model, ARCH, run, make_mesh(), memory=10**9)
    assert networks.scheme.reads_base_logits
    assert networks.base == ARCH
    assert networks.values == [dataclasses.replace(ARCH, tie_word_embeddings=False)]


@pytest.mark.parametrize(("fits", "status"), [(True, 0), (False, command.DOES_NOT_FIT)])
def test_the_exit_status_says_whether_decoding_fits(folder, monkeypatch, capsys, fits, status):
    plan = DecodingPlan(8, 4, 2, 3, Compiled(fits, 5, 14), Compiled(True, 1, 10), 12, 8, 250.0)
    monkeypatch.setattr(decoding, "plan_decoding", lambda config, machine, run: plan)
    arguments = ["--decode", "--on", "v5e-8", "--base", folder, "--value", "none"]
    assert command._plan([*arguments, "--json"]) == status
    printed = json.loads(capsys.readouterr().out)
    assert (printed["fits"], printed["peak"], printed["chunk"]["peak"]) == (fits, 14, 10)
    assert command._plan(arguments) == status
    text = capsys.readouterr().out
    assert "at most 250 tokens/s at 819 GB/s" in text
    assert text.endswith("  fits\n") == fits


def test_what_does_not_fit_says_which_program_and_what_to_change(folder):
    prefill, chunk = Compiled(False, None, 3 << 30), Compiled(True, 1, 10)
    plan = DecodingPlan(8, 4, 2, 3, prefill, chunk, 1 << 30, 8, 250.0)
    text = decode_table(flags(folder, batch=8), HERE, plan, "VALUE")
    assert "does not fit (reading prompts): lower --batch from 8, lower --context" in text
    assert "add --int8-base, use --dtype bfloat16, use more devices" in text
