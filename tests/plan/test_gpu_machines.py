"""GPU machines: described from data sheets, compiled for where the compiler is installed."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ivl_jax.config import ConfigError
from ivl_jax.model.attention.entry import attend_to_own
from ivl_jax.model.attention.form import AttentionForm, _say, choose_form
from ivl_jax.plan import devices, gpu_devices
from ivl_jax.plan.compiled import compile_program, lowering_for, warn_of_dtype
from ivl_jax.plan.gpu_chips import GPU_CHIPS, target_config
from ivl_jax.plan.machines import MACHINES, find_machine
from ivl_jax.plan.report import table
from ivl_jax.plan.training import plan_training
from tests.model.families import tiny_arch

GB = 10**9


@pytest.fixture
def gpu_compiler():
    """Skips a test where there is no compiler."""
    if gpu_devices.missing_packages():
        pytest.skip("the extra `plan-gpu` is not installed")


def test_a_name_counts_gpus_as_it_counts_chips_of_a_tpu():
    machine = MACHINES["a100-40gb-8"]
    assert (machine.devices, machine.platform) == (8, "gpu")
    assert GPU_CHIPS[machine.topology].name == "NVIDIA A100-SXM4-40GB"
    with pytest.raises(ConfigError, match=r"^h100: .*v5e-1/4/8.*t4-1.*h100-1/2/4/8"):
        find_machine("h100")


def test_a_program_may_use_the_share_of_a_gpus_memory_that_jax_takes(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert find_machine("h100-1").memory == int(0.75 * GPU_CHIPS["h100"].memory)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert find_machine("h100-1").memory == int(0.9 * GPU_CHIPS["h100"].memory)
    assert find_machine("v5e-8") == MACHINES["v5e-8"]
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "90%")
    with pytest.raises(ConfigError, match=r"MEM_FRACTION must be a number in \(0, 1\], got '90%'"):
        find_machine("h100-1")


@pytest.mark.parametrize(("peak", "larger_pool"), [(70 * GB, True), (90 * GB, False)])
def test_a_run_that_needs_more_of_a_gpus_memory_is_told_how(
    config, plan, monkeypatch, peak, larger_pool
):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    machine = find_machine("h100-1")
    plan = dataclasses.replace(plan, temporaries=peak, peak=peak, available=machine.memory)
    text = table(config, machine, plan, "BASE")
    assert "63.70 GB, the 75% of its memory that JAX takes" in text
    assert ("set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in text) == larger_pool


def test_float32_has_a_rate_of_its_own_on_gpus():
    assert MACHINES["t4-1"].flops("float32") < MACHINES["t4-1"].flops("float16") / 8
    assert MACHINES["v5e-1"].flops("float32") == MACHINES["v5e-1"].flops("bfloat16")


@pytest.mark.parametrize(
    ("name", "dtype", "warned"),
    [("t4-1", "bfloat16", True), ("t4-1", "float16", False), ("l4-1", "bfloat16", False)],
)
def test_a_gpu_without_bfloat16_is_named(caplog, name, dtype, warned):
    warn_of_dtype(MACHINES[name], dtype)
    assert ("Tesla T4 has no bfloat16" in caplog.text) == warned


@pytest.mark.parametrize("name", GPU_CHIPS)
def test_a_description_has_each_figure_once(name):
    chip = GPU_CHIPS[name]
    text = target_config(chip)
    fields = re.findall(r"^  (\w+):", text, flags=re.MULTILINE)
    assert len(fields) == len(set(fields)) == 17
    assert f"device_memory_size: {chip.memory}\n" in text
    assert f"core_count: {chip.cores}\n" in text
    assert ("ACCELERATED_FEATURES" in text) == (name in ("h100", "h200"))


@pytest.mark.parametrize(
    ("missing", "named"),
    [(("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"), "JAX's CUDA plugin"), ((), "")],
)
def test_a_missing_gpu_compiler_names_its_extra(monkeypatch, missing, named):
    monkeypatch.setattr(gpu_devices, "_found", lambda module: module not in missing)
    monkeypatch.setattr(gpu_devices, "_nvcc", lambda: None)
    lacking = f"{named}.*nvidia-cuda-nvcc" if named else "compiler, and nvidia-cuda-nvcc"
    with pytest.raises(
        devices.MissingCompilerError, match=rf"l4-1: .*{lacking}.*ivl_jax\[plan-gpu\]"
    ):
        devices.describe_devices(MACHINES["l4-1"])


def test_a_gpu_program_fits_if_its_peak_does(monkeypatch):
    stats = SimpleNamespace(temp_size_in_bytes=30, peak_memory_in_bytes=40)
    compiled = SimpleNamespace(memory_analysis=lambda: stats, as_text=lambda: "")
    lowered = SimpleNamespace(as_text=lambda: "program", compile=lambda compiler_options: compiled)
    monkeypatch.setattr(gpu_devices, "_nvcc", lambda: gpu_devices.Path("/nowhere"))
    machine = dataclasses.replace(MACHINES["l4-1"], memory=40)
    assert compile_program(lowered, machine, held=10) == (True, 30, 40, {}, 0)
    small = dataclasses.replace(machine, memory=39)
    assert compile_program(lowered, small, held=10) == (False, 30, 40, {}, 0)


def compile_attention(name, form, *, width, dtype, window=None, softcap=None):
    """The compiled gradient of attention with grouped queries and segments."""
    machine = MACHINES[name]
    mesh = Mesh(np.asarray(devices.describe_devices(machine)), ("rows",))
    rows = NamedSharding(mesh, PartitionSpec("rows"))

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=rows)

    def loss(query, keys, values, segments):
        mixed = attend_to_own(
            query,
            keys,
            values,
            form=dataclasses.replace(form, mesh=mesh, batch_axes=("rows",)),
            segment_ids=segments,
            window=window,
            scale=width**-0.5,
            softcap=softcap,
        )
        return jnp.sum(mixed.astype(jnp.float32))

    count = machine.devices
    arguments = (
        shape(count, 2048, 4, width),
        shape(count, 2, 2048, width),
        shape(count, 2, 2048, width),
        shape(count, 2048, dtype=jnp.int32),
    )
    with lowering_for(machine):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments)
    return compile_program(lowered, machine, held=0)


@pytest.mark.usefixtures("gpu_compiler")
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("t4-1", {"width": 64, "dtype": jnp.float32}, "blocked"),
        ("t4-1", {"width": 128, "dtype": jnp.float16, "window": 300}, "blocked"),
        ("l4-1", {"width": 64, "dtype": jnp.bfloat16}, "cudnn"),
        ("a100-40gb-2", {"width": 128, "dtype": jnp.bfloat16, "window": 300}, "cudnn"),
        ("a100-80gb-1", {"width": 64, "dtype": jnp.bfloat16, "softcap": 30.0}, "blocked"),
        ("h100-8", {"width": 64, "dtype": jnp.bfloat16}, "cudnn"),
        ("h200-1", {"width": 256, "dtype": jnp.bfloat16}, "blocked"),
    ],
)
def test_attention_compiles_in_the_form_that_the_gpu_takes(name, options, expected):
    arch = dataclasses.replace(
        tiny_arch("llama3"),
        head_dim=options["width"],
        attn_logit_softcapping=options.get("softcap"),
    )
    described = devices.describe_devices(MACHINES[name])
    form = choose_form("auto", arch, dtype=options["dtype"], devices=described)
    assert form.at_length(2048) == expected
    compiled = compile_attention(name, form, **options)
    scores = 4 * 2048 * 2048 * 4  # of four heads in float32
    assert compiled.fits
    assert 0 < (compiled.temporaries or 0) < scores


@pytest.mark.usefixtures("gpu_compiler")
def test_all_scores_at_once_take_more():
    options = {"width": 64, "dtype": jnp.bfloat16}
    plain = compile_attention("h100-1", AttentionForm("plain"), **options)
    fused = compile_attention("h100-1", AttentionForm("cudnn"), **options)
    assert plain.temporaries is not None
    assert fused.temporaries is not None
    assert plain.temporaries > 4 * fused.temporaries


@pytest.mark.usefixtures("gpu_compiler")
@pytest.mark.parametrize(
    ("name", "dtype", "form"), [("t4-1", "float32", "blocked"), ("h100-2", "bfloat16", "cudnn")]
)
def test_a_training_step_compiles_for_gpus(config, caplog, name, dtype, form):
    _say.cache_clear()
    changed = dataclasses.replace(
        config,
        step=dataclasses.replace(config.step, compute_dtype=dtype),
        data=dataclasses.replace(config.data, max_length=256, beyond_context=True),
    )
    with caplog.at_level("INFO"):
        (plan,) = plan_training(changed, find_machine(name))
    assert f"the {form} form" in caplog.text
    assert plan.fits
    assert plan.base + plan.value + plan.optimizer < plan.peak < GB
