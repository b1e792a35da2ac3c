"""Learning from sampled answers: rewards that rise, runs that resume, what is refused."""

import json
import logging
import os
import re
import signal
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from ivl_jax.checkpoint import TrainCheckpointer
from ivl_jax.config import (
    BaseConfig,
    ConfigError,
    DistilConfig,
    GrpoConfig,
    MeshConfig,
    PenaltyConfig,
    StepConfig,
    TrainConfig,
    ValueConfig,
)
from ivl_jax.manifest import read_manifest
from ivl_jax.model.assembly import static_attribute
from ivl_jax.post_training import run
from ivl_jax.post_training.sampler import Sampler
from ivl_jax.rewards import RewardError, Sample
from ivl_jax.training import loop
from ivl_jax.training.models import choose_models, place_base
from ivl_jax.training.networks import frozen_network
from ivl_jax.training.setup import make_run_mesh
from tests.training.conftest import make_tiny_config, save_tiny_model, tiny_pair  # noqa: F401
from tests.training.runs import assert_same_run, crash_and_resume, records


def ascii_share(sample: Sample) -> float:
    """A reward that a model of random bytes can learn."""
    return sum(character.isascii() for character in sample.answer) / max(len(sample.answer), 1)


def is_absent(sample: Sample) -> float:
    raise LookupError("no such answer")


@pytest.fixture
def config(tiny_pair, tmp_path) -> TrainConfig:  # noqa: F811
    tiny = make_tiny_config(tiny_pair, tmp_path / "run")
    return replace(
        tiny,
        objective="grpo",
        grpo=GrpoConfig(
            rewards=("tests.test_post_training:ascii_share", "exact_match"),
            group_size=4,
            max_new_tokens=6,
            kl_weight=0.01,
            mask_truncated=False,
        ),
        penalty=PenaltyConfig(kind="none"),
        step=StepConfig(max_steps=6, batch_size=16, micro_batches=2),
    )


