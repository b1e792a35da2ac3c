"""What a run says of its figures."""

import pytest

from ivl_jax.training.reporting import _evaluation_text

BASE = {"base_nll": 2.0, "base_accuracy": 0.25}


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ({"nll": 1.0, "accuracy": 0.5}, "nll 1.0000 · accuracy 50.00%"),
        (
            {"nll": 1.0, "accuracy": 0.5, "mean_abs_value": 0.1} | BASE,
            "base nll 2.0000, accuracy 25.00% · with value nll 1.0000, accuracy 50.00%, "
            "mean |z_value| 0.100",
        ),
        ({"accuracy": 0.5, "reward_margin": 1.25}, "accuracy 0.5 · reward margin 1.25"),
    ],
)
def test_held_out_figures_are_shown_for_every_objective(figures, text):
    assert _evaluation_text(figures) == text
