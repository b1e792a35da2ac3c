"""What is made of sampled answers: batches, rewards compared within a group, failures named."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from ivl_jax.config import ConfigError
from ivl_jax.data.batching import TrainIterator
from ivl_jax.data.formats import Demonstration, Message
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.generation import Generation
from ivl_jax.post_training.answers import Answers, lay_out_answers
from ivl_jax.post_training.reward_trial import first_demonstrations, try_rewards
from ivl_jax.post_training.rollouts import PlainRollouts, RewardedRollouts
from ivl_jax.post_training.sampler import Sampler, _without_trained
from ivl_jax.rewards import RewardError, Sample, find_reward
from ivl_jax.training.objectives.objective import Sampling
from ivl_jax.training.programs import BaseProgram
from ivl_jax.training.rollouts import SamplingProgress, SamplingStoppedError, Watch


def answers() -> Answers:
    """Two prompts with two answers each; the last answer was cut off."""
    texts = ("yes", "no", "same", "same")
    ids = [(5, 6, 2), (7, 2), (8, 2), (8, 9, 9, 9)]
    ends = ("eos", "eos", "eos", "length")
    generations = [
        Generation(text, token_ids, finish_reason=end, prompt_tokens=2)
        for text, token_ids, end in zip(texts, ids, ends, strict=True)
    ]
    samples = [
        Sample(text, "yes", f"Q{i // 2}", f"a.jsonl:{i // 2}") for i, text in enumerate(texts)
    ]
    return Answers([(3, 4), (3, 4), (3,), (3,)], generations, samples)


class FakeSampler(Sampler):
    """Gives the same answers at every step, and notes what is written."""

    sampling = Sampling("grpo", max_new_tokens=4, temperature=1.0, group_size=2, rewarded=True)

    def __init__(self) -> None:
        self.written: dict[str, Any] = {}

    def sample(self, *_: Any, watch: Watch) -> Answers:
        return answers()

    def answer(self, *_: Any, watch: Watch, **options: Any) -> Answers:
        return answers()

    def batch(self, found: Answers) -> Any:
        return lay_out_answers(found, rows=5, length=6, pad_id=0, mask_truncated=True)

    def write(self, step: int, found: Answers, columns: Any) -> None:
        self.written = {"step": step, "answers": len(found.samples), **columns}


PROGRAM = BaseProgram("S", None, None, step=max, held_out=None, first_pass=max)


def unwatched(progress: SamplingProgress) -> None:
    del progress


def exact(sample: Sample) -> float:
    return float(sample.answer == sample.reference)


def test_the_model_kept_between_steps_holds_no_trained_array(stories260k_dir) -> None:
    beside = compose(stories260k_dir, stories260k_dir)
    kept = _without_trained(beside)
    assert kept.params.base is beside.params.base
    assert [each.params for each in (*kept.params.values, *kept.values)] == [{}, {}]
    alone = _without_trained(compose(stories260k_dir))
    assert jax.tree.leaves((alone.params, alone.base.params)) == []


def test_answers_follow_their_prompts_and_truncated_ones_do_not_count() -> None:
    batch = FakeSampler().batch(answers())
    np.testing.assert_array_equal(batch.tokens[0], [3, 4, 5, 6, 0, 0])
    np.testing.assert_array_equal(batch.targets[0], [4, 5, 6, 2, 0, 0])
    np.testing.assert_array_equal(batch.loss_mask[0], [False, True, True, True, False, False])
    # The fourth reached the most tokens; the fifth row is empty.
    assert batch.loss_mask.sum(axis=1).tolist() == [3, 2, 2, 0, 0]
    kept = lay_out_answers(answers(), rows=4, length=6, pad_id=0, mask_truncated=False)
    assert kept.loss_mask.sum(axis=1).tolist() == [3, 2, 2, 4]


def test_groups_of_equal_rewards_are_counted_and_teach_nothing() -> None:
    sampler = FakeSampler()
    rollouts = RewardedRollouts(sampler, [("exact", exact, 2.0)], standardised=False)
    batch, figures = rollouts.batch({}, 7, [], PROGRAM, watch=unwatched)
    assert figures == {
        "reward": 0.5,
        "answer_tokens": 11 / 4,
        "truncated": 0.25,
        "equal_groups": 0.5,
    }
    assert batch.advantages is not None
    assert batch.advantages[:, 0].tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]
    assert (batch.advantages == batch.advantages[:, :1]).all()
    assert sampler.written["step"] == 7
    assert list(sampler.written["reward"]) == [2.0, 0.0, 0.0, 0.0]


def test_a_reward_that_is_not_a_number_is_named_with_its_sample() -> None:
    broken = [("mine", lambda sample: math.nan if sample.answer == "same" else 0.0, 1.0)]
    rollouts = RewardedRollouts(FakeSampler(), broken, standardised=True)
    said = r"reward mine returned nan.*'same' to a\.jsonl:1 \('Q1'\)"
    with pytest.raises(RewardError, match=said):
        rollouts.batch({}, 0, [], PROGRAM, watch=unwatched)


def test_plain_answers_have_no_rewards() -> None:
    sampler = FakeSampler()
    batch, figures = PlainRollouts(sampler).batch({}, 3, [], PROGRAM, watch=unwatched)
    assert batch.advantages is None
    assert set(figures) == {"answer_tokens", "truncated"}
    assert sampler.written == {"step": 3, "answers": 4}


def test_a_signal_between_two_rewards_ends_the_sampling() -> None:
    """Nothing of such answers is written."""
    seen: list[SamplingProgress] = []

    def watch(progress: SamplingProgress) -> None:
        seen.append(progress)
        if len(seen) == 3:
            raise SamplingStoppedError

    sampler = FakeSampler()
    rollouts = RewardedRollouts(sampler, [("exact", exact, 1.0)], standardised=True)
    with pytest.raises(SamplingStoppedError):
        rollouts.batch({}, 0, [], PROGRAM, watch=watch)
    assert seen == [SamplingProgress(4, 4, 11)] * 3
    assert sampler.written == {}


def test_held_out_prompts_are_answered_a_bounded_number_at_a_time(monkeypatch) -> None:
    """Their figures are means over all of them, the last few included."""
    monkeypatch.setattr("ivl_jax.post_training.rollouts._ANSWERED_TOGETHER", 4)
    sizes: list[int] = []

    class Counting(FakeSampler):
        def answer(self, params: Any, demonstrations: Any, *_: Any, **options: Any) -> Answers:
            sizes.append(len(demonstrations))
            found = answers()
            return Answers(*(part[: len(demonstrations)] for part in found))

    asked = [Demonstration((), f"a.jsonl:{line}") for line in range(5)]
    rollouts = RewardedRollouts(Counting(), [("exact", exact, 1.0)], standardised=True)
    figures = rollouts.evaluate({}, asked, PROGRAM, watch=unwatched)
    assert sizes == [4, 1]
    assert figures["reward"] == pytest.approx(2 / 5)
    assert figures["answer_tokens"] == pytest.approx((11 + 3) / 5)
    assert set(figures) == {"reward", "answer_tokens", "truncated"}


REFERENCES = [
    Demonstration((Message("user", f"Q{line}"), Message("assistant", text)), f"a.jsonl:{line}")
    for line, text in enumerate(("#### 12", "twelve"), 1)
]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gsm8k_number", "'twelve' has no number; .* to a.jsonl:2"),
        ("tests.test_rollouts:not_a_number", "returned nan, .* to a.jsonl:1"),
    ],
)
def test_a_reward_that_fails_on_a_reference_is_refused_with_the_row(name, said) -> None:
    rewards = [("exact", exact, 1.0), (name, find_reward(name, where="grpo.rewards"), 1.0)]
    with pytest.raises(ConfigError, match=f"grpo.rewards, tried on .*{said}"):
        try_rewards(rewards, REFERENCES)


def not_a_number(sample: Sample) -> float:
    return math.nan


def test_a_reward_that_no_reference_earns_is_warned_of(caplog) -> None:
    def of(*names: str) -> str:
        caplog.clear()
        each = [(name, find_reward(name, where="grpo.rewards"), 1.0) for name in names]
        try_rewards(each, REFERENCES)
        return caplog.text

    assert of("exact_match", "contains", r"regex:^twelve$") == ""
    text = of("exact_match", r"regex:<answer>")
    assert "regex:<answer> is 0 for the rows' own answers, all 2 tried, such as a.jsonl:1" in text
    assert "exact_match is" not in text


def test_at_most_eight_references_are_tried() -> None:
    class Batches(TrainIterator):
        def __init__(self, steps: int) -> None:
            self.steps_per_epoch = steps

        def demonstrations(self, step: int) -> list[Demonstration]:
            assert step < self.steps_per_epoch
            return REFERENCES * 2

    assert first_demonstrations(Batches(3)) == REFERENCES * 4
    assert first_demonstrations(Batches(1)) == REFERENCES * 2
