"""Rewards of answers, and what is said of reward functions that fail."""

import math

import pytest

from ivl_jax.rewards import RewardError, Sample, find_reward, weighted_reward

SAMPLE = Sample("It is 12.", "#### 12", "6 + 6?", "rows.jsonl:3")


def raises(sample: Sample) -> float:
    raise KeyError(sample.reference)


@pytest.mark.parametrize(
    ("name", "worth"),
    [
        ("exact_match", 0.0),
        ("word_f1", 0.0),
        ("gsm8k_number", 1.0),
        ("contains", 0.0),
        (r"regex:\d\.$", 1.0),
        ("regex:^12", 0.0),
    ],
)
def test_rewards_by_name(name, worth) -> None:
    assert find_reward(name, where="grpo.rewards")(SAMPLE) == worth


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("$18.00", 1.0),
        ("10 + 8 = 18.", 1.0),
        ("It is (18)", 1.0),
        ("28-18", 1.0),
        ("1,8", 1.0),
        ("1.8", 0.0),
        ("-18", 0.0),
        ("18 of 20", 0.0),
        ("eighteen, as in x18", 0.0),
        ("", 0.0),
    ],
)
def test_numbers_are_rewarded_by_their_value(answer, worth) -> None:
    reward = find_reward("gsm8k_number", where="grpo.rewards")
    assert reward(Sample(answer, "9 + 9 = 18 #### 18", "9 + 9?", "")) == worth


def test_a_reference_without_a_number_is_an_error() -> None:
    reward = find_reward("gsm8k_number", where="grpo.rewards")
    with pytest.raises(ValueError, match="the reference 'many' has no number"):
        reward(Sample("18", "many", "9 + 9?", ""))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("accuracy", "expected one of exact_match, word_f1, gsm8k_number, contains"),
        ("regex:(", "not a regular expression"),
        ("tests.test_rewards:absent", "absent"),
        ("tests.test_rewards:SAMPLE", "expected a Callable, found Sample"),
    ],
)
def test_rewards_that_do_not_exist_are_refused(name, said) -> None:
    with pytest.raises(ValueError, match=said):
        find_reward(name, where="grpo.rewards")


def test_several_rewards_are_added_with_their_weights() -> None:
    rewards = [("one", lambda _: 0.5, 2.0), ("two", lambda _: 1.0, -0.25)]
    assert weighted_reward(rewards, SAMPLE) == (0.75, {"one": 0.5, "two": 1.0})


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (raises, r"reward mine: KeyError: '#### 12'; .*'It is 12.' to rows.jsonl:3"),
        (lambda _: math.nan, "reward mine returned nan, .* to rows.jsonl:3"),
        (lambda _: "good", "reward mine: ValueError"),
    ],
)
def test_a_reward_function_that_fails_is_named_with_the_sample(reward, said) -> None:
    with pytest.raises(RewardError, match=said):
        weighted_reward([("mine", reward, 1.0)], SAMPLE)
