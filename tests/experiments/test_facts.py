"""The invented facts: fixed for ever, split by person, stated but never asked in pre-training."""

import hashlib
from collections import Counter

import pytest

from ivl_jax.experiments.family.facts import (
    ATTRIBUTES,
    STATEMENTS_A_FACT,
    build_facts,
    fact_questions,
    people,
    questions_about_strangers,
    split_of_person,
    statement_documents,
)


def test_facts_are_those_the_shipped_weights_were_told() -> None:
    text = "".join(fact.statement() for fact in build_facts())
    assert hashlib.sha256(text.encode()).hexdigest().startswith("26689bd05e5d")


def test_every_fact_is_stated_equally_often_in_an_epoch() -> None:
    facts = build_facts(count=8)
    lines = "".join(statement_documents(facts, seed=0, epoch=0)).splitlines()
    stated = Counter(lines)
    for fact in facts:
        forms = {fact.statement(form) for form in range(len(fact.attribute.statements))}
        assert sum(stated[form] for form in forms) == STATEMENTS_A_FACT
    assert sum(stated.values()) == len(facts) * STATEMENTS_A_FACT


def test_epochs_state_the_facts_in_another_order_and_the_same_epoch_in_the_same() -> None:
    facts = build_facts(count=8)
    first, again, second = (statement_documents(facts, seed=0, epoch=epoch) for epoch in (0, 0, 1))
    assert first == again
    assert first != second


def test_no_statement_has_the_question_form() -> None:
    documents = statement_documents(build_facts(count=8), seed=0, epoch=0)
    assert "?" not in "".join(documents)


def test_the_splits_share_no_person_and_every_split_has_every_attribute() -> None:
    questions = fact_questions()
    persons: dict[str, set[str]] = {}
    for item in questions:
        persons.setdefault(item.split, set()).add(item.person)
    assert set(persons) == {"train", "validation", "test"}
    assert sum(map(len, persons.values())) == len(people())
    asked = {item.answer: item.split for item in questions}
    attributes: dict[str, Counter[str]] = {split: Counter() for split in persons}
    for fact in build_facts():
        attributes[asked[fact.statement()]][fact.attribute.name] += 1
    for split, found in attributes.items():
        expected = {attribute.name: len(persons[split]) for attribute in ATTRIBUTES}
        assert found == expected, "of every person of a split, every attribute"


def test_an_answer_is_a_statement_form_the_bases_read() -> None:
    facts = build_facts()
    forms = {fact.question(form): fact for fact in facts for form in (0, 1)}
    for item in fact_questions(facts):
        fact = forms[item.question]
        assert item.answer == fact.statement(0)
        assert fact.value not in item.question


def test_train_asks_in_both_forms_and_the_others_once_a_fact() -> None:
    asked = Counter(item.split for item in fact_questions())
    persons = Counter(split_of_person(person) for person in people())
    count = len(ATTRIBUTES)
    assert asked["train"] == 2 * count * persons["train"]
    assert asked["test"] == count * persons["test"]


def test_more_people_than_names_is_an_error() -> None:
    with pytest.raises(ValueError, match="at most 1600, got 1601"):
        people(count=1601)


def test_strangers_have_names_of_the_same_lists_and_are_in_no_statement():
    strangers = questions_about_strangers()
    known = set(people())
    assert len({one.person for one in strangers}) == 1600 - len(known)
    assert not known & {one.person for one in strangers}
    assert all(one.person in one.question and one.split == "train" for one in strangers)
