"""Answers are sampled from the very distribution that the training step scores."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.composed.forward import compose, network_logits, run_networks
from ivl_jax.composed.network import ComposedParams, ValueArrays
from ivl_jax.config import GrpoConfig, LoraConfig, MeshConfig, StepConfig, TrainConfig
from ivl_jax.post_training.answers import Answers, lay_out_answers
from ivl_jax.post_training.sampler import Sampler
from ivl_jax.sharding import place_batch
from ivl_jax.training.loss import first_pass_scores
from ivl_jax.training.models import choose_models
from ivl_jax.training.objectives.grpo import make_grpo
from ivl_jax.training.record_file import RecordFile
from ivl_jax.training.run_directory import RunDirectory
from ivl_jax.training.setup import make_run_mesh, prepare, prepare_data
from ivl_jax.training.step import split_micro_batches
from ivl_jax.training.used_weights import fingerprint_weights
from tests.training.conftest import make_tiny_config, save_tiny_model, tiny_pair  # noqa: F401
from tests.training.tiny import VOCAB, make_arch, make_batch, make_loss, make_params, on_device

pytestmark = pytest.mark.usefixtures("caplog")


def log_probs_of_both(config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of sampled tokens: the engine's, and those of the training step."""
    mesh = make_run_mesh(config)
    models = choose_models(config, mesh)
    prepared = prepare(config, models, prepare_data(config, models, mesh), mesh)
    sampling = prepared.objective.sampling
    assert sampling is not None
    samples = RecordFile(RunDirectory(config.run_dir).path / "samples.jsonl")
    weights = fingerprint_weights(config, models)
    sampler = Sampler(config, prepared, weights, sampling, samples_file=samples)
    (program,), state = prepared.programs, prepared.make_state()
    params = jax.tree.map(lambda leaf: leaf + 0.01 * jnp.cos(leaf), state.params)
    model = sampler._model(params, program)
    asked = model.prepare(
        [f"{number} + 1?" for number in range(8)], max_new_tokens=24, temperature=1.0, log_probs=0
    )
    found = list(model.generate_prepared(asked, batch_size=8))
    answers = Answers([one.token_ids for one in asked], found, [])
    batch = lay_out_answers(answers, rows=8, length=48, pad_id=0, mask_truncated=False)
    counted = batch.loss_mask
    batch = place_batch(split_micro_batches(batch, 1), mesh, micro_batched=True)
    scores = program.first_pass(params, program.base_params, batch)["log_prob"]
    ours = [each.log_prob for one in found for each in one.log_probs or ()]
    return np.asarray(ours), np.asarray(scores)[0][counted]


@pytest.fixture
def config(tiny_pair, tmp_path) -> TrainConfig:  # noqa: F811
    tiny = make_tiny_config(tiny_pair, tmp_path / "run")
    return replace(
        tiny,
        objective="grpo",
        grpo=GrpoConfig(group_size=2, max_new_tokens=8, updates=2),
        data=replace(tiny.data, validation_fraction=0.0),
        step=StepConfig(max_steps=2, batch_size=8),
        logging=replace(tiny.logging, evaluate_every=2),
    )


@pytest.mark.parametrize("fsdp", [1, 2])
def test_a_tied_head_beside_int8_kernels_is_not_rounded_for_sampling(config, fsdp, tmp_path):
    tied = save_tiny_model(tmp_path / "tied", seed=3, tie_word_embeddings=True)
    base = replace(config.base, path=str(tied), param_dtype="int8")
    mesh = MeshConfig(data=1, fsdp=fsdp, tensor=1)
    sampled, scored = log_probs_of_both(replace(config, base=base, mesh=mesh))
    np.testing.assert_allclose(sampled, scored, atol=2e-5)


def test_a_bfloat16_base_is_computed_with_in_float32_if_the_step_does(config):
    base = replace(config.base, param_dtype="bfloat16")
    sampled, scored = log_probs_of_both(replace(config, base=base))
    np.testing.assert_allclose(sampled, scored, atol=2e-5)


def test_bfloat16_products_of_a_step_are_those_of_sampling(config, monkeypatch):
    """Rounding in another order is left; sampling in float32 would be further off."""
    mesh = MeshConfig(data=1, fsdp=2, tensor=1)
    config = replace(config, mesh=mesh, step=replace(config.step, compute_dtype="bfloat16"))
    near = np.abs(np.subtract(*log_probs_of_both(config))).mean()
    monkeypatch.setattr(Sampler, "_compute_dtype", jnp.dtype("float32"))
    far = np.abs(np.subtract(*log_probs_of_both(config))).mean()
    assert near < 0.5 * far


def test_an_adapter_is_merged_without_a_change_of_its_predictions(config):
    config = replace(config, value=replace(config.value, lora=LoraConfig(rank=2)))
    sampled, scored = log_probs_of_both(config)
    np.testing.assert_allclose(sampled, scored, atol=2e-5)


def test_scores_are_those_of_the_distribution_at_the_temperature_of_sampling():
    """Log-probability, entropy and KL divergence; as in TRL, the base's logits are divided too."""
    arch, batch = make_arch(), on_device(make_batch())
    value, base = make_params(arch, 0), make_params(arch, 1)
    objective = make_grpo(GrpoConfig(temperature=0.5, updates=2))
    objective = replace(objective, first_pass=("log_prob", "entropy", "base_kl"))
    loss = make_loss(arch, objective=objective, penalty_kind="none", chunk_length=5)
    params = ComposedParams(base, (ValueArrays(value),))
    where = {"positions": batch.positions, "segment_ids": batch.segment_ids}
    hidden, _ = run_networks(loss.composition, params, batch.tokens, **where)
    logits = network_logits(loss.composition, params, hidden)
    composed = compose(loss.composition, params.values, logits, strengths=jnp.ones((1, 1)))
    log_p, log_q = (
        np.asarray(jax.nn.log_softmax(each[..., :VOCAB] / 0.5)) for each in (composed, logits.base)
    )
    expected = {
        "log_prob": np.take_along_axis(log_p, np.asarray(batch.targets)[..., None], -1)[..., 0],
        "entropy": -(np.exp(log_p) * log_p).sum(-1),
        "base_kl": (np.exp(log_p) * (log_p - log_q)).sum(-1),
    }
    found = first_pass_scores(loss, value, base, batch)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5, err_msg=name)
