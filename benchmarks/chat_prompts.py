"""What users ask a chat model, for benchmarks in which the text matters.

Out: word problems (GSM8K's where it is at hand), edits of code whose answers repeat most of the
question, and questions with answers of several paragraphs.
"""

import json
from typing import NamedTuple

from benchmarks.shapes import SHARED

_GSM8K = SHARED / "data/gsm8k/test.jsonl"
_GSM8K_EVERY = 97  # questions lie this far apart, so that they are not of one kind

WORD_PROBLEMS = (
    "A bakery sells 24 rolls in the morning and three times as many in the afternoon. Each roll "
    "costs $2. How much money does the bakery take in one day?",
    "Nora reads 18 pages on every weekday and 30 pages on each day of the weekend. How many weeks "
    "does she need for a book of 600 pages?",
    "A farmer has 96 eggs. He keeps a quarter of them, gives 12 to his neighbour and packs the "
    "rest into boxes of 10. How many boxes does he fill?",
    "Ben earns $14 an hour and works 6 hours a day, 5 days a week. He saves a third of what he "
    "earns. How much does he save in four weeks?",
    "A tank holds 240 litres. One pipe fills it at 12 litres a minute while a leak loses 2 litres "
    "a minute. How many minutes does it take to fill the empty tank?",
    "Three friends share a taxi that costs $4 plus $1.50 for each of 12 miles. How many dollars "
    "does each of them pay if they pay the same?",
    "A school orders 15 boxes of pencils with 40 pencils each. There are 8 classes with 25 "
    "children each. How many pencils does every child get?",
    "Lena is twice as old as her brother. In 6 years their ages will add up to 42. How old is "
    "Lena now?",
)
"""In the manner of GSM8K."""

# An instruction, then the code; a line of dashes between two of them.
_EDITS = """\
Rename the variable `t` to `total`.
def mean(values):
    t = 0.0
    for value in values:
        t += value
    return t / len(values)
---
Add a docstring that says what the function does.
def count_words(text):
    counts = {}
    for word in text.lower().split():
        counts[word] = counts.get(word, 0) + 1
    return counts
---
Change the default of `retries` to 5.
def fetch(session, url, retries=3, delay=0.5):
    for attempt in range(retries):
        response = session.get(url)
        if response.status == 200:
            return response.body
        time.sleep(delay * 2 ** attempt)
    raise ConnectionError(f"no answer from {url}")
---
Rename the function to `is_leap_year`.
def leap(year):
    if year % 400 == 0:
        return True
    if year % 100 == 0:
        return False
    return year % 4 == 0
---
Sort in descending order instead.
def top_scores(players, count):
    scored = [(p.score, p.name) for p in players]
    scored.sort()
    return [name for score, name in scored[:count]]
---
Add type annotations to the parameters and to the result.
def clamp(value, low, high):
    if value < low:
        return low
    if value > high:
        return high
    return value
---
Return an empty list instead of None when there are no lines.
def read_lines(path):
    with open(path) as file:
        lines = file.readlines()
    if not lines:
        return None
    return [line.strip() for line in lines]
---
Rename the class to `Counter` and keep the rest.
class Tally:
    def __init__(self):
        self.counts = {}

    def add(self, key):
        self.counts[key] = self.counts.get(key, 0) + 1

    def most_common(self):
        return max(self.counts, key=self.counts.get)
---
Use `enumerate` instead of `range(len(...))`.
def find_all(items, wanted):
    places = []
    for i in range(len(items)):
        if items[i] == wanted:
            places.append(i)
    return places
---
Raise a ValueError when `width` is not positive.
def wrap(text, width):
    lines, line = [], ''
    for word in text.split():
        if len(line) + len(word) + 1 > width:
            lines.append(line)
            line = word
        else:
            line = f'{line} {word}'.strip()
    return lines + [line]
"""
CODE_EDITS = tuple(
    f"{instruction} Answer with the whole code and nothing else.\n\n```python\n{code}```"
    for instruction, code in (edit.split("\n", 1) for edit in _EDITS.split("---\n"))
)
"""A short piece of Python and one change to make."""

EXPLANATIONS = tuple(
    f"Explain in several paragraphs {what}."
    for what in (
        "how a bicycle stays upright",
        "why the sky is blue",
        "how bread rises",
        "what causes the tides",
        "how vaccines work",
        "why leaves change colour in autumn",
        "how a refrigerator cools",
        "what a black hole is",
        "how birds find their way",
        "why metals conduct electricity",
        "how a camera focuses",
        "what makes a volcano erupt",
        "how the heart pumps blood",
        "why ice floats on water",
        "how an aeroplane flies",
        "what inflation is",
    )
)
"""Questions whose answers are longer than any limit a benchmark sets."""


class Questions(NamedTuple):
    """Questions, and where they come from."""

    source: str
    texts: tuple[str, ...]


def find_word_problems(count: int) -> Questions:
    """Word problems: of GSM8K's test questions, or of our own where GSM8K is not at hand.

    Args:
        count: how many, at most `len(WORD_PROBLEMS)`.
    """
    if not _GSM8K.exists():
        return Questions("problems in the manner of GSM8K", WORD_PROBLEMS[:count])
    with _GSM8K.open(encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file]
    return Questions("GSM8K", tuple(questions[::_GSM8K_EVERY][:count]))
