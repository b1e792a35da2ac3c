"""Training from cached base states: the online run's numbers, and never a stale state."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from ivl_jax.checkpoint import load_value
from ivl_jax.config import BaseConfig
from ivl_jax.data import base_states
from ivl_jax.data.base_states import StatesError
from ivl_jax.training import cached_states
from ivl_jax.training.loop import run
from tests.training.conftest import save_tiny_model
from tests.training.runs import Crash, assert_same_run, at_step, crash, records

# make_mesh says that one of eight virtual devices is used.
pytestmark = pytest.mark.usefixtures("caplog")


@pytest.fixture
def config(tiny_config, tmp_path):
    """A copy of the tied base, read from cached states."""
    base = tmp_path / "base"
    shutil.copytree(tiny_config.value.path, base)
    return replace(
        tiny_config,
        base=BaseConfig(path=str(base), cache_states=True),
        data=replace(tiny_config.data, data_dir=str(tmp_path / "data")),
    )


def never(*_):
    raise AssertionError("the base is run although its states are on disk")


def assert_close_runs(one, other):
    """The same figures and parameters to rounding."""
    for mine, theirs in zip(records(one.run_dir), records(other.run_dir), strict=True):
        for figures in (mine, theirs):
            figures |= figures.pop("held_out", {})
        assert mine == pytest.approx(theirs, rel=2e-5)
    pair = [load_value(result.output).params for result in (one, other)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5), *pair
    )


@pytest.mark.parametrize(
    "connection", ["residual", pytest.param("cascade", marks=pytest.mark.slow)]
)
def test_cached_states_give_the_online_run_and_the_base_runs_once(
    config, tmp_path, connection, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, logger="ivl_jax")
    config = replace(config, value=replace(config.value, connection=connection))
    online = replace(
        config, base=replace(config.base, cache_states=False), run_dir=str(tmp_path / "online")
    )
    whole = run(online)
    first = run(config)
    assert "final hidden states of 1,103 positions take 0.1 MB in" in caplog.text
    assert_close_runs(first, whole)
    # Another run on the same demonstrations reads what is there.
    monkeypatch.setattr(cached_states, "load_base", never)
    assert_same_run(run(replace(config, run_dir=str(tmp_path / "again"))), first)


@pytest.mark.slow
def test_a_run_on_the_same_demonstrations_packed_otherwise_reads_what_is_there(
    config, tmp_path, monkeypatch
):
    run(config)
    monkeypatch.setattr(cached_states, "load_base", never)
    optimizer = replace(config.optimizer, learning_rate=3e-3)
    again = replace(config, seed=5, optimizer=optimizer)
    again = replace(again, data=replace(again.data, packing=False))
    other = run(replace(again, run_dir=str(tmp_path / "again")))
    base = replace(config.base, cache_states=False)
    theirs = replace(again, base=base, run_dir=str(tmp_path / "theirs"))
    assert_close_runs(other, run(theirs))


@pytest.mark.slow
def test_a_stopped_pass_and_a_stopped_run_resume_to_the_same_bits(config, tmp_path, monkeypatch):
    monkeypatch.setattr(base_states, "_SHARD_BYTES", 1 << 13)
    whole = run(replace(config, run_dir=str(tmp_path / "whole")))
    shutil.rmtree(tmp_path / "data" / "base_states")
    with monkeypatch.context() as patch:
        write, count = base_states.BaseStates.write, iter(range(100))

        def write_two(self, shard, states):
            if next(count) == 2:
                raise Crash
            write(self, shard, states)

        patch.setattr(base_states.BaseStates, "write", write_two)
        with pytest.raises(Crash):
            run(config)
    files = sorted((tmp_path / "data" / "base_states").rglob("*.arrayrecord"))
    assert len(files) == 2
    times = [path.stat().st_mtime_ns for path in files]
    resumed = replace(config, resume=True)
    with monkeypatch.context() as patch:
        at_step(patch, 3, crash)
        with pytest.raises(Crash):
            run(resumed)
    assert [path.stat().st_mtime_ns for path in files] == times
    assert_same_run(run(resumed), whole)


def test_states_of_other_weights_or_lengths_are_refused_before_a_model_is_read(
    config, tmp_path, monkeypatch
):
    run(config)
    again = replace(config, run_dir=str(tmp_path / "again"))
    monkeypatch.setattr(cached_states, "load_base", never)
    longer = replace(again, data=replace(config.data, max_length=56))
    with pytest.raises(StatesError, match=r"data.max_length: 48 in the cache, 56 in this run"):
        run(longer)
    shutil.rmtree(config.base.path)
    save_tiny_model(Path(config.base.path), seed=3, num_hidden_layers=1, tie_word_embeddings=True)
    with pytest.raises(StatesError, match=r"base weights: \w{12} in the cache, \w{12} in this run"):
        run(again)
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_several_bases_may_each_be_cached_or_not(config, tiny_config, tmp_path):
    bases = (replace(config.base, weight=2.0), BaseConfig(path=tiny_config.base.path))
    mixed = run(replace(config, base=BaseConfig(), bases=bases))
    online = replace(bases[0], cache_states=False), bases[1]
    whole = run(replace(config, base=BaseConfig(), bases=online, run_dir=str(tmp_path / "online")))
    pair = [load_value(result.output).params for result in (mixed, whole)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5), *pair
    )


def test_a_full_disk_is_reported_before_the_base_is_read(config, monkeypatch):
    monkeypatch.setattr(cached_states, "load_base", never)
    usage = shutil.disk_usage("/")
    # Room for the run's own files, none for the states.
    full = usage._replace(free=1000)
    roomy = usage._replace(free=2**40)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: full if "base_states" in str(path) else roomy
    )
    with pytest.raises(OSError, match=r"need 0.1 MB more.*cache_states = false"):
        run(config)
    assert not Path(config.run_dir).exists()
