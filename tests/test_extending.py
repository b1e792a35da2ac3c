"""The seams, used from outside: this module alone defines and runs each kind of extension."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.checkpoint import load_value
from ivl_jax.composed.sources import read_value
from ivl_jax.composition import ConnectionScheme
from ivl_jax.config import StepConfig
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.extensions import load_extension
from ivl_jax.model.decoder import embed
from ivl_jax.training.loop import run
from ivl_jax.training.objectives import OBJECTIVES, SFT, Objective
from ivl_jax.weights.language_model import load_language_model
from tests.training.conftest import make_tiny_config, tiny_pair  # noqa: F401
from tests.training.runs import records

HERE = "tests.test_extending"
STEPS = StepConfig(max_steps=6, batch_size=4)


def _confident_text(graphdef, params, inputs):
    """Embeddings of the text, louder where the base is sure of what follows."""
    logits = inputs.base_logits[..., : inputs.vocab_size]
    largest = jnp.max(logits, axis=-1, keepdims=True)
    confidence = 1 / jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True)
    return embed(graphdef, params, inputs.tokens) * (1 + confidence)


CONFIDENT = ConnectionScheme("confident", _confident_text, reads_base_logits=True)


def _weigh(batch, first):
    """Tokens that the model finds easy count less."""
    surprise = 1 - jnp.exp(first["log_prob"])
    return {"log_prob": -jnp.where(batch.loss_mask, surprise, 0.0)}


FOCAL = Objective(
    name="focal",
    scores=("log_prob",),
    weigh=_weigh,
    count=SFT.count,
    sums=SFT.sums,
    figures=SFT.figures,
    first_pass=("log_prob",),
    monitored=("top1",),
    evaluated=SFT.evaluated,
)


@pytest.fixture
def tiny_config(tiny_pair, tmp_path):  # noqa: F811
    return replace(make_tiny_config(tiny_pair, tmp_path / "run"), step=STEPS)


def test_a_connection_scheme_of_ones_own_trains_saves_and_decodes(tiny_config, tiny_pair):  # noqa: F811
    name = f"{HERE}:CONFIDENT"
    result = run(replace(tiny_config, value=replace(tiny_config.value, connection=name)))
    assert result.held_out["nll"] < records(result.run_dir)[0]["held_out"]["nll"] - 0.1
    value, base = load_value(result.output), load_language_model(tiny_pair / "base")
    assert value.connection == name
    model = compose(base, value, schemes={name: CONFIDENT})
    options = GenerationOptions(max_new_tokens=5)
    (text,) = model.generate(["1 + 1?"], options)
    assert len(text.token_ids) > 0
    alone = compose(base).generate(["1 + 1?"], options)[0]
    assert text.token_ids != alone.token_ids


def test_a_value_folder_never_causes_an_import(tiny_config, tmp_path):
    name = f"{HERE}:CONFIDENT"
    result = run(replace(tiny_config, value=replace(tiny_config.value, connection=name)))
    with pytest.raises(ValueError, match=f"never causes an import.* --connection {name}"):
        read_value(str(result.output))
    assert read_value(str(result.output), schemes={name: CONFIDENT}).scheme is CONFIDENT


def test_an_objective_of_ones_own_trains_with_weights_from_a_first_pass(tiny_config):
    result = run(replace(tiny_config, objective=f"{HERE}:FOCAL"))
    figures = [record for record in records(result.run_dir) if "loss" in record]
    assert figures
    assert all(record["loss"] - record["penalty"] < record["nll"] for record in figures)
    assert result.held_out["nll"] < records(result.run_dir)[0]["held_out"]["nll"] - 0.05
    assert np.isfinite(result.held_out["base_nll"])


def test_a_name_that_is_nothing_says_what_is_expected():
    with pytest.raises(ValueError, match=r"expected one of sft, or module:attribute"):
        load_extension("dpoo", OBJECTIVES, Objective, where="objective")
    with pytest.raises(ValueError, match="No module named 'nowhere'"):
        load_extension("nowhere:X", OBJECTIVES, Objective, where="objective")
    with pytest.raises(ValueError, match="expected a Objective, found ConnectionScheme"):
        load_extension(f"{HERE}:CONFIDENT", OBJECTIVES, Objective, where="objective")