@pytest.mark.parametrize("updates", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rewards_rise_and_a_stopped_run_resumes_to_the_bits_of_one_that_never_stopped(
    config, updates, tmp_path, monkeypatch
) -> None:
    grpo = replace(config.grpo, updates=updates)
    logging = replace(config.logging, evaluate_every=updates, checkpoint_every=updates)
    config = replace(config, grpo=grpo, logging=logging)
    whole = run(config)
    steps = [one for one in records(whole.run_dir) if "loss" in one]
    rewards = [one["reward"] for one in steps]
    assert np.mean(rewards[-2:]) > rewards[0] + 0.05
    assert {"reward", "kl", "nll", "truncated"} <= set(whole.held_out)
    evaluations = [one for one in records(whole.run_dir) if "held_out" in one]
    found = {one["step"]: one["held_out"]["reward"] for one in evaluations}
    with TrainCheckpointer(whole.run_dir / "checkpoints", keep=1) as checkpoints:
        kept = checkpoints.steps()
    best = max(found, key=lambda step: (found[step], -step))
    assert best in kept
    manifest = read_manifest(whole.run_dir / "checkpoints" / str(best))
    assert manifest.about["best_by"] == {"metric": "reward", "lower_is_better": False}
    assert all(one["kl"] > 0 for one in steps)
    lines = (whole.run_dir / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 6 // updates * 16
    if updates == 2:
        # The first of two steps still has the parameters that the answers were sampled with.
        assert [one["clipped"] for one in steps[::2]] == [0.0] * 3
        assert [one["reward"] for one in steps[::2]] == [one["reward"] for one in steps[1::2]]
    groups = np.reshape([one["advantage"] for one in samples], (-1, 4))
    np.testing.assert_allclose(groups.sum(axis=1), 0, atol=1e-5)
    config = replace(config, run_dir=str(tmp_path / "stopped"))
    assert_same_run(crash_and_resume(monkeypatch, run, config), whole)


@pytest.fixture
def unevaluated(config) -> TrainConfig:
    """Two steps, nothing held out: less to compile."""
    return replace(
        config,
        data=replace(config.data, validation_fraction=0.0),
        step=replace(config.step, max_steps=2, micro_batches=1),
    )


def test_a_model_alone_learns_from_rewards(unevaluated) -> None:
    step = replace(unevaluated.step, scan_layers=True)
    result = run(replace(unevaluated, method="sft", value=ValueConfig(), step=step))
    first, second = (one for one in records(result.run_dir) if "loss" in one)
    # Before the first update it is its own reference.
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-5


@pytest.mark.slow
def test_on_a_mesh_bases_take_turns_and_the_engine_reads_the_arrays_of_the_step(
    unevaluated, tmp_path, monkeypatch
) -> None:
    composed: dict[str, Any] = {}
    make = Sampler._beside_base

    def noted(self, params, program):
        model = composed[program.name] = make(self, params, program)
        for used, held in (
            (model.params.base, program.base_params),
            (model.params.values[0].params, params),
        ):
            # Of a tied head, decoding has a transposed copy.
            assert buffers({name: used[name] for name in held}) == buffers(held)
        return model

    monkeypatch.setattr(Sampler, "_beside_base", noted)
    bases = (unevaluated.base, BaseConfig(path=str(save_tiny_model(tmp_path / "other", seed=5))))
    config = replace(
        unevaluated,
        base=BaseConfig(),
        bases=bases,
        mesh=MeshConfig(data=1, fsdp=2, tensor=1),
    )
    result = run(config)
    steps = [one for one in records(result.run_dir) if "loss" in one]
    assert {one["base"] for one in steps} == set(composed) == {one.path for one in bases}
    assert all(np.isfinite(one["reward"]) for one in steps)


def buffers(tree: Any) -> set[int]:
    """Where the parts of a tree's arrays are, on every device."""
    return {
        part.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        for part in leaf.addressable_shards
    }


def test_a_base_that_samples_is_not_stacked(config) -> None:
    config = replace(config, step=replace(config.step, scan_layers=True))
    mesh = make_run_mesh(config)
    for objective, stacked in (("grpo", False), ("sft", True)):
        chosen = replace(config, objective=objective)
        (base,) = choose_models(chosen, mesh).bases
        assert place_base(chosen, base, mesh).scan_layers == stacked
        assert (
            static_attribute(frozen_network(chosen, base, mesh).graphdef, "scan_layers") == stacked
        )


class Interruption:
    """A reward that sends a signal, or raises, at the n-th sampled answer, over all starts."""

    def __init__(self) -> None:
        self.answers = 0
        self.signal_at = self.raise_at = -1

    def __call__(self, sample: Sample) -> float:
        if sample.answer == sample.reference:
            return 1.0  # tried before training
        self.answers += 1
        if self.answers == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.answers == self.raise_at:
            raise LookupError("the service is down")
        return ascii_share(sample)


interruption = Interruption()


def test_what_ends_a_run_while_it_samples_loses_no_step(
    unevaluated, tmp_path, monkeypatch, caplog
) -> None:
    """A signal, then a reward that raises: each time the run resumes after the last whole step."""
    caplog.set_level(logging.INFO, "ivl_jax")
    config = replace(
        unevaluated,
        grpo=replace(unevaluated.grpo, rewards=("tests.test_post_training:interruption",)),
        step=replace(unevaluated.step, max_steps=3),
        logging=replace(unevaluated.logging, checkpoint_every=3),
    )
    whole = run(config)
    config = replace(config, run_dir=str(tmp_path / "stopped"))
    fresh = Interruption()
    monkeypatch.setattr("tests.test_post_training.interruption", fresh)
    fresh.signal_at = 16 + 5  # an answer of the second step
    stopped = run(config)
    assert stopped.interrupted
    assert (stopped.steps, fresh.answers) == (1, 21)
    fresh.raise_at = 21 + 16 + 3  # the second step is sampled again, then the third
    with pytest.raises(RewardError, match="the service is down"):
        run(replace(config, resume=True))
    assert "an error ended the run after step 2/3, which is saved" in caplog.text
    resumed = run(replace(config, resume=True))
    assert_same_run(resumed, whole)
    samples = [(one.run_dir / "samples.jsonl").read_text() for one in (resumed, whole)]
    assert samples[0] == samples[1]
    assert fresh.answers == 40 + 16
    timings = (whole.run_dir / "timings.jsonl").read_text().splitlines()
    last = json.loads(timings[-1])
    assert last["sampled_tokens_per_second"] > 0
    assert 0 < last["sampling_share"] < 1
    assert re.search(r"step 3/3 .* · sampling \d+% of the time, [\d,]+ tokens/s", caplog.text)


@pytest.mark.slow
def test_a_signal_while_held_out_prompts_are_answered_leaves_that_to_the_resume(
    config, tmp_path, monkeypatch
) -> None:
    """Before the first step, and after the last."""
    config = replace(
        config,
        grpo=replace(config.grpo, rewards=("tests.test_post_training:interruption",)),
        step=replace(config.step, max_steps=2, micro_batches=1),
        logging=replace(config.logging, evaluate_every=2, checkpoint_every=2),
    )
    whole = run(config)
    config = replace(config, run_dir=str(tmp_path / "stopped"))
    fresh = Interruption()
    monkeypatch.setattr("tests.test_post_training.interruption", fresh)
    fresh.signal_at = 3
    stopped = run(config)
    assert (stopped.interrupted, stopped.steps, stopped.held_out) == (True, 0, None)
    fresh.signal_at = 3 + 8 + 2 * 16 + 5  # the eight held-out prompts, two steps, some prompts
    stopped = run(replace(config, resume=True))
    assert (stopped.interrupted, stopped.steps, stopped.output) == (True, 2, None)
    fresh.signal_at = -1
    assert_same_run(run(replace(config, resume=True)), whole)


def test_prompts_without_room_for_an_answer_are_left_out_and_named(
    unevaluated, tmp_path, caplog
) -> None:
    """They would have ended the run in whatever step drew them."""
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "1"}]}
        for text in ("1?", "how many of them are there?", "2?", "3?")
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = replace(unevaluated.data, train=(str(file),))
    result = run(replace(unevaluated, data=data))
    assert result.steps == 2
    assert "1 of 4 prompts leave no room" in caplog.text
    assert "rows.jsonl:2: its prompt has" in caplog.text
    samples = (result.run_dir / "samples.jsonl").read_text().splitlines()
    asked = {json.loads(line)["row"] for line in samples}
    assert asked == {"rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:4"}


