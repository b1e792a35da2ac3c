"""Calibration: the fit is the best one, on a shared vocabulary and through a map."""

import dataclasses
import functools

import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.config import StrengthPolicy
from ivl_jax.decoding.compose import compose
from ivl_jax.evaluation import calibration
from ivl_jax.evaluation.calibration import calibrate, calibration_report
from ivl_jax.evaluation.scoring import Row, score_rows
from tests.decoding.anew import random_map
from tests.decoding.tiny import language_model

TEXTS = ["Once upon a time, there was a little girl.", "She was very happy.", "One day Lily saw"]


def rows_of(model):
    """Rows and the tokens that count: all but the first two."""
    rows = [Row(model.encode(text)) for text in TEXTS]
    return rows, [np.arange(len(row.token_ids) - 1) > 1 for row in rows]


def nll(model, strengths, temperature):
    rows, masks = rows_of(model)
    changed = dataclasses.replace(model, strengths=tuple(strengths))
    scored = score_rows(changed, rows, batch_size=4, temperature=temperature)
    total = -sum(one.tokens.log_prob[masks[index]].sum(dtype=float) for index, one in scored)
    return total / sum(mask.sum() for mask in masks)


def test_scores_at_a_temperature_are_those_of_its_distribution(composed):
    rows, _ = rows_of(composed)
    found = {t: dict(score_rows(composed, rows, batch_size=4, temperature=t)) for t in (1.0, 2.0)}
    # At T = 2 the composition with logits z is that with logits z / 2: the base, once more, less.
    halved = compose(composed.base, *composed.values, composed.base)
    halved = dataclasses.replace(halved, strengths=(*(a / 2 for a in composed.strengths), -0.5))
    for index, expected in score_rows(halved, rows, batch_size=4):
        log_prob = found[2.0][index].tokens.log_prob
        np.testing.assert_allclose(log_prob, expected.tokens.log_prob, atol=1e-4)
        assert np.abs(log_prob - found[1.0][index].tokens.log_prob).max() > 1e-3
        np.testing.assert_allclose(found[2.0][index].choices.log_prob[0], log_prob[-1], atol=1e-4)


def test_no_other_strength_or_temperature_fits_better(composed):
    rows, masks = rows_of(composed)
    fit = calibrate(composed, rows, masks, batch_size=2)
    best = nll(composed, *fit)
    assert best < nll(composed, composed.strengths, 1.0)
    for step in (-0.02, 0.02):
        assert best < nll(composed, fit.strengths, fit.temperature * (1 + step)) + 1e-6
        assert best < nll(composed, [fit.strengths[0] + step], fit.temperature) + 1e-6
    start = dataclasses.replace(composed, strengths=(0.1,))
    again = calibrate(start, rows, masks, batch_size=4)
    assert again.strengths == pytest.approx(fit.strengths, abs=0.02)
    assert again.temperature == pytest.approx(fit.temperature, rel=0.02)


def test_a_value_of_another_vocabulary_is_fitted_as_it_decodes(stories260k_dir):
    base, value = (
        language_model(family_folder("S"), seed=0),
        language_model(stories260k_dir, seed=2),
    )
    model = compose(base, value, strengths=[0.5], maps=[random_map(base, value)])
    rows, masks = rows_of(model)
    fit = calibrate(model, rows, masks, batch_size=2)
    assert nll(model, *fit) < nll(model, [0.5], 1.0)
    assert 0.1 <= fit.temperature <= 10  # of random weights, that of the least certain prediction


def test_a_fit_that_ended_early_or_at_a_bound_is_said(composed, monkeypatch, caplog):
    rows, masks = rows_of(composed)
    calibrate(composed, rows, masks, batch_size=4)
    assert caplog.text == ""
    minimize = calibration.minimize
    early = functools.partial(minimize, options={"maxiter": 1})
    monkeypatch.setattr(calibration, "minimize", early)
    calibrate(composed, rows, masks, batch_size=4)
    assert "the calibration did not converge" in caplog.text
    monkeypatch.setattr(calibration, "minimize", minimize)
    monkeypatch.setattr(calibration, "_TEMPERATURES", (0.1, 0.2))
    assert calibrate(composed, rows, masks, batch_size=4).temperature == 0.2
    assert "the calibration ended at the bound T = 0.2: these 3 rows" in caplog.text


def test_the_report_fits_each_half_to_the_other(composed):
    rows, masks = rows_of(composed)
    found = calibration_report(composed, rows, masks, batch_size=4)
    assert found.given_nll == pytest.approx(nll(composed, composed.strengths, 1.0), rel=1e-5)
    everything = calibrate(composed, rows, masks, batch_size=4)
    assert (found.strengths, found.temperature) == everything
    assert found.nll > nll(composed, *everything)


def test_what_cannot_be_calibrated_is_refused(composed, base_alone):
    rows, masks = rows_of(composed)
    with pytest.raises(ValueError, match="strengths of value networks: got none"):
        calibrate(base_alone, rows, masks, batch_size=4)
    with pytest.raises(ValueError, match="none of the 3 rows"):
        calibrate(composed, rows, [mask & False for mask in masks], batch_size=4)
    policy = dataclasses.replace(composed, policy=StrengthPolicy("entropy"))
    with pytest.raises(ValueError, match='strength policy "entropy" varies'):
        calibrate(policy, rows, masks, batch_size=4)
