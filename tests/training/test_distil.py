"""Distillation: divergences against their formulas, runs that stop and resume, refused teachers."""

import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.checkpoint import load_value
from ivl_jax.composed.forward import NetworkLogits, compose, network_logits, run_networks
from ivl_jax.composed.network import ComposedParams, ValueArrays
from ivl_jax.composed.token_scores import SCORES, PositionLogits
from ivl_jax.config import (
    BaseConfig,
    ConfigError,
    DistilConfig,
    LoraConfig,
    PenaltyConfig,
    TrainConfig,
)
from ivl_jax.training import teacher
from ivl_jax.training.loop import run
from ivl_jax.training.loss import count_tokens, loss_sum
from ivl_jax.training.models import choose_models
from ivl_jax.training.objectives.distil import make_distil
from ivl_jax.training.setup import make_run_mesh
from ivl_jax.training.teacher import load_teacher
from tests.training.conftest import save_tiny_model
from tests.training.runs import (
    Crash,
    assert_same_arrays,
    assert_same_run,
    at_step,
    crash,
    crash_and_resume,
    records,
)
from tests.training.tiny import VOCAB, make_arch, make_batch, make_loss, make_params, on_device


def _p(logits: np.ndarray) -> np.ndarray:
    """Probabilities of the real tokens, in float64."""
    exp = np.exp(np.asarray(logits, np.float64)[..., :VOCAB])
    return exp / exp.sum(-1, keepdims=True)


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


FORMULAS = {
    "teacher_kl": _kl,
    "teacher_reverse_kl": lambda teacher, student: _kl(student, teacher),
    "teacher_js": lambda teacher, student: (
        _kl(teacher, (teacher + student) / 2) / 2 + _kl(student, (teacher + student) / 2) / 2
    ),
}


@pytest.mark.parametrize("appended", [0, 3], ids=["same tokens", "appended tokens"])
@pytest.mark.parametrize("width", [VOCAB + 3, VOCAB + 11])
@pytest.mark.parametrize("name", FORMULAS)
def test_divergences_are_exact_over_the_students_tokens(name, width, appended) -> None:
    """Whatever the padding columns; and a teacher's further tokens do not count."""
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=(2, 3, wide)) * 3 for wide in (VOCAB + 3, width))
    student[..., VOCAB:], teacher[..., VOCAB + appended :] = -np.inf, -np.inf
    composition = make_loss(make_arch()).composition
    at = PositionLogits(
        composition,
        jnp.asarray(student, jnp.float32),
        NetworkLogits(jnp.asarray(student, jnp.float32), ()),
        jnp.zeros((2, 3), jnp.int32),
        jnp.asarray(teacher, jnp.float32),
    )
    expected = FORMULAS[name](_p(teacher), _p(student))
    np.testing.assert_allclose(SCORES[name](at), expected, rtol=1e-5)
    # Masked columns must not make a gradient NaN.
    gradient = jax.grad(lambda x: jnp.sum(SCORES[name](at._replace(composed=x))))(at.composed)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("alone", [False, True], ids=["value", "alone"])
def test_loss_and_gradient_are_the_mean_divergence_from_a_composed_teacher(alone) -> None:
    arch = make_arch()
    student, base, *taught = (make_params(arch, seed) for seed in range(4))
    teacher = make_loss(arch).composition
    teacher_params = ComposedParams(taught[0], (ValueArrays(taught[1]),))
    loss = make_loss(
        arch,
        alone=alone,
        objective=make_distil(DistilConfig()),
        teacher=teacher,
        teacher_strengths=(0.5,),
        penalty_kind="none",
        chunk_length=5,
    )
    batch = on_device(make_batch())
    frozen = None if alone else base

    def logits(composition, params, strengths):
        hidden, _ = run_networks(
            composition,
            params,
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
        )
        parts = network_logits(composition, params, hidden)
        return compose(composition, params.values, parts, strengths=jnp.asarray(strengths))

    def expected(student):
        own = ComposedParams(student) if alone else ComposedParams(base, (ValueArrays(student),))
        strengths = [[]] if alone else [[1.0]]
        q = jax.nn.log_softmax(logits(loss.composition, own, strengths)[..., :VOCAB])
        p = jax.nn.log_softmax(logits(teacher, teacher_params, [[0.5]])[..., :VOCAB])
        kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        return jnp.sum(jnp.where(batch.loss_mask, kl, 0.0)) / jnp.sum(
            batch.loss_mask, dtype=jnp.float32
        )

    def found(student):
        total, count, _ = loss_sum(
            loss,
            student,
            frozen,
            batch,
            counts=count_tokens(loss, batch),
            teacher_params=teacher_params,
        )
        return total / count

    ours, theirs = (jax.jit(jax.value_and_grad(f))(student) for f in (found, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), ours, theirs)