@pytest.fixture
def on_policy(config, tmp_path) -> TrainConfig:
    """The student's own answers, of which the tuned version of its base is the teacher."""
    teacher = str(save_tiny_model(tmp_path / "tuned", seed=7))
    distil = DistilConfig(teacher, answers="sampled", max_new_tokens=6)
    return replace(config, objective="distil", distil=distil)


@pytest.mark.slow
def test_a_teacher_of_the_students_own_answers_is_learned_and_a_stopped_run_resumes(
    on_policy, tmp_path, monkeypatch
) -> None:
    whole = run(on_policy)
    steps = [one for one in records(whole.run_dir) if "loss" in one]
    assert steps[-1]["divergence"] < 0.9 * steps[0]["divergence"]
    # What is compared are the sampled answers, all of them and nothing else.
    for one in steps[:2]:
        assert one["loss_tokens"] == pytest.approx(16 * one["answer_tokens"])
    lines = (whole.run_dir / "samples.jsonl").read_text()
    assert len({json.loads(line)["answer"] for line in lines.splitlines()}) > 16
    stopped = replace(on_policy, run_dir=str(tmp_path / "stopped"))
    resumed = crash_and_resume(monkeypatch, run, stopped)
    assert_same_run(resumed, whole)
    assert (resumed.run_dir / "samples.jsonl").read_text() == lines


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rewards": ("best",)}, 'grpo.rewards = "best": expected one of'),
        ({"group_size": 5}, "step.batch_size = 16 is not a multiple of grpo.group_size = 5"),
        ({"updates": 4}, "step.max_steps = 6 is not a multiple of grpo.updates = 4"),
        ({"max_new_tokens": 48}, "leaves no room for a prompt"),
        (
            {"max_new_tokens": 40},
            r"all 32 prompts leave no room .*rows.jsonl:\d+: its prompt has \d+ tokens",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_with_the_reason(config, changes, said) -> None:
    with pytest.raises(ConfigError, match=said):
        run(replace(config, grpo=replace(config.grpo, **changes)))


def test_a_reward_that_fails_on_the_rows_own_answers_is_refused_before_weights_are_read(
    config, monkeypatch
) -> None:
    monkeypatch.setattr(loop, "prepare", None)
    grpo = replace(config.grpo, rewards=("tests.test_post_training:is_absent",))
    said = r"rows' own answers .* no such answer; the answer .* to rows.jsonl:\d+"
    with pytest.raises(ConfigError, match=said):
        run(replace(config, grpo=grpo))


def test_training_alone_does_not_sample(config) -> None:
    with pytest.raises(ConfigError, match=r"call\s+ivl_jax.post_training.run"):
        loop.run(config)


def test_options_out_of_range_are_refused() -> None:
    for options, said in (
        ({"group_size": 1}, "must be ≥ 2"),
        ({"reward_weights": (1.0, 2.0)}, r"2 numbers for 1 reward"),
        ({"rewards": ()}, "is empty"),
        ({"temperature": 0.0}, "must be > 0"),
        ({"updates": 0}, "must be ≥ 1"),
        ({"clip_low": 1.0}, "between 0 and 1"),
        ({"clip_high": 0.0}, "must be > 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            GrpoConfig(**options)
    with pytest.raises(ConfigError, match="temperature must be > 0"):
        DistilConfig(temperature=0.0)
