"""Every format reads as the same dialogue; what is not a dialogue is refused with its reason."""

from typing import Any

import pytest

from ivl_jax.data.formats import (
    FORMATS,
    Message,
    RowError,
    RowFormat,
    check_templates,
    fill_template,
    find_format,
    parse_row,
)

DIALOGUE = (Message("user", "2 + 3?"), Message("assistant", "5"))
QUESTION_ANSWER = {"user": "{question}", "assistant": "{answer}"}


def _weighted(turn: int, *, weight: Any) -> list[dict[str, Any]]:
    """A question and an answer; one turn has a weight."""
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "a"},
    ]
    turns[turn]["weight"] = weight
    return turns


def _parse(row: Any, row_format: str, templates: dict[str, str] | None = None) -> Any:
    return parse_row(row, row_format=FORMATS[row_format], templates=templates or {})


@pytest.mark.parametrize(
    ("row_format", "row"),
    [
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "2 + 3?"},
                    {"from": "gpt", "value": "5"},
                ]
            },
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "user", "value": "2 + 3?"},
                    {"from": "bing", "value": "5"},
                ]
            },
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]},
                    {"role": "assistant", "content": "5"},
                ]
            },
        ),
        ("messages", {"messages": {"role": ["user", "assistant"], "content": ["2 + 3?", "5"]}}),
        ("alpaca", {"instruction": "2 + 3?", "input": "", "output": "5"}),
        ("alpaca", {"instruction": "2 + 3?", "output": "5"}),
        ("prompt_completion", {"prompt": "2 + 3?", "completion": "5"}),
        (
            "prompt_completion",
            {
                "prompt": [{"role": "user", "content": "2 + 3?"}],
                "completion": [{"role": "assistant", "content": "5"}],
            },
        ),
        ("fields", {"question": "2 + 3?", "answer": 5}),
    ],
)
def test_every_format_reads_as_the_same_dialogue(row_format: str, row: dict) -> None:
    templates = QUESTION_ANSWER if row_format == "fields" else {}
    parsed = _parse(row, row_format, templates)
    assert parsed.messages == DIALOGUE
    assert not parsed.trimmed


def test_alpaca_input_follows_the_instruction() -> None:
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    assert _parse(row, "alpaca").messages[0] == Message("user", "Add.\n\n2 and 3")


@pytest.mark.parametrize(
    ("row_format", "row"),
    [
        (
            "sharegpt",
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            },
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                ]
            },
        ),
        ("alpaca", {"system": "Be brief.", "instruction": "a", "output": "b"}),
        ("prompt_completion", {"system": "Be brief.", "prompt": "a", "completion": "b"}),
        ("fields", {"how": "brief", "question": "a", "answer": "b"}),
    ],
)
def test_a_system_text_comes_first(row_format: str, row: dict) -> None:
    templates = {**QUESTION_ANSWER, "system": "Be {how}."} if row_format == "fields" else {}
    first, *rest = _parse(row, row_format, templates).messages
    assert first == Message("system", "Be brief.")
    assert rest == [Message("user", "a"), Message("assistant", "b")]


