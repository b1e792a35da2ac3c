"""A run is planned from config.json alone, by the program that train.py compiles."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from ivl_jax.config import (
    ConfigError,
    DistilConfig,
    GrpoConfig,
    LoraConfig,
    MeshConfig,
    RowsConfig,
    ValueConfig,
)
from ivl_jax.model.decoder import abstract_params
from ivl_jax.model.projection import Lora
from ivl_jax.plan import __main__ as command
from ivl_jax.plan import devices, models, training
from ivl_jax.plan.compiled import Compiled, compile_program
from ivl_jax.plan.largest import Largest
from ivl_jax.plan.machines import MACHINES, Machine, find_machine
from ivl_jax.plan.report import table
from ivl_jax.plan.work import step_flops, step_traffic
from ivl_jax.sharding import make_mesh
from ivl_jax.target_platform import target_platform, tracing_for
from ivl_jax.training.programs import make_loss, place_in_step
from ivl_jax.training.setup import place_trained
from tests.model.families import CONFIGS, tiny_arch

GB = 1 << 30
EXCHANGED = Path(__file__).parent.parent / "fixtures" / "exchanged"
HERE = Machine("cpu-8", "cpu:8", 8, 4 * GB, 1e12, 1e12, 1e11)


def lowered(error):
    """A program that the compiler refuses with this error."""

    def compile_it() -> None:
        raise error

    return SimpleNamespace(as_text=lambda: "program", compile=compile_it)


def test_a_machine_that_is_not_known_lists_those_that_are():
    with pytest.raises(ConfigError, match=r"^v9: not a known machine; known are v5e-1/4/8/.*v6e"):
        find_machine("v9")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("v5e-12", "v5e-8 and v5e-16"),
        ("v5e-512", "v5e-256"),
        ("v5p-4", "v5p-8"),
        ("v6e-2", "v6e-1 and v6e-4"),
    ],
)
def test_a_size_that_does_not_exist_names_the_nearest(name, nearest):
    family = name.partition("-")[0]
    with pytest.raises(ConfigError, match=f"no {family} of this size; the nearest: {nearest} "):
        find_machine(name)


@pytest.mark.parametrize(
    ("name", "devices", "topology"),
    [
        ("v5e-8", 8, "v5e:2x4"),
        ("v5p-8", 4, "v5:2x2x1"),  # cores, of which a device has two
        ("v6e-256", 256, "v6e:16x16"),
        ("7x-8", 8, "tpu7x:2x2x1"),  # cores, each of which is a device
    ],
)
def test_names_count_what_their_vendor_counts(name, devices, topology):
    machine = find_machine(name)
    assert (machine.devices, machine.topology) == (devices, topology)


def test_a_missing_compiler_names_its_extra(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(devices.MissingCompilerError, match=r"libtpu.*ivl_jax\[plan-tpu\]"):
        devices.describe_devices(MACHINES["v5e-8"])


def test_models_of_the_shipped_configs_need_no_network(monkeypatch):
    def no_hub(*arguments: Any, **options: Any) -> str:
        raise AssertionError(f"asked the hub for {arguments}")

    monkeypatch.setattr(models, "hf_hub_download", no_hub)
    for path in (
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "meta-llama/Llama-2-7b-hf",
    ):
        arch = models.read_architecture(path, None, "base.path")
        assert arch.vocab_size == 32_000
    leaves = jax.tree.leaves(abstract_params(arch))
    assert sum(leaf.size for leaf in leaves) == 6_738_415_616  # as published


def test_a_model_without_a_config_json_names_the_flag(config, tmp_path):
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"base\.path = .*config\.json.*give a folder that holds one"
    ):
        models.planned_models(config, make_mesh(fsdp=8), memory=GB)


def test_a_config_json_that_cannot_be_used_says_why(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama3"] | {"hidden_size": "abc"}))
    with pytest.raises(ConfigError, match=r"^base\.path: .*config\.json.*hidden_size.*abc"):
        models.planned_models(config, make_mesh(fsdp=8), memory=GB)


def test_a_linear_map_is_compared_with_the_machines_memory(config):
    linear = dataclasses.replace(config, value=ValueConfig(init="scratch", connection="linear"))
    mesh = make_mesh(fsdp=8)
    assert models.planned_models(linear, mesh, memory=GB).bases
    with pytest.raises(ConfigError, match=r"value\.rank = 0: training a linear map"):
        models.planned_models(linear, mesh, memory=100)


def test_rows_longer_than_the_context_need_leave(config, caplog):
    mesh = make_mesh(fsdp=8)
    context = tiny_arch("llama3").max_position_embeddings
    long = dataclasses.replace(config.data, max_length=context + 1)
    with pytest.raises(ConfigError, match=f"exceeds the context of .*{context}.*beyond_context"):
        models.planned_models(dataclasses.replace(config, data=long), mesh, memory=GB)
    allowed = dataclasses.replace(long, beyond_context=True)
    models.planned_models(dataclasses.replace(config, data=allowed), mesh, memory=GB)
    assert "data.beyond_context allows it" in caplog.text


def test_a_plan_counts_what_each_device_holds(config, monkeypatch):
    monkeypatch.setattr(training, "describe_devices", lambda machine: jax.devices())
    (plan,) = training.plan_training(config, HERE)
    leaves = jax.tree.leaves(abstract_params(tiny_arch("llama3")))
    parameters = sum(leaf.size for leaf in leaves)
    assert plan.fits
    assert plan.tokens == 256
    # Vocabulary rows are padded, and norms are replicated where they do not divide.
    assert 1 <= plan.value / (4 * parameters / 8) < 1.5
    assert plan.base * 2 == plan.value  # bfloat16 and float32 of one model
    assert 2 * plan.value <= plan.optimizer <= 2 * plan.value + 100
    assert plan.batch == 256 * 17 // 8
    text = table(config, HERE, plan, "BASE")
    assert "16 rows of 16 tokens in 2 micro-batches" in text
    assert text.endswith("fits")


@pytest.mark.parametrize(
    ("message", "temporaries", "peak"),
    [
        ("Used 28.50G of 15.75G hbm. Exceeded hbm capacity by 12.75G.", None, 28.5 * GB),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (31.50G) "
            "exceeds available HBM (15.75G).",
            31.5 * GB,
            33.5 * GB,
        ),
    ],
)
def test_the_compilers_refusal_is_a_plan_that_does_not_fit(
    config, plan, message, temporaries, peak
):
    refused = lowered(jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}"))
    found = compile_program(refused, HERE, held=2 * GB)
    assert found == (False, temporaries, peak, None, 0)
    plan = dataclasses.replace(plan, temporaries=found.temporaries, peak=found.peak, sent=None)
    text = table(config, HERE, plan, "BASE")
    assert f"{peak / 1e9:8.2f} GB of 0.00 GB" in text
    assert "does not fit:\n" in text


def test_another_failure_of_the_compiler_is_not_taken_for_one():
    failing = lowered(jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        compile_program(failing, HERE, held=0)


@pytest.mark.parametrize(("fits", "status"), [(True, 0), (False, command.DOES_NOT_FIT)])
def test_the_exit_status_says_whether_it_fits(
    config, plan, tmp_path, monkeypatch, capsys, fits, status
):
    plan = dataclasses.replace(plan, fits=fits)
    monkeypatch.setattr(training, "plan_training", lambda config, machine: [plan])
    file = tmp_path / "run.toml"
    file.write_text(
        f'run_dir = "runs/none"\n[base]\npath = "{tmp_path}"\n[value]\ninit = "base"\n'
        '[data]\ntrain = ["none.json"]\n'
    )
    assert command._plan(["--config", str(file), "--on", "v5e-8", "--json"]) == status
    printed = json.loads(capsys.readouterr().out)
    assert printed["programs"][0]["fits"] is (status == 0)


def test_flops_of_a_step_are_the_usual_ones(config):
    mesh = make_mesh(fsdp=8)
    chosen = models.planned_models(config, mesh, memory=GB)
    arch = tiny_arch("llama3")
    leaves = jax.tree.leaves_with_path(abstract_params(arch))
    matrices = sum(leaf.size for _, leaf in leaves if leaf.ndim == 2)  # a tied head counts once
    tokens = 16 * 16
    attention = arch.num_hidden_layers * 2 * arch.num_attention_heads * arch.head_dim * 16
    expected = (6 + 2) * matrices + (3 + 1) * attention
    assert step_flops(config, chosen, chosen.bases[0]) == expected * tokens


def test_tracing_for_another_platform_ends_with_the_block():
    assert target_platform() == "cpu"
    with tracing_for("tpu"):
        assert target_platform() == "tpu"
    assert target_platform() == "cpu"


def test_a_teachers_parameters_are_planned_and_its_products_are_counted(config, monkeypatch):
    monkeypatch.setattr(training, "describe_devices", lambda machine: jax.devices())
    distil = DistilConfig(config.base.path, values=(config.base.path,), param_dtype="bfloat16")
    taught = dataclasses.replace(config, objective="distil", distil=distil)
    (plan,) = training.plan_training(taught, HERE)
    # A base and a value network, each as large as the student's base in bfloat16.
    assert plan.teacher == 2 * plan.base
    assert plan.rollouts is None
    leaves = jax.tree.leaves(abstract_params(tiny_arch("llama3")))
    assert plan.flops > step_flops_of(config) + 2 * 2 * 256 * max(leaf.size for leaf in leaves)
    text = table(taught, HERE, plan, "BASE")
    assert f"{'teacher, or the original':38}" in text


def step_flops_of(config):
    chosen = models.planned_models(config, make_mesh(fsdp=8), memory=GB)
    return step_flops(config, chosen, chosen.bases[0])


def test_answers_that_a_run_samples_are_planned_with_its_step(config, monkeypatch):
    monkeypatch.setattr(training, "describe_devices", lambda machine: jax.devices())
    grpo = GrpoConfig(group_size=2, max_new_tokens=4, updates=2)
    alone = dataclasses.replace(
        config,
        objective="grpo",
        grpo=grpo,
        method="sft",
        base=dataclasses.replace(config.base, param_dtype="float32"),
        step=dataclasses.replace(config.step, scan_layers=True),
        data=dataclasses.replace(config.data, rows=RowsConfig(format="messages")),
    )
    (plan,) = training.plan_training(alone, HERE)
    assert plan.fits
    # Without a base the original is held a second time; and the batch has two columns more.
    assert plan.teacher == plan.value
    assert plan.batch == 256 * (17 + 8) // 8
    assert plan.rollouts is not None
    # Moments, original and stacked layers wait while the engine decodes.
    assert plan.peak >= plan.rollouts.peak + plan.optimizer + 2 * plan.value
    assert plan.rollouts.caches > 0
    assert "sampling its answers takes at least" in table(alone, HERE, plan, "")


def test_the_table_has_what_is_moved_and_what_limits_a_step(config, plan):
    lines = table(config, HERE, plan, "BASE", Largest(48, 0)).splitlines()
    text = "\n".join(lines)
    assert "6e+12 FLOPs per step at 1 TFLOP/s per device (float32)" in text
    assert "4.00 GB to and from memory" in text
    assert "3.00 GB to other devices (all-gather 1.00 GB, all-reduce 2.00 GB)" in text
    assert "at least 0.75 s (compute 0.5 s, memory 0.25 s, interconnect 0.75 s)" in text
    assert "48 rows of 16 tokens in 2 micro-batches, or 16 rows of no length" in text
    assert lines[-1].startswith("  - ")  # a remedy


def test_traffic_is_weights_once_per_product_and_rows_once_per_matrix(config):
    mesh = make_mesh(fsdp=4, tensor=2)
    chosen = models.planned_models(config, mesh, memory=GB)
    sizes = {"trained": 1000, "optimizer": 2000}

    def traffic(**step):
        changed = dataclasses.replace(config, step=dataclasses.replace(config.step, **step))
        return step_traffic(changed, chosen, chosen.bases[0], mesh, **sizes)

    one, two = traffic(micro_batches=1), traffic(micro_batches=2)
    arch = tiny_arch("llama3")
    leaves = jax.tree.leaves(abstract_params(arch))
    matrices = sum(leaf.size for leaf in leaves if leaf.ndim == 2)  # a tied head counts once
    # A second micro-batch reads the weights again, and adds to the gradient.
    assert two - one == (3 * 4 + 1 * 2) * matrices / 2 + 2 * 1000
    rows = traffic(micro_batches=1, batch_size=32) - one
    assert rows == pytest.approx(one - (3 * 4 + 2) * matrices / 2 - 2 * 4000)
    assert traffic(micro_batches=1, remat="full") > one


def test_a_mesh_that_does_not_fit_names_sizes_that_do(config, monkeypatch):
    monkeypatch.setattr(training, "describe_devices", lambda machine: jax.devices())
    mesh = dataclasses.replace(config.mesh, fsdp=3, tensor=4)
    with pytest.raises(ConfigError, match=r"fit 8 devices; these sizes do: .*fsdp=4, tensor=2"):
        training.plan_training(dataclasses.replace(config, mesh=mesh), HERE)


@pytest.mark.parametrize(
    ("wanted", "scan_layers", "memory", "chosen"),
    [
        ("auto", True, 4 * GB, "none"),
        ("auto", True, 1000, "full"),
        ("auto", False, 1000, "none"),  # on CPU unrolled layers are not recomputed
        ("dots", True, 1000, "dots"),
    ],
)
def test_what_is_recomputed_follows_the_machines_memory(
    config, wanted, scan_layers, memory, chosen
):
    step = dataclasses.replace(config.step, remat=wanted, scan_layers=scan_layers)
    config, mesh = dataclasses.replace(config, step=step), make_mesh(fsdp=8)
    found = models.planned_models(config, mesh, memory=GB)
    (base,) = found.bases
    places = place_trained(config, found, mesh), place_in_step(config, base, mesh)
    loss = make_loss(config, found, base, *places, mesh, memory=memory)
    assert training._remat(loss) == chosen


def test_the_weights_under_an_adapter_are_listed_apart(config, monkeypatch):
    found = Compiled(fits=True, temporaries=3, peak=4, sent={})
    monkeypatch.setattr(training, "compile_program", lambda *arguments, **options: found)
    monkeypatch.setattr(training, "describe_devices", lambda machine: jax.devices())
    config = dataclasses.replace(config, mesh=MeshConfig(data=-1, fsdp=1))  # whole on each device
    lora = LoraConfig(rank=2, param_dtype="bfloat16")
    adapted = dataclasses.replace(config, value=dataclasses.replace(config.value, lora=lora))
    (plan,), (whole,) = (training.plan_training(each, HERE) for each in (adapted, config))
    assert plan.frozen == plan.base == whole.base  # one model, in bfloat16
    assert (whole.frozen, whole.value > 4 * plan.value) == (0, True)
    assert whole.optimizer > 4 * plan.optimizer
    assert plan.flops < whole.flops
    assert plan.traffic < whole.traffic
    lines = table(adapted, HERE, plan, "BASE").splitlines()
    assert any(line.startswith("  frozen weights under the adapter") for line in lines)
    assert "frozen" not in table(config, HERE, whole, "BASE")


def test_a_lora_value_folder_is_planned_without_its_model(config, tmp_path):
    """It describes the network that its adapter changes; neither weights nor a hub are needed."""
    described = json.loads((EXCHANGED / "residual" / "ivl.json").read_text())
    model = {"name": "nobody/no-such-model", "revision": None, "fingerprint": "0" * 64}
    adapter = {"rank": 2, "alpha": 4.0, "targets": "attention", "model": model}
    described |= {"format_version": 3, "adapter": adapter}
    (tmp_path / "ivl.json").write_text(json.dumps(described))
    lora = LoraConfig(rank=2, alpha=4.0, targets="attention")
    value = dataclasses.replace(config.value, path=str(tmp_path), lora=lora)
    base = dataclasses.replace(config.base, path=str(EXCHANGED / "base"))
    further = dataclasses.replace(config, base=base, value=value)
    chosen = models.planned_models(further, make_mesh(fsdp=8), memory=GB)
    assert chosen.lora == Lora(2, 4.0, "attention")
    assert chosen.arch.hidden_size == described["architecture"]["hidden_size"]
    other = dataclasses.replace(value, lora=dataclasses.replace(lora, rank=3))
    with pytest.raises(ConfigError, match=r"expected value\.lora\.rank = 2"):
        models.planned_models(
            dataclasses.replace(further, value=other), make_mesh(fsdp=8), memory=GB
        )
