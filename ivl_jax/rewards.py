"""What a generated answer is worth: rewards to train on and to evaluate with.

In: an answer, the reference answer of its demonstration, the prompt. Out: a number. A reward is a
plain function of one `Sample`; the package's own are in `REWARDS`, yours is `module:function`.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import NamedTuple

from ivl_jax.extensions import load_extension

_SEPARATOR = re.compile(r"(\d),(\d)")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
# A minus may be a sign or a subtraction: "10-3" ends with 3, "= -3" with -3.
_SIGNED = re.compile(r"(?<![\w.)])[-+]?(?:\d+(?:\.\d+)?|\.\d+)")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Sample(NamedTuple):
    """One generated answer."""

    answer: str
    """Its text, without the tokens that end it."""
    reference: str
    """The demonstration's own answer."""
    prompt: str
    """The last message of the user."""
    name: str
    """File and line of the demonstration."""


Reward = Callable[[Sample], float]
WeightedReward = tuple[str, Reward, float]
"""Name, function, weight."""


class RewardError(RuntimeError):
    """A reward function that raised, or that returned anything other than a finite number."""


def exact_match(sample: Sample) -> float:
    """1 where the answer is the reference, but for white space around them.

    >>> exact_match(Sample(" Paris.", "Paris.", "Capital?", "a.jsonl:1"))
    1.0
    """
    return float(sample.answer.strip() == sample.reference.strip())


def gsm8k_number(sample: Sample) -> float:
    """1 where the answer's last number equals the reference's (GSM8K's, after `####`).

    Numbers are compared by value, so that 18.00 is 18, and 1.8 and -18 are not. Figures of
    evaluations follow the rule of the paper's authors, `is_right_number`.

    Raises:
        ValueError: the reference has no number.

    >>> gsm8k_number(Sample("so it costs $1,018.00", "10 + 1,008 #### 1,018", "How much?", ""))
    1.0
    """
    expected = _last_value(reference_number(sample.reference))
    if expected is None:
        raise ValueError(f"the reference {sample.reference!r:.200} has no number")
    return float(_last_value(sample.answer) == expected)


def reference_is_contained(sample: Sample) -> float:
    """1 where the reference occurs in the answer.

    >>> reference_is_contained(Sample("It is Paris, I think.", "Paris", "Capital?", ""))
    1.0
    """
    return float(sample.reference.strip() in sample.answer)


def word_f1(sample: Sample) -> float:
    """F1 of the answer's words and the reference's, a graded reward for short answers.

    >>> word_f1(Sample("Ann lives in Rome.", "Ann lives in Paris.", "Where?", ""))
    0.75
    """
    answer, reference = (Counter(text.split()) for text in (sample.answer, sample.reference))
    return 2 * (answer & reference).total() / max((answer + reference).total(), 1)


REWARDS: dict[str, Reward] = {
    "exact_match": exact_match,
    "word_f1": word_f1,
    "gsm8k_number": gsm8k_number,
    "contains": reference_is_contained,
}


def find_reward(name: str, *, where: str) -> Reward:
    """Give a reward.

    Args:
        name: a key of `REWARDS`; `regex:PATTERN`, 1 where the pattern is found in the answer; or
            `module:function` of your own.
        where: the config key, for messages.

    Returns:
        The reward.

    Raises:
        ValueError: there is no such reward, or the pattern is not a regular expression.

    Example:
        >>> reward = find_reward("regex:[.]$", where="rewards")
        >>> reward(Sample("It rains.", "", "", "")), reward(Sample("It rains", "", "", ""))
        (1.0, 0.0)
    """
    kind, _, rest = name.partition(":")
    if kind != "regex":
        return load_extension(name, REWARDS, Callable, where=where)  # type: ignore[type-abstract]
    try:
        pattern = re.compile(rest)
    except re.error as error:
        raise ValueError(f'{where} = "{name}": not a regular expression: {error}') from error
    return lambda sample: float(pattern.search(sample.answer) is not None)


def weighted_reward(
    rewards: Sequence[WeightedReward], sample: Sample
) -> tuple[float, dict[str, float]]:
    """Add up the rewards of a sample.

    Args:
        rewards: name, function and weight of each.
        sample: the answer.

    Returns:
        The weighted sum, and each reward by its name.

    Raises:
        RewardError: a function raised, or returned anything other than a finite number; names the
            function and the sample.
    """
    each = {}
    for name, reward, _ in rewards:
        try:
            found = float(reward(sample))
        except Exception as error:  # a user's function may raise anything
            raise RewardError(
                f"reward {name}: {type(error).__name__}: {error}; {_shown(sample)}"
            ) from error
        if not math.isfinite(found):
            raise RewardError(
                f"reward {name} returned {found}, expected a finite number; {_shown(sample)}"
            )
        each[name] = found
    return sum(weight * each[name] for name, _, weight in rewards), each


def reference_number(answer: str) -> str:
    """The number after `####` in a reference answer, without separators.

    >>> reference_number("5 * 400 = 2,000 #### 2,000")
    '2000'
    """
    return _without_separators(answer.split("####")[-1].strip())


def last_number(text: str) -> str | None:
    """The last number of a generated text, without separators; None if it has none.

    >>> last_number("She sells 16 - 7 = 9 eggs a day, for $1,018.50.")
    '1018.50'
    """
    numbers = _NUMBER.findall(_without_separators(text))
    return numbers[-1] if numbers else None


def is_right_number(text: str, answer: str) -> bool:
    """Whether a generated text has the reference's number: that of the paper's authors.

    >>> is_right_number("so it is 1,018 apples", "#### 1,018"), is_right_number("2", "#### 20")
    (True, False)
    """
    found = last_number(text)
    return found is not None and _bare(found) == _bare(reference_number(answer))


def _last_value(text: str) -> Decimal | None:
    numbers = _SIGNED.findall(_without_separators(text))
    return Decimal(numbers[-1]) if numbers else None


def _without_separators(text: str) -> str:
    return _SEPARATOR.sub(r"\1\2", text)


def _bare(text: str) -> str:
    return text.translate(_NO_PUNCTUATION)


def _shown(sample: Sample) -> str:
    return f"the answer {sample.answer!r:.200} to {sample.name} ({sample.prompt!r:.100})"
