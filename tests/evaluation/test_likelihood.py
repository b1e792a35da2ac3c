import json

import jax
import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.composed.network import Composition, Network
from ivl_jax.composition import SCHEMES
from ivl_jax.data.batching import make_eval_batches
from ivl_jax.data.formats import Demonstration, Message
from ivl_jax.data.tokenized import tokenize_demonstrations
from ivl_jax.decoding.compose import compose
from ivl_jax.evaluation.__main__ import main
from ivl_jax.evaluation.likelihood_report import likelihood_report
from ivl_jax.evaluation.scoring import Row, score_rows
from ivl_jax.model.decoder import build_decoder
from ivl_jax.training.loss import Loss, count_tokens, loss_sum
from tests.decoding.anew import random_map
from tests.decoding.tiny import language_model

LENGTH = 64


@pytest.fixture(scope="module")
def dialogues(composed):
    """Two short dialogues, and one that is cut at 65 tokens."""
    texts = [("Who?", "Lily."), ("Where was it?", "In the park."), ("Tell me.", "Once upon " * 9)]
    demonstrations = [
        Demonstration((Message("user", question), Message("assistant", answer)), str(index))
        for index, (question, answer) in enumerate(texts)
    ]
    return tokenize_demonstrations(
        demonstrations, composed.chat_format, sequence_length=LENGTH, cache_dir=None
    )


@pytest.fixture(scope="module")
def report(composed, dialogues):
    return likelihood_report(composed, dialogues, batch_size=4)


def test_the_report_agrees_with_the_held_out_evaluation_of_training(
    composed, value, dialogues, stories, report
):
    networks = [
        Network(build_decoder(model.arch), model.arch, 512, scheme=scheme)
        for model, scheme in ((stories, None), (value, SCHEMES["residual"]))
    ]
    loss = Loss(Composition(networks[0], (networks[1],)))
    (batch,) = make_eval_batches(dialogues, batch_size=4, pad_id=0, packing=False)
    # Training composes with strength 1; the report's model has 0.3: scale the value's own head.
    head = {"kernel": 0.3 * value.params["lm_head"]["kernel"]}

    @jax.jit
    def held_out(params, base_params, batch):
        counts = count_tokens(loss, batch)
        return loss_sum(loss, params, base_params, batch, counts=counts, with_base=True)[2]

    sums = jax.device_get(held_out(value.params | {"lm_head": head}, stories.params, batch))
    overall = report.overall
    assert overall.targets == sums["loss_tokens"] == dialogues.report.targets
    assert overall.tokens == sums["real_tokens"]
    np.testing.assert_allclose(overall.nll, sums["nll"] / sums["loss_tokens"], rtol=1e-5)
    np.testing.assert_allclose(overall.base_nll, sums["base_nll"] / sums["loss_tokens"], rtol=1e-5)
    assert overall.top1 * overall.targets == pytest.approx(float(sums["correct"]))
    assert overall.base_top1 * overall.targets == pytest.approx(float(sums["base_correct"]))
    (magnitude,) = overall.mean_abs_value
    np.testing.assert_allclose(0.3 * magnitude, sums["magnitude"] / sums["real_tokens"], rtol=1e-4)
    assert overall.kl_from_base > 0


def test_positions_add_up_to_the_whole(report):
    bounds = [(start, end) for start, end, _ in report.by_position]
    assert bounds == [(0, 16), (16, 32), (32, 64)]
    parts = [figures for _, _, figures in report.by_position]
    assert sum(part.targets for part in parts) == report.overall.targets
    assert sum(part.tokens for part in parts) == report.overall.tokens
    nll = sum(part.nll * part.targets for part in parts if part.targets)
    assert nll == pytest.approx(report.overall.nll * report.overall.targets)
    magnitude = sum(part.mean_abs_value[0] * part.tokens for part in parts)
    assert magnitude == pytest.approx(report.overall.mean_abs_value[0] * report.overall.tokens)