CHATML = ("<|im_start|>", "<|im_end|>")


@pytest.fixture
def config(tiny_config: TrainConfig, tmp_path) -> TrainConfig:
    """The tuned version of the base is the teacher, and no penalty keeps the value small.

    Like many tuned models it has special tokens of its own.
    """
    save_tiny_model(tmp_path / "tuned", seed=7, appended=CHATML)
    return replace(
        tiny_config,
        objective="distil",
        distil=DistilConfig(str(tmp_path / "tuned")),
        penalty=PenaltyConfig(kind="none"),
    )


@pytest.mark.slow
def test_a_stopped_distillation_resumes_to_the_bits_of_one_that_never_stopped(
    config, tmp_path, monkeypatch
) -> None:
    whole = run(config)
    config = replace(config, run_dir=str(tmp_path / "stopped"))
    assert_same_run(crash_and_resume(monkeypatch, run, config), whole)


def test_a_base_with_its_value_is_folded_into_one_model(config, tiny_pair, tmp_path) -> None:
    value = run(config)
    figures = [one["held_out"] for one in records(value.run_dir) if "held_out" in one]
    assert figures[-1]["divergence"] < 0.8 * figures[0]["divergence"]
    assert figures[0]["teacher_nll"] == figures[-1]["teacher_nll"]
    base = str(tiny_pair / "base")
    folded = run(
        replace(
            config,
            run_dir=str(tmp_path / "folded"),
            method="sft",
            base=BaseConfig(path=base),
            distil=DistilConfig(base, values=(str(value.output),)),
        )
    )
    figures = [one["held_out"] for one in records(folded.run_dir) if "held_out" in one]
    assert figures[-1]["divergence"] < 0.8 * figures[0]["divergence"]
    # The teacher is what the value's run left: base + value.
    assert figures[0]["teacher_nll"] == pytest.approx(value.held_out["nll"], rel=1e-5)
    assert (folded.output / "config.json").exists()


