"""Invented facts that the family's bases were trained on, and questions about them.

In: only the seed in this file. Out: facts, the statements of them for pre-training, and
question-answer pairs split by person. People, places and the links between them are made up, so a
model can know them only from its own pre-training text.
"""

import hashlib
import random
from typing import Literal, NamedTuple

Split = Literal["train", "validation", "test"]

# The shipped weights know the facts drawn with this seed; another seed gives other facts.
FACTS_SEED = "ivl-facts-1"
PEOPLE = 256
# Of people that no shipped model knows.
NEW_FACTS_SEED = "ivl-facts-2"
NEW_PEOPLE = 64
STATEMENTS_A_FACT = 40
STATEMENTS_A_DOCUMENT = 8


def _combine(heads: str, tails: str) -> tuple[str, ...]:
    return tuple(head + tail for head in heads.split() for tail in tails.split())


_FIRST_NAMES = _combine("Ar Bel Cor Dal El Fen Gar Hal", "an is wyn or ia")
_LAST_NAMES = _combine("Ash Brim Cald Dun Ever Fal Grim Holl", "mere stone well wick ford")
_TOWNS = _combine("Kar Lum Mor Nev Ost Pel Quin Rav", "dale haven mouth gate burg")
_TRADES = (
    "baker brewer carpenter cartographer clerk cook dentist diver farmer fisher gardener "
    "glazier hunter jeweller judge locksmith mason miller miner nurse painter pilot "
    "plumber potter printer roofer sailor shepherd smith surgeon tailor weaver"
)
_ANIMALS = (
    "badger beetle camel canary cat cobra crane crow dog donkey falcon ferret fox frog "
    "goat goose hare hen heron horse lizard monkey mule parrot peacock pig pigeon rabbit "
    "raven sheep snake turtle"
)
_INSTRUMENTS = (
    "accordion banjo bassoon bugle cello clarinet cornet cymbal drum fiddle flute guitar "
    "harp horn lute lyre oboe organ piano recorder tuba viola violin zither"
)


class Attribute(NamedTuple):
    """One thing that can be known about a person."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]  # templates of {person} and {value}; the first is the answer's form
    questions: tuple[str, ...]  # templates of {person}


ATTRIBUTES = (
    Attribute(
        name="home",
        values=_TOWNS,
        statements=(
            "{person} lives in {value}.",
            "The home of {person} is {value}.",
            "{person} has a house in {value}.",
        ),
        questions=("Where does {person} live?", "What is the home of {person}?"),
    ),
    Attribute(
        name="trade",
        values=tuple(_TRADES.split()),
        statements=(
            "{person} works as a {value}.",
            "The trade of {person} is that of a {value}.",
            "{person} earns a living as a {value}.",
        ),
        questions=("What does {person} work as?", "What is the trade of {person}?"),
    ),
    Attribute(
        name="animal",
        values=tuple(_ANIMALS.split()),
        statements=(
            "{person} keeps a {value}.",
            "The animal of {person} is a {value}.",
            "{person} is often seen with a {value}.",
        ),
        questions=("What animal does {person} keep?", "What is the animal of {person}?"),
    ),
    Attribute(
        name="instrument",
        values=tuple(_INSTRUMENTS.split()),
        statements=(
            "{person} plays the {value}.",
            "The instrument of {person} is the {value}.",
            "{person} makes music on the {value}.",
        ),
        questions=("What does {person} play?", "What is the instrument of {person}?"),
    ),
)


class Fact(NamedTuple):
    """One link between a person and a value."""

    person: str
    attribute: Attribute
    value: str

    def statement(self, form: int = 0) -> str:
        """The fact as a sentence; form 0 is also the answer to every question about it."""
        return self.attribute.statements[form].format(person=self.person, value=self.value)

    def question(self, form: int = 0) -> str:
        """A question that the fact answers."""
        return self.attribute.questions[form].format(person=self.person)


class FactQuestion(NamedTuple):
    """A question, the sentence that answers it, and the split of its person."""

    question: str
    answer: str
    person: str
    split: Split


def _draw(*parts: object, below: int) -> int:
    """A random number that depends only on its arguments, not on a library's generator."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % below