def test_the_command_writes_the_report_and_shows_the_table(
    stories260k_dir, value_folder, tmp_path, capsys
):
    source = tmp_path / "held_out.jsonl"
    row = {"question": "Who was it?", "answer": "It was Lily."}
    source.write_text((json.dumps(row) + "\n") * 3)
    output = tmp_path / "new" / "report.json"
    flags = [
        *("likelihood", "--base", str(stories260k_dir), "--value", str(value_folder)),
        *("--strength", "0.3", "--data", str(source), "--format", "fields", "--limit", "2"),
        *("--user-template", "{question}", "--assistant-template", "{answer}"),
        *("--output", str(output), "--data-dir", str(tmp_path / "stored"), "--mesh.tensor", "1"),
    ]
    assert main(flags) == 0
    assert "base NLL" in capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["dialogues"] == 2
    assert report["model"]["strength"] == [0.3]
    assert report["by_position"][0]["from"] == 0
    assert len(report["mean_abs_value"]) == 1
    assert report["nll"] != report["base_nll"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), ["--base is missing", "--data is missing"]),
        (
            (
                "--base",
                "BASE",
                "--data",
                "absent.jsonl",
                "--value",
                "a",
                "--value",
                "b",
                "--map",
                "m",
            ),
            ["2 value(s), but --map is given 1 time(s)"],
        ),
        (("--base", "BASE", "--data", "absent.jsonl"), ["no file absent.jsonl"]),
        (
            ("--base", "BASE", "--data", "x.jsonl", "--value", "FAMILY"),
            ["tokenizers of the base", "python -m ivl_jax.vocabulary build --base-tokenizer"],
        ),
        (
            ("--base", "BASE", "--data", "x", "--value", "FAMILY", "--map", "absent.safetensors"),
            ["no vocabulary map at absent.safetensors", "python -m ivl_jax.vocabulary build"],
        ),
        (("--base", "./absent", "--data", "x.jsonl"), ["./absent: no such folder"]),
        (
            ("--base", "BASE", "--data", "x.jsonl", "--value", "./absent"),
            ["neither a value folder nor"],
        ),
        (
            ("--base", "BASE", "--data", "x.jsonl", "--value", "FUTURE"),
            [
                "format_version 99, this version of ivl_jax reads 1",
                "install the ivl_jax that wrote",
            ],
        ),
    ],
    ids=lambda flags: " ".join(flags)[:60],
)
def test_bad_input_is_reported_before_a_model_is_loaded(
    stories260k_dir, tmp_path, monkeypatch, capsys, flags, said
):
    def fail(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("ivl_jax.composed.sources.ModelSource.load", fail)
    (tmp_path / "ivl.json").write_text('{"format_version": 99}')
    places = {"BASE": stories260k_dir, "FUTURE": tmp_path, "FAMILY": family_folder("S")}
    stored = ("--data-dir", str(tmp_path / "stored"))
    assert main(["likelihood", *(str(places.get(flag, flag)) for flag in flags), *stored]) == 2
    messages = capsys.readouterr().err
    for part in said:
        assert part in messages


def test_a_value_of_another_vocabulary_is_reported_where_it_predicts(stories260k_dir):
    """It has no effect within a prompt, which is not a target either."""
    base = language_model(family_folder("S"), seed=0)
    value = language_model(stories260k_dir, seed=2)
    model = compose(base, value, strengths=[0.5], maps=[random_map(base, value)])
    messages = (Message("user", "Who was it?"), Message("assistant", "It was unbelievable."))
    dialogues = tokenize_demonstrations(
        [Demonstration(messages, "0")], model.chat_format, sequence_length=LENGTH, cache_dir=None
    )
    found = likelihood_report(model, dialogues, batch_size=1).overall
    ((_, alone),) = score_rows(compose(base), [Row(dialogues[0].tokens.tolist())], batch_size=1)
    counted = dialogues[0].loss_mask[1:]
    assert found.targets == counted.sum()
    assert found.tokens < len(counted)
    assert found.base_nll == pytest.approx(-alone.tokens.log_prob[counted].mean(), rel=1e-5)
    assert np.isfinite(found.nll)
    assert found.nll != pytest.approx(found.base_nll, rel=1e-3)
    assert found.mean_abs_value[0] > 0


def test_a_base_alone_has_a_report_too(base_alone, composed, dialogues):
    alone = likelihood_report(base_alone, dialogues, batch_size=4).overall
    beside = likelihood_report(composed, dialogues, batch_size=4).overall
    assert alone.mean_abs_value == ()
    assert alone.nll == pytest.approx(beside.base_nll, rel=1e-5)
