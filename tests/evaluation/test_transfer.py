"""The transfer report: its figures from given scores, and from a model."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from ivl_jax.assets import family_folder
from ivl_jax.data.formats import Demonstration, Message
from ivl_jax.data.tokenized import tokenize_demonstrations
from ivl_jax.decoding.compose import compose
from ivl_jax.evaluation.likelihood_report import likelihood_report
from ivl_jax.evaluation.transfer_report import (
    FACTORS,
    positions_in_answer,
    summarise,
    transfer_report,
)
from ivl_jax.evaluation.transfer_view import advice, headline, show
from tests.decoding.anew import random_map
from tests.decoding.tiny import language_model
from tests.evaluation.transfer_scores import EACH as _EACH
from tests.evaluation.transfer_scores import ROWS as _ROWS
from tests.evaluation.transfer_scores import report_of, synthetic

LENGTH = 64


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
    assert "value networks help" in headline(report_of(gain=0.5), values=2)
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


def test_more_dialogues_are_asked_for_than_there_are():
    """One that loses much makes the arm towards 0 the longer one, or the shorter."""
    rng = np.random.default_rng(0)
    for sign in (1, -1):
        unclear = []
        for _ in range(40):
            gains = np.full(12, 0.3)
            gains[0] = -2.0 + 0.5 * rng.normal()
            unclear.append(report_of(row_gains=sign * gains))
        needed = [one.rows_needed for one in unclear if one.verdict == "unclear"]
        assert len(needed) > 20
        assert min(needed) > 12
        # With a symmetric interval of the same width it would be fewer, for the arm is longer.
        low, high = unclear[0].overall.interval
        arm = unclear[0].overall.gain - low if sign > 0 else high - unclear[0].overall.gain
        assert arm > (high - low) / 2


def test_where_the_value_hurts_the_base_alone_is_suggested_unless_less_of_it_helps():
    hurts = np.random.default_rng(0).normal(-0.5, 0.02, _ROWS)
    noisy = np.random.default_rng(1).normal(0, 0.3, _ROWS)
    noisy += 0.01 - noisy.mean()  # the lowest NLL, and surely better than the given strength
    worse = {factor: 5 * hurts for factor in FACTORS if factor != 1.0}
    found = report_of(row_gains=hurts, others=worse | {0.25: noisy})
    assert (found.verdict, found.suggested_factor) == ("hurts", 0.0)
    assert min(found.strengths, key=lambda one: one.nll).factor == 0.25
    assert "the base alone is reliably better than the given one" in advice(found, (1.0,))
    found = report_of(row_gains=hurts, others=worse | {0.25: -hurts})
    assert (found.verdict, found.suggested_factor) == ("hurts", 0.25)


def test_of_several_better_strengths_a_reliable_one_is_suggested():
    gains, noise = np.random.default_rng(0).normal(0.5, 0.1, (2, _ROWS))
    lucky = gains + 0.2 + 50 * (noise - noise.mean())
    others = {factor: gains - 1.0 for factor in FACTORS if factor != 1.0}
    found = report_of(row_gains=gains, others=others | {1.25: gains + 0.1, 1.5: lucky})
    assert min(found.strengths, key=lambda one: one.nll).factor == 1.5
    assert found.suggested_factor == 1.25
    assert "with the lowest NLL on these dialogues" in advice(found, (1.0,))


@pytest.mark.parametrize("rows", [1, 4])
def test_of_few_dialogues_nothing_is_called_certain(rows):
    gains = np.full(rows, 0.5) + 0.01 * np.arange(rows)
    found = report_of(row_gains=gains, others={2.0: gains + 1.0})
    assert found.overall.interval is found.rows_helped_interval is None
    assert [one.gain_interval for one in found.strengths] == [None] * len(found.strengths)
    assert (found.suggested_factor, found.suggested_interval) == (1.0, None)
    console = Console(record=True, file=io.StringIO(), width=200)
    show(found, (0.5,), console)
    shown = console.export_text()
    assert "95 %" not in shown
    assert "reliably" not in shown
    assert "--strength 0.5 (the given one: too few dialogues" in shown
    assert f"({rows} dialogue{'s' * (rows > 1)}, {rows * _EACH} tokens)" in shown
    assert "An interval needs at least 5 different dialogues." in shown


def test_a_group_with_few_dialogues_has_no_interval_and_the_worst_are_named():
    tokens, nlls = synthetic()
    few = tokens._replace(entropy=np.where(tokens.row < 3, 5.0, 0.05))
    found = summarise(few, nlls, names=[f"few.jsonl:{index}" for index in range(_ROWS)])
    assert found.row_names == tuple(f"few.jsonl:{index}" for index in range(_ROWS))
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


def test_copies_of_a_dialogue_count_as_one(composed, dialogues):
    many = tokenize_demonstrations(
        [dialogues.demonstrations[index] for index in (0, 0, 1, 0, 2, 2)],
        composed.chat_format,
        sequence_length=LENGTH,
        cache_dir=None,
    )
    found = transfer_report(composed, many, batch_size=4)
    alone = transfer_report(composed, dialogues, batch_size=4)
    assert found.overall.rows == alone.overall.rows == 3
    assert found.overall.interval is None
    assert found.overall.tokens == many.report.targets > alone.overall.tokens
    assert found.row_names == alone.row_names == ("x.jsonl:0", "x.jsonl:1", "x.jsonl:2")
    assert found.row_gains == pytest.approx(alone.row_gains, abs=1e-5)


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
