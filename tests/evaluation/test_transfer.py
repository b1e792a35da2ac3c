"""The transfer report: its figures from given scores, from a model, and on the command line."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.image import imread

from ivl_jax.assets import family_folder
from ivl_jax.data.formats import Demonstration, Message
from ivl_jax.data.tokenized import tokenize_demonstrations
from ivl_jax.decoding.compose import compose
from ivl_jax.evaluation.__main__ import main
from ivl_jax.evaluation.likelihood_report import likelihood_report
from ivl_jax.evaluation.resampling import percentile_interval, resample_ratios
from ivl_jax.evaluation.transfer_report import (
    FACTORS,
    Tokens,
    positions_in_answer,
    summarise,
    transfer_report,
)
from ivl_jax.evaluation.transfer_view import advice, headline, plot
from tests.decoding.anew import random_map
from tests.decoding.tiny import language_model

LENGTH = 64
_ROWS, _EACH = 40, 6


def synthetic(*, gain=0.5, spread=0.3, best=1.0, seed=0):
    """Forty dialogues of six tokens; the mean NLL falls by `gain`, and is lowest at a factor."""
    rng = np.random.default_rng(seed)
    row = np.repeat(np.arange(_ROWS), _EACH)
    base_nll = rng.uniform(2, 4, len(row))
    gains = gain + spread * np.repeat(rng.normal(size=_ROWS), _EACH)
    base_right = rng.random(len(row)) < 0.25
    tokens = Tokens(
        row=row,
        position=np.tile(np.arange(_EACH), _ROWS),
        nll=base_nll - gains,
        base_nll=base_nll,
        entropy=rng.uniform(0, 6, len(row)),
        divergence=np.full(len(row), 0.25),
        right=base_right | (rng.random(len(row)) < 0.5),
        base_right=base_right,
    )
    shape = {factor: 1 - (factor - best) ** 2 for factor in (0.0, *FACTORS)}
    nlls = {
        factor: base_nll - gains * (value - shape[0.0]) / (shape[1.0] - shape[0.0])
        for factor, value in shape.items()
    }
    return tokens, nlls


def report_of(**options):
    tokens, nlls = synthetic(**options)
    return summarise(tokens, nlls, names=[f"few.jsonl:{index}" for index in range(_ROWS)])


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(400, 1))
    low, high = percentile_interval(resample_ratios(values, np.ones_like(values))[:, 0])
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.15)
    # Tokens of one row go together: ten equal ones per row tell no more than one.
    again = percentile_interval(resample_ratios(10 * values, np.full_like(values, 10.0))[:, 0])
    assert again == pytest.approx((low, high))


def test_positions_start_anew_in_every_answer():
    mask = np.array([0, 1, 1, 0, 0, 1, 1, 1], bool)
    assert positions_in_answer(mask)[mask].tolist() == [0, 1, 0, 1, 2]


def test_groups_add_up_to_the_whole():
    tokens, nlls = synthetic()
    found = summarise(tokens, nlls, names=["a"] * _ROWS)
    total = tokens.gain.sum()
    assert found.overall.gain == pytest.approx(total / len(tokens.row))
    by_rightness = ((0, 0, found.where_base_right), (0, 0, found.where_base_wrong))
    for groups in (found.by_position, found.by_entropy, by_rightness):
        gains = [one for _, _, one in groups]
        assert sum(one.tokens for one in gains) == len(tokens.row)
        assert sum(one.gain * one.tokens for one in gains if one.tokens) == pytest.approx(total)
    assert [bounds[:2] for bounds in found.by_position] == [(0, 1), (1, 2), (2, 4), (4, 8)]
    right = (tokens.right & tokens.base_right).sum() / tokens.base_right.sum()
    assert found.kept == pytest.approx(right)
    assert found.rows_helped == np.mean(np.bincount(tokens.row, tokens.gain) > 0)


@pytest.mark.parametrize(
    ("gain", "verdict", "said"),
    [
        (0.5, "helps", "helps this base: +0."),
        (-0.5, "hurts", "hurts this base: -0."),
        (0.02, "unclear", "do not tell"),
    ],
)
def test_the_verdict_follows_the_interval(gain, verdict, said):
    found = report_of(gain=gain)
    low, high = found.overall.interval
    assert low < found.overall.gain < high
    assert found.verdict == verdict
    assert said in headline(found)
    assert (found.rows_needed is None) == (verdict != "unclear")
    if found.rows_needed is not None:
        assert found.rows_needed > _ROWS
        assert f"About {found.rows_needed} dialogues" in headline(found)


@pytest.mark.parametrize(("best", "expected"), [(0.75, 0.75), (1.0, 1.0), (2.0, 2.0)])
def test_the_strength_with_the_lowest_nll_is_suggested(best, expected):
    found = report_of(best=best)
    assert found.suggested_factor == expected
    assert found.strengths[0].factor == 0.0
    by_factor = {one.factor: one for one in found.strengths}
    assert by_factor[1.0].gain_interval == pytest.approx(found.overall.interval)
    assert f"--strength {0.4 * expected:g} --strength {-0.2 * expected:g}" in advice(
        found, (0.4, -0.2)
    )


def test_a_strength_that_is_better_by_chance_only_is_not_suggested():
    tokens, nlls = synthetic()
    noise = np.repeat(np.random.default_rng(3).normal(size=_ROWS), _EACH)
    nlls[1.25] = nlls[1.0] + 0.5 * (noise - noise.mean()) - 0.001
    nlls |= {factor: nlls[1.0] + 1.0 for factor in FACTORS if factor not in (1.0, 1.25)}
    found = summarise(tokens, dict(sorted(nlls.items())), names=["a"] * _ROWS)
    best = min(found.strengths, key=lambda one: one.nll)
    assert (best.factor, found.suggested_factor) == (1.25, 1.0)
    assert found.suggested_interval[0] < 1.25 <= found.suggested_interval[1]


def test_a_group_with_few_dialogues_has_no_interval_and_the_worst_are_named():
    tokens, nlls = synthetic()
    few = tokens._replace(entropy=np.where(tokens.row < 3, 5.0, 0.05))
    found = summarise(few, nlls, names=[f"few.jsonl:{index}" for index in range(_ROWS)])
    *_, (low, _, last) = found.by_entropy
    assert (low, last.rows, last.interval) == (4.0, 3, None)
    gains = np.bincount(tokens.row, tokens.gain) / _EACH
    assert [name for name, _ in found.worst] == [
        f"few.jsonl:{index}" for index in np.argsort(gains)[:5] if gains[index] < 0
    ]


@pytest.fixture(scope="module")
def dialogues(composed):
    texts = [("Who?", "Lily."), ("Where was it?", "In the park."), ("Tell me.", "Once upon " * 9)]
    demonstrations = [
        Demonstration((Message("user", question), Message("assistant", answer)), f"x.jsonl:{n}")
        for n, (question, answer) in enumerate(texts)
    ]
    return tokenize_demonstrations(
        demonstrations, composed.chat_format, sequence_length=LENGTH, cache_dir=None
    )


def test_the_report_agrees_with_the_likelihood_at_every_strength(composed, dialogues):
    found = transfer_report(composed, dialogues, batch_size=4)
    by_factor = {one.factor: one.nll for one in found.strengths}
    assert list(by_factor) == [0.0, *FACTORS]
    for factor in (1.0, 2.0):
        scaled = dataclasses.replace(
            composed, strengths=tuple(factor * alpha for alpha in composed.strengths)
        )
        expected = likelihood_report(scaled, dialogues, batch_size=4).overall
        assert by_factor[factor] == pytest.approx(expected.nll, rel=1e-5)
        assert by_factor[0.0] == pytest.approx(expected.base_nll, rel=1e-5)
        if factor == 1.0:
            assert found.overall.gain == pytest.approx(expected.base_nll - expected.nll, abs=1e-5)
            assert found.overall.tokens == expected.targets
            assert found.divergence == pytest.approx(expected.kl_from_base, rel=1e-5)
            assert (found.right, found.base_right) == (
                pytest.approx(expected.top1),
                pytest.approx(expected.base_top1),
            )
    assert found.overall.interval is None  # three dialogues
    assert found.verdict == "unclear"


def test_a_base_alone_has_nothing_to_transfer(base_alone, dialogues):
    with pytest.raises(ValueError, match="compares value networks with their base: got none"):
        transfer_report(base_alone, dialogues, batch_size=4)


def test_a_value_of_another_vocabulary_is_judged_by_the_base_s_tokens(stories260k_dir):
    base = language_model(family_folder("S"), seed=0)
    value = language_model(stories260k_dir, seed=2)
    model = compose(base, value, strengths=[0.5], maps=[random_map(base, value)])
    messages = (Message("user", "Who was it?"), Message("assistant", "It was unbelievable."))
    some = tokenize_demonstrations(
        [Demonstration(messages, "0")], model.chat_format, sequence_length=LENGTH, cache_dir=None
    )
    found = transfer_report(model, some, batch_size=1)
    expected = likelihood_report(model, some, batch_size=1).overall
    assert found.overall.tokens == expected.targets
    assert found.overall.gain == pytest.approx(expected.base_nll - expected.nll, abs=1e-5)


def test_the_command_writes_report_and_figure(stories260k_dir, value_folder, tmp_path, capsys):
    source = tmp_path / "few.jsonl"
    rows = [{"question": f"Who was it, {n}?", "answer": f"It was Lily {n}."} for n in range(6)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, figure = tmp_path / "new" / "report.json", tmp_path / "new" / "report.png"
    flags = [
        *("transfer", "--base", str(stories260k_dir), "--data", str(source)),
        *("--value", str(value_folder), "--value", str(value_folder)),
        *("--strength", "0.3", "--strength", "-0.1", "--format", "fields"),
        *("--user-template", "{question}", "--assistant-template", "{answer}"),
        *("--output", str(output), "--plot", str(figure), "--data-dir", str(tmp_path / "stored")),
        "--calibrate",
    ]
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "this base" in shown
    assert "--strength" in shown
    assert "Calibration: --strength" in shown
    report = json.loads(output.read_text())
    assert (report["benchmark"], report["dialogues"]) == ("transfer", 6)
    assert report["model"]["strength"] == [0.3, -0.1]
    assert report["overall"]["interval"][0] <= report["overall"]["interval"][1]
    assert report["by_entropy"][-1]["to"] is None
    assert report["calibration"]["given_nll"] == pytest.approx(
        report["overall"]["base_nll"] - report["overall"]["gain"], rel=1e-5
    )
    assert len(report["calibration"]["strengths"]) == 2
    assert imread(figure).std() > 0.01


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--value", "none"), ["--value none is the base alone", "--data is missing"]),
        (("--value", "x", "--strength", "0", "--data", "d"), ["--strength is 0 for every value"]),
        (("--value", "x", "--data", "d", "--plot", "gs://b/p.png"), ["--plot"]),
    ],
)
def test_flags_that_cannot_tell_anything_are_refused(stories260k_dir, capsys, flags, said):
    assert main(["transfer", "--base", str(stories260k_dir), *flags]) == 2
    messages = capsys.readouterr().err
    for part in said:
        assert part in messages


def test_the_figure_shows_a_report_with_empty_groups(tmp_path):
    tokens, nlls = synthetic()
    found = summarise(
        tokens._replace(entropy=np.full(len(tokens.row), 0.05)), nlls, names=["a"] * _ROWS
    )
    plot(found, tmp_path / "report.png")
    assert imread(tmp_path / "report.png").shape[0] > 500
