"""Which prompts leave room for an answer."""

from typing import Any

from ivl_jax.data.chat import ChatFormat, ChatTemplateError, make_chat_format
from ivl_jax.data.demonstrations import Demonstration, Message
from ivl_jax.data.prompt_room import prompts_with_room
from ivl_jax.data.tokenized import tokenize_demonstrations


def test_only_the_prompt_counts_and_what_is_left_out_is_named(byte_tokenizer: Any) -> None:
    chat = make_chat_format(byte_tokenizer, template="plain")

    def ask(number: int, *turns: str) -> Demonstration:
        roles = ("user", "assistant") * 2
        messages = tuple(map(Message, roles, turns))
        return Demonstration(messages, f"a.jsonl:{number}")

    rows = [
        ask(1, "Why?", "So."),
        ask(2, "Why?", "B" * 200),  # a long answer, a short prompt
        ask(3, "W" * 60, "So."),
        ask(4, "Why?", "B" * 60, "Sure?", "Yes."),  # its last prompt has both turns
    ]
    tokenized = tokenize_demonstrations(rows, chat, sequence_length=120, cache_dir=None)
    lengths = [len(chat.encode_prompt(row.messages[:-1])) for row in rows]
    assert lengths[0] == lengths[1] < lengths[2] < lengths[3]
    found = prompts_with_room(tokenized, chat, longest=lengths[2])
    assert found.kept.tolist() == [0, 1, 2]
    assert found.left_out == (("a.jsonl:4", f"its prompt has {lengths[3]} tokens"),)
    found = prompts_with_room(tokenized, chat, longest=lengths[2] - 1)
    assert found.kept.tolist() == [0, 1]
    assert [row for row, _ in found.left_out] == ["a.jsonl:3", "a.jsonl:4"]


def test_a_prompt_that_the_template_refuses_is_left_out(byte_tokenizer: Any, monkeypatch) -> None:
    chat = make_chat_format(byte_tokenizer, template="plain")
    rows = [
        Demonstration((Message("user", "Why?"), Message("assistant", "So.")), f"a.jsonl:{line}")
        for line in (1, 2)
    ]
    tokenized = tokenize_demonstrations(rows, chat, sequence_length=120, cache_dir=None)

    def refuse(self: ChatFormat, messages: Any) -> None:
        raise ChatTemplateError("not asked")

    monkeypatch.setattr(ChatFormat, "encode_prompt", refuse)
    found = prompts_with_room(tokenized, chat, longest=3)
    assert found.kept.tolist() == []
    assert found.left_out == (("a.jsonl:1", "not asked"), ("a.jsonl:2", "not asked"))