def test_turns_that_teach_nothing_are_trimmed_and_counted() -> None:
    turns = [("gpt", "Hi!"), ("human", "2 + 3?"), ("gpt", "5"), ("human", "Thanks.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    parsed = _parse(row, "sharegpt")
    assert parsed.messages == DIALOGUE
    assert parsed.trimmed


@pytest.mark.parametrize(
    ("row_format", "row", "reason"),
    [
        ("messages", ["no", "object"], "expected an object, got a list"),
        ("messages", {"text": "a"}, "no field 'messages'; the row has 'text'"),
        ("messages", {"messages": []}, "field 'messages' is an empty list"),
        ("messages", {"messages": None}, "field 'messages' is null"),
        ("messages", {"messages": [{"role": "user"}]}, r"messages\[0\]: expected 'role'"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"messages\[0\]: the content is a list",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            r"messages\[0\]: the content is a list",
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": 3}]}, "is a number"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}, "no assistant turn"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "a"}]}, "no assistant turn"),
        (
            "sharegpt",
            {"conversations": [{"from": r, "value": "a"} for r in ("human", "human", "gpt")]},
            "two user turns in a row",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": r, "value": "a"} for r in ("human", "system", "gpt")]},
            "a system turn that is not the first",
        ),
        ("alpaca", {"instruction": "a", "output": " "}, "the assistant's turn 1 is empty"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history"),
        ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "'input' is a number"),
        ("alpaca", {"output": "b"}, "no field 'instruction'"),
        ("prompt_completion", {"prompt": "a", "completion": None}, "'completion' is null"),
        ("prompt_completion", {"prompt": "a", "completion": "\ud83e"}, "surrogate"),
        ("fields", {"question": "a"}, "no field 'answer'; the row has 'question'"),
        ("fields", {"question": "a", "answer": float("inf")}, "is inf, expected text or a finite"),
        (
            "messages",
            {"messages": {"role": ["user"], "content": ["a", "b"]}},
            "field 'messages': its lists differ in length: 1 in 'role', 2 in 'content'",
        ),
        ("messages", {"messages": {"role": "user", "content": "ab"}}, "expected a list of turns"),
        ("messages", {"messages": {}}, "expected a list of turns"),
        ("messages", {"messages": [{"role": "x" * 500, "content": ""}]}, r"'x{58}…$"),
        ("messages", {"messages": [{"role": [], "content": ""}]}, "unknown role an empty list"),
        ("alpaca", {"instruction": "a", "input": 0, "output": "b"}, "'input' is a number"),
        ("alpaca", {"instruction": "a", "output": "b", "system": []}, "'system' is an empty list"),
        (
            "messages",
            {"messages": _weighted(1, weight=0)},
            "every assistant's turn has weight 0: nothing to learn from",
        ),
        ("messages", {"messages": _weighted(1, weight=0.5)}, r"\[1\]: the weight is 0.5, expected"),
        ("messages", {"messages": _weighted(0, weight="0")}, r"\[0\]: the weight is '0', expected"),
        ("fields", {"question": "a", "answer": True}, "field 'answer' is a boolean"),
    ],
)
def test_a_malformed_row_is_refused_with_its_reason(row_format: str, row: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        _parse(row, row_format, QUESTION_ANSWER if row_format == "fields" else {})


@pytest.mark.parametrize("weight", [0, 0.0, False])
def test_a_turn_of_weight_0_is_kept_and_marked(weight: Any) -> None:
    row = {"messages": [*_weighted(1, weight=weight), *_weighted(1, weight=None)]}
    weights = [message.weight for message in _parse(row, "messages").messages]
    assert weights == [1, 0, 1, 1]
    turns = {"role": ["user", "assistant"] * 2, "content": ["a"] * 4, "weight": [1, weight, 1, 1]}
    assert _parse({"messages": turns}, "messages") == _parse(row, "messages")
    asked, answered = row["messages"][:1], row["messages"][1:]
    split = {"prompt": asked, "completion": answered}
    assert _parse(split, "prompt_completion") == _parse(row, "messages")


def test_templates_reach_into_fields() -> None:
    row = {"meta": {"title": "Sums"}, "n": 3, "text": "{not a field}"}
    assert fill_template("{meta.title} {n}: {text} {{}}", row) == "Sums 3: {not a field} {}"
    with pytest.raises(RowError, match=r"no field 'meta\.author'"):
        fill_template("{meta.author}", row)


@pytest.mark.parametrize(
    ("row_format", "templates", "message"),
    [
        ("fields", {"user": "{q}"}, "needs user_template and assistant_template"),
        (
            "fields",
            {"user": "{q}", "assistant": "{a}", "tool": "{t}"},
            "needs user_template and assistant_template",
        ),
        ("fields", {"user": "{q}", "assistant": "a"}, "names no field"),
        ("fields", {"user": "{q", "assistant": "{a}"}, "user_template: '{q'"),
        ("fields", {"user": "{q!r}", "assistant": "{a}"}, "without formats"),
        ("fields", {"user": "{q[0]}", "assistant": "{a}"}, "without formats"),
        ("fields", {}, "needs user_template and assistant_template.* got neither"),
        ("messages", {"user": "{q}"}, '"messages" reads no templates, got user_template'),
    ],
)
def test_templates_are_checked_before_any_row(
    row_format: str, templates: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_templates(FORMATS[row_format], templates)


def test_a_format_of_ones_own_may_meet_rows_it_did_not_expect() -> None:
    pairs = RowFormat("pairs", lambda row, _: [Message("user", row["q"]), *row["rest"]])
    for row, reason in (
        ({}, "format pairs: KeyError: 'q'"),
        ({"q": "a", "rest": 1}, "format pairs: TypeError"),
        ({"q": "a", "rest": []}, "no assistant turn"),
        ({"q": "a", "rest": ["b"]}, "format pairs: expected messages, got text"),
        ({"q": "a", "rest": [Message("tool", "b")]}, "format pairs: unknown role 'tool'"),
        ({"q": 1, "rest": [Message("assistant", "b")]}, "format pairs: the content is a number"),
    ):
        with pytest.raises(RowError, match=reason):
            parse_row(row, row_format=pairs, templates={})


def test_an_unknown_format_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r'format = "share_gpt": expected one of sharegpt, mess'):
        find_format("share_gpt")