def test_a_teacher_altered_during_a_stop_is_named(config, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(Crash):
            run(config)
    shutil.rmtree(tmp_path / "tuned")
    save_tiny_model(tmp_path / "tuned", seed=8)
    with pytest.raises(ValueError, match=r"distil\.teacher = .*fingerprint .* then"):
        run(replace(config, resume=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distil": DistilConfig()}, r"name its folder or hub id as\s+distil.teacher"),
        ({"objective": "sft"}, 'objective = "sft", which has no teacher'),
        (
            {"distil": DistilConfig(str(family_folder("S")))},
            "distil.teacher = .*: the teacher has another vocabulary than the student .*base: .* "
            "ordinary tokens differ: .* in the teacher, .* in the student",
        ),
    ],
    ids=["no teacher", "no distillation", "another vocabulary"],
)
def test_a_teacher_that_cannot_teach_is_refused_with_the_reason(config, changes, said) -> None:
    with pytest.raises(ConfigError, match=said):
        run(replace(config, **changes))


def test_options_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a base to be added to"):
        DistilConfig(values=("value",))
    with pytest.raises(ConfigError, match=r"2 numbers for 1 value"):
        DistilConfig("base", values=("value",), strengths=(1.0, 0.5))
    with pytest.raises(ConfigError, match="are the models of LoRA values"):
        DistilConfig("base", value_models=("model",))
    with pytest.raises(ConfigError, match="is that of a teacher"):
        DistilConfig(revision="main")


def test_a_teachers_lora_value_is_merged_into_its_model(tiny_config, tiny_pair, tmp_path) -> None:
    """Also if that model has moved since; a folder of other weights is refused."""
    model = shutil.copytree(tiny_pair / "value", tmp_path / "model")
    value = replace(tiny_config.value, path=str(model), lora=LoraConfig(rank=2))
    step = replace(tiny_config.step, max_steps=2)
    logging = replace(tiny_config.logging, evaluate_every=0)
    folder = str(run(replace(tiny_config, value=value, step=step, logging=logging)).output)
    moved = shutil.move(model, tmp_path / "moved")
    base = tiny_config.base.path
    options = DistilConfig(base, values=(folder,), value_models=(str(moved),))
    config = replace(tiny_config, objective="distil", distil=options)
    mesh = make_run_mesh(config)
    sources = choose_models(config, mesh).teacher
    assert sources is not None
    taught = load_teacher(options, sources, compute_dtype="float32", mesh=mesh)
    merged = load_value(folder, value_model=str(moved)).params
    # All but the vocabulary's padding rows.
    assert_same_arrays(taught.params.values[0].params["layers"], merged["layers"])
    for models, error in (((), FileNotFoundError), ((base,), ConfigError)):
        with pytest.raises(error, match=r"distil\.value_models in a training config"):
            choose_models(replace(config, distil=replace(options, value_models=models)), mesh)


def test_special_tokens_that_only_the_teacher_has_are_dropped_and_named(
    config, tmp_path, caplog
) -> None:
    mesh = make_run_mesh(config)
    assert choose_models(config, mesh).teacher is not None
    said = r"the teacher .*tuned has 2 tokens that the student .*base lacks; they are dropped .*"
    assert re.search(said + r"258 '<\|im_start\|>', 259 '<\|im_end\|>'", caplog.text)
    assert "value network" not in caplog.text
    caplog.clear()
    save_tiny_model(tmp_path / "same", seed=7)
    choose_models(replace(config, distil=DistilConfig(str(tmp_path / "same"))), mesh)
    assert "dropped" not in caplog.text
    # The other way round nothing can be learned about the student's further tokens.
    base = BaseConfig(path=config.distil.teacher)
    smaller = replace(config, base=base, distil=DistilConfig(str(tmp_path / "same")))
    with pytest.raises(ConfigError, match=r"the teacher .*same lacks 2 tokens of the student"):
        choose_models(smaller, mesh)


def test_a_revision_is_that_of_the_teacher(monkeypatch, tiny_config) -> None:
    asked = {}

    def read(path: str, *, revision: str | None, role: str) -> None:
        asked.update(path=path, revision=revision)
        raise FileNotFoundError(path)

    monkeypatch.setattr(teacher, "read_language_model", read)
    with pytest.raises(FileNotFoundError):
        teacher.read_teacher(DistilConfig("owner/tuned", revision="v2"), [])
    assert asked == {"path": "owner/tuned", "revision": "v2"}


def test_a_teacher_that_reads_fewer_tokens_is_refused_unless_it_may_read_beyond(
    tiny_config, tmp_path
) -> None:
    short = save_tiny_model(tmp_path / "short", seed=3, max_position_embeddings=32)
    config = replace(tiny_config, objective="distil", distil=DistilConfig(str(short)))
    mesh = make_run_mesh(config)
    with pytest.raises(ConfigError, match=r"max_length = 48 exceeds .*short.*: 32: lower it, or"):
        choose_models(config, mesh)
    beyond = replace(config, data=replace(config.data, beyond_context=True))
    assert choose_models(beyond, mesh).teacher is not None
