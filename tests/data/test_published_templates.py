"""What published chat templates do: marks around line breaks, tokens that strip, dates, weights."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import AddedToken

from ivl_jax.data.chat import ChatTemplateError, make_chat_format
from ivl_jax.data.formats import FORMATS, Message, parse_row
from tests.data.test_chat import TWO_TURNS, UNMARKED, _targets, _texts

# As most templates for training: the line break after the end of turn is marked too.
BREAK_INSIDE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BY_HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DATE_BY_NAME = "{% set how = '%d %b %Y' %}{{ 'Today: ' + strftime_now(how) + '\n' }}" + UNMARKED
# As DeepSeek-R1's distilled models: what an earlier turn thought is dropped.
REWRITES = UNMARKED.replace(
    "message['content'] ",
    "(message['content'] if loop.last else message['content'].split('</think>')[-1]) ",
)


def test_a_line_break_inside_the_generation_block_leaves_the_end_of_turn_a_stop_id(
    byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    chat = make_chat_format(byte_tokenizer, template=BREAK_INSIDE)
    end = byte_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_ids == (end, byte_tokenizer.eos_token_id)
    assert chat.stop_ids == make_chat_format(byte_tokenizer, template=UNMARKED).stop_ids
    assert "will not stop by itself" not in caplog.text
    assert _targets(byte_tokenizer, chat, TWO_TURNS)[0].startswith("It is 5.<|im_end|>")


@pytest.mark.parametrize("strips", [{"rstrip": True}, {"lstrip": True}, {}], ids=str)
@pytest.mark.parametrize("name", ["stories260k", "llama2"])
def test_added_tokens_that_strip_white_space_give_the_ids_of_apply_chat_template(
    shared_tokenizer: Callable[[str], Any], name: str, strips: dict[str, bool]
) -> None:
    tokenizer = copy.deepcopy(shared_tokenizer(name))
    header = AddedToken("<|assistant|>", normalized=False, **strips)
    tokenizer.add_tokens([header, AddedToken("<|user|>", normalized=False)])
    tokenizer.chat_template = BY_HEADERS
    chat = make_chat_format(tokenizer, template="tokenizer")
    dialogue = [
        Message("user", "When?"),
        Message("assistant", "In 1842"),
        Message("user", " Sure?\n"),
        Message("assistant", " Yes "),
    ]

    def of_transformers(messages: Sequence[Message], *, prompt: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            [{"role": one.role, "content": one.content} for one in messages],
            tokenize=True,
            add_generation_prompt=prompt,
            return_dict=False,
        )

    assert chat.encode_dialogue(dialogue).tokens.tolist() == of_transformers(dialogue, prompt=False)
    prompt = chat.encode_prompt(dialogue[:1]).tolist()
    assert chat.encode_dialogue(dialogue).tokens.tolist()[: len(prompt)] == prompt
    # The line break that ends a prompt is swallowed in both, or in neither.
    assert prompt == of_transformers(dialogue[:1], prompt=True)


def test_a_turn_of_weight_0_is_read_but_not_learned(byte_tokenizer: Any) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "No", "weight": 0},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "Yes"},
    ]
    row = parse_row({"messages": turns}, row_format=FORMATS["messages"], templates={})
    for template in (UNMARKED, BREAK_INSIDE):
        chat = make_chat_format(byte_tokenizer, template=template)
        (target,) = _targets(byte_tokenizer, chat, list(row.messages))
        assert target.rstrip("\n") == "Yes<|im_end|>"
        tokens = chat.encode_dialogue(row.messages).tokens.tolist()
        assert "No<|im_end|>" in _texts(byte_tokenizer, tokens)


def test_a_date_whose_format_is_a_variable_is_rendered(
    byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        chat = make_chat_format(byte_tokenizer, template=DATE_BY_NAME)
    assert "pinned to 2024-07-26" in caplog.text
    tokens = chat.encode_dialogue(TWO_TURNS).tokens.tolist()
    assert _texts(byte_tokenizer, tokens).startswith("Today: 26 Jul 2024\n<|im_start|>system")


def test_a_template_that_rewrites_earlier_turns_takes_one_and_names_the_remedy_for_more(
    byte_tokenizer: Any,
) -> None:
    chat = make_chat_format(byte_tokenizer, template=REWRITES)
    thought = Message("assistant", "<think>2, 3</think>5.")
    dialogue = [Message("user", "2+3?"), thought, Message("user", "Sure?"), thought]
    whole = "<think>2, 3</think>5.<|im_end|>"
    assert _targets(byte_tokenizer, chat, dialogue[:2]) == [whole]
    with pytest.raises(ChatTemplateError, match=r"turn 1 .*one assistant turn, or \"weight\": 0"):
        chat.encode_dialogue(dialogue)
    turns = [message._asdict() for message in dialogue]
    turns[1]["weight"] = 0
    row = parse_row({"messages": turns}, row_format=FORMATS["messages"], templates={})
    assert _targets(byte_tokenizer, chat, list(row.messages)) == [whole]
