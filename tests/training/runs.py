"""Runs that die at a chosen moment, and what two runs must have in common."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from ivl_jax.checkpoint import load_value
from ivl_jax.training.record_file import RecordFile
from ivl_jax.training.reporting import Reporter
from ivl_jax.weights.language_model import load_language_model


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_arrays(one, other):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other
    )


class Crash(Exception):
    """Stands for a killed process."""


def at_step(monkeypatch, number, act):
    """Do something when a step's figures are read."""
    original = Reporter.step

    def step(self, step, metrics, **options):
        original(self, step, metrics, **options)
        if step == number:
            act()

    monkeypatch.setattr(Reporter, "step", step)


def crash():
    raise Crash


def crash_at_record(monkeypatch, number):
    """Die while the n-th record of metrics.jsonl is half written."""
    original, count = RecordFile.append, iter(range(1, 100))

    def append(self, record):
        if self.path.name == "metrics.jsonl" and next(count) == number:
            with open(self.path, "ab") as file:
                file.write(json.dumps(record).encode()[:20])
            raise Crash
        original(self, record)

    monkeypatch.setattr(RecordFile, "append", append)


def crash_and_resume(monkeypatch, run, config):
    """Crash a run after step 5, resume it, and return what the second start returns."""
    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(Crash):
            run(config)
    return run(replace(config, resume=True))


def assert_same_run(one, other):
    """Two runs left the same parameters, metrics and figures."""
    metrics = [(result.run_dir / "metrics.jsonl").read_bytes() for result in (one, other)]
    assert metrics[0] == metrics[1]
    load = load_value if (one.output / "ivl.json").exists() else load_language_model
    models = [load(str(result.output)) for result in (one, other)]
    assert_same_arrays(models[0].params, models[1].params)
    assert one.held_out == other.held_out