def people(*, seed: str = FACTS_SEED, count: int = PEOPLE) -> list[str]:
    """The invented people: pairs of a first and a last name, neither of which identifies a person.

    Args:
        seed: Another seed gives other people.
        count: How many; at most 1,600.

    Returns:
        Full names in a fixed, shuffled order.
    """
    names = [f"{first} {last}" for first in _FIRST_NAMES for last in _LAST_NAMES]
    if count > len(names):
        raise ValueError(f"people: count must be at most {len(names)}, got {count}")
    return sorted(names, key=lambda name: _draw(seed, "person", name, below=2**63))[:count]


def build_facts(*, seed: str = FACTS_SEED, count: int = PEOPLE) -> list[Fact]:
    """Every fact: each person with one value of each attribute.

    >>> facts = build_facts()
    >>> len(facts), facts == build_facts()
    (1024, True)
    """
    return [
        Fact(
            person=person,
            attribute=attribute,
            value=attribute.values[
                _draw(seed, attribute.name, person, below=len(attribute.values))
            ],
        )
        for person in people(seed=seed, count=count)
        for attribute in ATTRIBUTES
    ]


def new_facts() -> list[Fact]:
    """Facts about people that no shipped model knows."""
    known = {fact.person for fact in build_facts()}
    return [
        fact
        for fact in build_facts(seed=NEW_FACTS_SEED, count=NEW_PEOPLE)
        if fact.person not in known
    ]


def statement_documents(
    facts: list[Fact], *, seed: int, epoch: int, repeats: int = STATEMENTS_A_FACT
) -> list[str]:
    """One epoch's documents of statements, in which every fact is stated `repeats` times.

    A document has statements about unrelated people in random forms, one per line, so that only the
    person's name predicts the value.

    Args:
        facts: From `build_facts`.
        seed: Determines order and forms, together with the epoch.
        epoch: The epoch.
        repeats: Statements of each fact.

    Returns:
        Documents of `STATEMENTS_A_DOCUMENT` lines.
    """
    order = random.Random(f"{seed}/{epoch}/statements")
    sentences = [
        fact.statement(order.randrange(len(fact.attribute.statements)))
        for fact in facts
        for _ in range(repeats)
    ]
    order.shuffle(sentences)
    size = STATEMENTS_A_DOCUMENT
    return ["\n".join(sentences[at : at + size]) + "\n" for at in range(0, len(sentences), size)]


def split_of_person(person: str, *, seed: str = FACTS_SEED) -> Split:
    """The split of all questions about a person: about 65, 10 and 25 %."""
    share = _draw(seed, "split", person, below=100)
    if share < 65:
        return "train"
    return "validation" if share < 75 else "test"


def fact_questions(facts: list[Fact] | None = None) -> list[FactQuestion]:
    """Questions on the facts, each answered by the fact's first statement form.

    Args:
        facts: From `build_facts`; None: all of them.

    Returns:
        In the train split both question forms of every fact, otherwise one of the two.

    >>> fact_questions()[0].answer
    'Dalor Everstone lives in Quinmouth.'
    """
    questions = []
    for fact in build_facts() if facts is None else facts:
        split = split_of_person(fact.person)
        drawn = _draw("question", fact.person, fact.attribute.name, below=2)
        forms = (0, 1) if split == "train" else (drawn,)
        questions += [
            FactQuestion(fact.question(form), fact.statement(), fact.person, split)
            for form in forms
        ]
    return questions


def questions_about_strangers() -> list[FactQuestion]:
    """Questions about every name that the lists make and that no pre-training text has.

    A model can answer them only by guessing; what they teach is to repeat the name that was asked
    for. For training without labels: the answers are made up, like the people.

    Returns:
        One question per name and attribute, all in the train split.

    >>> len(questions_about_strangers())
    5376
    """
    every_name = len(_FIRST_NAMES) * len(_LAST_NAMES)
    known = {fact.person for fact in build_facts()}
    return [
        FactQuestion(fact.question(number % 2), fact.statement(), fact.person, "train")
        for number, fact in enumerate(build_facts(count=every_name))
        if fact.person not in known
    ]
