"""What a run says of its figures."""

import itertools
import json
import logging

import pytest

from ivl_jax.config import TrainConfig
from ivl_jax.training import reporting
from ivl_jax.training.objectives.grpo import GRPO
from ivl_jax.training.objectives.sft import SFT
from ivl_jax.training.output import report_best
from ivl_jax.training.reporting import Reporter, _evaluation_text
from ivl_jax.training.rollouts import SamplingProgress
from ivl_jax.training.run_directory import RunDirectory

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


def test_sampling_is_timed_apart_and_shown_while_it_takes_long(tmp_path, monkeypatch, caplog):
    """Twenty seconds pass between two looks at the clock."""
    seconds = itertools.count(0.0, 20.0)
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: next(seconds))
    caplog.set_level(logging.INFO, "ivl_jax")
    run = RunDirectory(str(tmp_path))
    with Reporter(run, trackers=(), first_step=0, total_steps=2, shown=()) as report:
        with report.sampling("sampling for step 1") as show:  # from 40 s on
            for ended in range(5):
                show(SamplingProgress(ended, 8, 100 * ended))
        with report.sampling("answering held-out prompts", counted=False) as show:
            show(SamplingProgress(8, 8, 900))
        figures = {"real_tokens": 60.0, "loss": 1.0, "learning_rate": 0.1, "gradient_norm": 1.0}
        report.step(1, figures, base="", record=True)
    said = [record.getMessage() for record in caplog.records]
    lines = [line for line in said if line.startswith("sampling for")]
    assert lines == [
        "sampling for step 1: 1 of 8 answers · 100 tokens, 2 tokens/s",
        "sampling for step 1: 3 of 8 answers · 300 tokens, 4 tokens/s",
    ]
    (timings,) = map(json.loads, run.timings.path.read_text().splitlines())
    assert timings["sampling_seconds_per_step"] == 120.0
    assert timings["sampled_tokens_per_second"] == pytest.approx(400 / 120)
    assert timings["sampling_share"] == pytest.approx(120 / timings["seconds_per_step"])
    assert "tokens/s · sampling" in said[-1]
    assert "% of the time, 3 tokens/s · ETA" in said[-1]


@pytest.mark.parametrize(
    ("objective", "best", "said"),
    [
        (GRPO, 0, "no checkpoint has a higher held-out reward than step 0"),
        (GRPO, 3, "the highest held-out reward was at step 3"),
        (SFT, 0, "no checkpoint has a lower held-out NLL than step 0"),
        (SFT, 3, "the lowest held-out NLL was at step 3"),
        (SFT, 5, ""),
    ],
)
def test_the_best_checkpoint_is_named_where_it_is_not_the_last(
    tmp_path, caplog, objective, best, said
):
    caplog.set_level(logging.INFO, "ivl_jax")
    report_best(TrainConfig(), RunDirectory(str(tmp_path)), objective, best=best, last=5)
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)
