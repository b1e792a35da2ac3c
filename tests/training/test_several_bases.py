"""Training with several bases in turn."""

from dataclasses import replace

import pytest

from ivl_jax.checkpoint import load_value
from ivl_jax.config import BaseConfig, ConfigError
from ivl_jax.tokenizer_agreement import TokenizerMismatchError
from ivl_jax.training import programs
from ivl_jax.training.base_turns import BaseTurns
from ivl_jax.training.loop import run
from tests.training.conftest import save_tiny_model
from tests.training.runs import Crash, assert_same_run, at_step, crash, records

# make_mesh says that one of eight virtual devices is used.
pytestmark = pytest.mark.usefixtures("caplog")


@pytest.fixture(scope="module")
def larger_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("larger") / "base"
    return save_tiny_model(folder, seed=5, num_hidden_layers=3)


@pytest.fixture
def config(tiny_config, larger_base):
    """Two bases, three batches with the first for each with the second."""
    small = BaseConfig(path=tiny_config.base.path, weight=3.0)
    large = BaseConfig(path=str(larger_base), weight=1.0)
    return replace(tiny_config, base=BaseConfig(), bases=(small, large))


def test_turns_respect_the_weights_everywhere_and_depend_on_nothing_else():
    turns = BaseTurns((1.0, 2.0, 5.0), seed=3)
    taken = [turns(batch) for batch in range(800)]
    for index, weight in enumerate(turns.weights):
        assert abs(taken.count(index) - 100 * weight) <= 3
        assert abs(taken[200:280].count(index) - 10 * weight) <= 3
    assert [turns(batch) for batch in range(500, 800)] == taken[500:]
    assert taken != [BaseTurns(turns.weights, seed=4)(batch) for batch in range(800)]
    assert {BaseTurns((2.0,), seed=3)(batch) for batch in range(50)} == {0}


@pytest.mark.slow
def test_a_run_meets_each_base_in_turn_and_a_crash_changes_nothing(
    config, tiny_config, tmp_path, monkeypatch
):
    whole = run(config)
    lines = records(whole.run_dir)
    paths = [base.path for base in config.bases]
    turns = BaseTurns((3.0, 1.0), config.seed)
    met = [line["base"] for line in lines if "loss" in line]
    assert met == [paths[turns(batch)] for batch in range(6)]
    assert set(met) == set(paths)
    start = lines[0]
    by_base = [start["held_out_by_base"][path] for path in paths]
    assert by_base[0]["base_nll"] != by_base[1]["base_nll"]
    for name in ("nll", "base_nll", "accuracy"):
        mean = 0.75 * by_base[0][name] + 0.25 * by_base[1][name]
        assert start["held_out"][name] == pytest.approx(mean)
    for path in paths:
        assert whole.held_out_by_base[path]["nll"] < start["held_out_by_base"][path]["nll"]
    name = load_value(whole.output).metadata.training_base["name"]
    assert name == f"{paths[0]} and {paths[1]}"

    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        at_step(patch, 3, crash)
        with pytest.raises(Crash):
            run(stopped)
    assert_same_run(run(replace(stopped, resume=True)), whole)


def test_a_list_of_one_base_is_that_base(config, tiny_config, tmp_path):
    alone = run(replace(tiny_config, run_dir=str(tmp_path / "alone")))
    listed = replace(config, bases=config.bases[:1], run_dir=str(tmp_path / "listed"))
    assert_same_run(run(listed), alone)


def test_a_base_with_another_tokenizer_stops_before_anything_is_loaded(
    config, stories260k_dir, monkeypatch
):
    monkeypatch.setattr(programs, "load_base", lambda *_: crash())
    bases = (*config.bases, BaseConfig(path=str(stories260k_dir)))
    with pytest.raises(TokenizerMismatchError, match="stories260k"):
        run(replace(config, bases=bases))
    data = replace(config.data, max_length=65)
    with pytest.raises(ConfigError, match=r"max_length = 65 .*base: 64.*base: 64"):
        run(replace(config, data=data))
