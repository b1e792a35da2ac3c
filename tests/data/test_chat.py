"""Loss masks are exact, and a prompt's tokens are a prefix of what was learned from."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_jax.data.chat import ChatFormat, ChatTemplateError, make_chat_format
from ivl_jax.data.formats import Message
from ivl_jax.data.templates import NAMED_TEMPLATES
from ivl_jax.token_bytes import split_vocabulary

NAMES = ["stories260k", "llama2", "gpt2"]


# ChatML as Qwen 2.5 writes it: nothing says which part is the assistant's.
UNMARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}EOT"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


MARKED_WITH_END = MARKED.replace("EOT", "{{ '<|im_end|>' }}{% endgeneration %}")


MARKED_WITHOUT_END = MARKED.replace("EOT", "{% endgeneration %}{{ '<|im_end|>' }}")


# As Qwen 3: thinking stays in the last turn only.
DROPS_THINKING = UNMARKED.replace(
    "message['content'] ",
    "(message['content'] if loop.last else message['content'].split('</think>')[-1]) ",
)


THINKS = UNMARKED.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")


COUNTS = "{{ messages | length }} turns\n" + UNMARKED


# As Phi 3.5: a whole dialogue is closed by a token that no turn ends with.
CLOSED = UNMARKED.replace("{% endif %}", "{% else %}{{ '<eos>' }}{% endif %}")


# As Mistral Nemo: the system's text goes to the last turn if that is the user's.
MOVES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' }}"
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
    "{{ m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<eos>' }}{% endif %}{% endfor %}"
)


DATED = "{{ '<|im_start|>Today: ' + strftime_now('%d %b %Y') + '\n' }}" + UNMARKED


ALTERNATES = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    + UNMARKED
)


TWO_TURNS = [
    Message("system", "Be brief."),
    Message("user", "2+3?"),
    Message("assistant", "It is 5."),
    Message("user", "Sure?"),
    Message("assistant", "Yes."),
]


CONTENT = st.text(
    st.sampled_from("abZ 019.,:\n\t<|é日🤗") | st.characters(codec="utf-8"), min_size=1, max_size=12
)


TURNS = st.tuples(CONTENT, CONTENT.filter(lambda text: text.strip()))


@st.composite
def dialogues(draw: Any, content: Any = CONTENT) -> list[Message]:
    """Dialogues of one to three rounds, with or without a system turn."""
    messages = [Message("system", draw(content))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(content)))
        messages.append(Message("assistant", draw(content.filter(lambda text: text.strip()))))
    return messages


_vocabulary = functools.lru_cache(split_vocabulary)


def _texts(tokenizer: Any, tokens: Any) -> str:
    """What tokens spell, special ones as their text."""
    ordinary, special = _vocabulary(tokenizer)
    return b"".join(
        special[token].encode() if token in special else ordinary[token] or b"" for token in tokens
    ).decode(errors="replace")


def _targets(tokenizer: Any, chat: ChatFormat, messages: list[Message]) -> list[str]:
    """What each run of targets spells."""
    tokens, loss_mask = chat.encode_dialogue(messages)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loss_mask, [False]]).astype(int)))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [_texts(tokenizer, tokens[low:high].tolist()) for low, high in runs]


@pytest.fixture(scope="module")
def named_format(shared_tokenizer: Callable[[str], Any]) -> Callable[[str, str], Any]:
    """Tokenizer and chat format, by their names, made once."""
    made: dict[tuple[str, str], Any] = {}

    def make(name: str, template: str) -> Any:
        tokenizer = shared_tokenizer(name)
        if (name, template) not in made:
            made[name, template] = make_chat_format(tokenizer, template=template)
        return tokenizer, made[name, template]

    return make


def _answer(template: str, content: str, end: str) -> str:
    """What the assistant writes for a content in a named template."""
    return {
        "plain": f" {content.strip()}{end}",
        "llama-2": f" {content.strip()} {end}",
        "llama-3": f"{content.strip()}{end}",
        "chatml": f"{content}{end}",
        "vicuna": f" {content.strip()}{end}",
    }[template]


@settings(derandomize=True, deadline=None, max_examples=15)
@given(messages=dialogues())
@pytest.mark.parametrize("template", list(NAMED_TEMPLATES))
@pytest.mark.parametrize("name", NAMES)
def test_targets_spell_the_answers_and_prompts_are_exact_prefixes(
    named_format: Callable, name: str, template: str, messages: list[Message]
) -> None:
    tokenizer, chat = named_format(name, template)
    tokens, loss_mask = chat.encode_dialogue(messages)
    answers = [message.content for message in messages if message.role == "assistant"]
    # SentencePiece normalises nothing but spaces, its word mark among them; a template that trims
    # an answer trims it before.
    expected = [
        _answer(template, answer, tokenizer.eos_token).replace("▁", " ") for answer in answers
    ]
    assert _targets(tokenizer, chat, messages) == expected

    before = 0
    for turn, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = chat.encode_prompt(messages[:turn])
        assert tokens[: len(prompt)].tolist() == prompt.tolist()
        assert loss_mask[len(prompt)]
        assert not loss_mask[len(prompt) - 1]
        assert int(loss_mask[before : len(prompt)].sum()) == 0
        through = chat.encode_dialogue(messages[: turn + 1])
        before = int(np.flatnonzero(through.loss_mask)[-1]) + 1
        assert tokens[:before].tolist() == through.tokens[:before].tolist()
        assert tokens[before - 1] in chat.stop_ids
    assert int(loss_mask[before:].sum()) == 0


@settings(derandomize=True, deadline=None, max_examples=15)
@given(messages=dialogues(st.sampled_from(["</s>", "a<s>", "<|endoftext|> b", "\n", "<unk>c"])))
@pytest.mark.parametrize("template", ["plain", "chatml"])
@pytest.mark.parametrize("name", NAMES)
def test_special_texts_in_messages_move_no_boundary(
    named_format: Callable, name: str, template: str, messages: list[Message]
) -> None:
    messages = [
        Message(role, content if content.strip() or role != "assistant" else "x")
        for role, content in messages
    ]
    _, chat = named_format(name, template)
    tokens, loss_mask = chat.encode_dialogue(messages)
    turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
    prompts = [chat.encode_prompt(messages[:turn]) for turn in turns]
    for prompt in prompts:
        assert tokens[: len(prompt)].tolist() == prompt.tolist()
        assert loss_mask[len(prompt)]
        assert not loss_mask[len(prompt) - 1]


@pytest.mark.parametrize("template", list(NAMED_TEMPLATES))
@pytest.mark.parametrize("name", NAMES)
def test_the_bos_token_stands_exactly_once(
    named_format: Callable, name: str, template: str
) -> None:
    tokenizer, chat = named_format(name, template)
    tokens = chat.encode_dialogue(TWO_TURNS).tokens.tolist()
    if name == "gpt2":  # begins texts with no token; its bos is its eos
        assert tokens[0] != tokenizer.bos_token_id
        return
    assert tokens[0] == tokenizer.bos_token_id
    # Llama 2 begins every pair of turns anew.
    assert tokens.count(tokenizer.bos_token_id) == (2 if template == "llama-2" else 1)


def test_plain_is_ordinary_text(named_format: Callable) -> None:
    tokenizer, chat = named_format("llama2", "plain")
    text = _texts(tokenizer, chat.encode_dialogue(TWO_TURNS).tokens.tolist())
    assert text == (
        "<s> Be brief.\n\nQuestion: 2+3?\nAnswer: It is 5.</s> \nQuestion: Sure?\nAnswer: Yes.</s>"
    )


def test_joint_tokenisation_would_break_the_prefix(named_format: Callable) -> None:
    # GPT-2 reads "\n\n" as one token at the end of a prompt, and as two before an answer.
    tokenizer, chat = named_format("gpt2", "llama-3")
    messages = TWO_TURNS[1:3]
    ours = chat.encode_dialogue(messages).tokens.tolist()
    joint = tokenizer(_texts(tokenizer, ours)).input_ids
    prompt = chat.encode_prompt(messages[:1]).tolist()
    assert joint[: len(prompt)] != prompt
    assert ours[: len(prompt)] == prompt


@pytest.mark.parametrize("template", [UNMARKED, MARKED_WITH_END, MARKED_WITHOUT_END])
def test_targets_are_the_same_with_marks_and_without(byte_tokenizer: Any, template: str) -> None:
    chat = make_chat_format(byte_tokenizer, template=template)
    expected = ["It is 5.<|im_end|>", "Yes.<|im_end|>"]
    assert _targets(byte_tokenizer, chat, TWO_TURNS) == expected
    end = byte_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_ids == (end, byte_tokenizer.eos_token_id)


@pytest.mark.parametrize("template", [UNMARKED, MARKED_WITH_END])
def test_tokens_and_mask_equal_those_of_transformers(byte_tokenizer: Any, template: str) -> None:
    chat = make_chat_format(byte_tokenizer, template=template)
    encoded = chat.encode_dialogue(TWO_TURNS)
    theirs = byte_tokenizer.apply_chat_template(
        [message._asdict() for message in TWO_TURNS],
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=template == MARKED_WITH_END,
    )
    assert encoded.tokens.tolist() == theirs["input_ids"]
    if template == MARKED_WITH_END:
        assert encoded.loss_mask.astype(int).tolist() == theirs["assistant_masks"]


def test_the_end_of_turn_counts_though_padding_is_the_same_token(byte_tokenizer: Any) -> None:
    assert byte_tokenizer.pad_token_id == byte_tokenizer.eos_token_id
    chat = make_chat_format(byte_tokenizer, template="plain")
    dialogue = [Message("user", "Is <eos> a token?"), Message("assistant", "Yes.")]
    tokens, loss_mask = chat.encode_dialogue(dialogue)
    is_eos = tokens == byte_tokenizer.eos_token_id
    assert is_eos.sum() == 2
    assert loss_mask[is_eos].tolist() == [False, True]
    assert chat.has_special_text(dialogue)
    assert not chat.has_special_text(TWO_TURNS)


def test_a_template_that_drops_earlier_thinking_is_named_with_the_turn(byte_tokenizer: Any) -> None:
    chat = make_chat_format(byte_tokenizer, template=DROPS_THINKING)
    messages = list(TWO_TURNS)
    assert len(chat.encode_dialogue(messages).tokens)  # nothing to drop
    messages[2] = Message("assistant", "<think>2, 3</think>5.")
    assert _targets(byte_tokenizer, chat, messages[:3]) == ["<think>2, 3</think>5.<|im_end|>"]
    with pytest.raises(ChatTemplateError, match="turn 2 is rendered differently") as caught:
        chat.encode_dialogue(messages)
    assert "<think>2, 3" in str(caught.value)
    prompt = chat.encode_prompt(messages[:4])  # decoding may go on from it
    assert "assistant\n5.<|im_end|>" in _texts(byte_tokenizer, prompt.tolist())


def test_a_header_that_changes_with_later_turns_is_named(byte_tokenizer: Any) -> None:
    chat = make_chat_format(byte_tokenizer, template=COUNTS)
    with pytest.raises(ChatTemplateError, match="turn 0 is rendered differently"):
        chat.encode_dialogue(TWO_TURNS)


def test_a_prompt_that_no_turn_begins_with_is_named(byte_tokenizer: Any) -> None:
    chat = make_chat_format(byte_tokenizer, template=THINKS)
    with pytest.raises(
        ChatTemplateError, match=r"turn 2 \(assistant\) does not begin as the prompt"
    ):
        chat.encode_dialogue(TWO_TURNS)


def test_a_system_text_that_moves_to_the_last_turn_is_named(byte_tokenizer: Any) -> None:
    chat = make_chat_format(byte_tokenizer, template=MOVES_SYSTEM)
    with pytest.raises(ChatTemplateError, match="turn 1 is rendered differently"):
        chat.encode_dialogue(TWO_TURNS[:3])
    assert _targets(byte_tokenizer, chat, TWO_TURNS[1:]) == ["It is 5.<eos>", "Yes.<eos>"]


def test_what_closes_a_whole_dialogue_is_not_an_end_of_turn(byte_tokenizer: Any) -> None:
    chat = make_chat_format(byte_tokenizer, template=CLOSED)
    assert _targets(byte_tokenizer, chat, TWO_TURNS) == ["It is 5.<|im_end|>", "Yes.<|im_end|>"]
    text = _texts(byte_tokenizer, chat.encode_dialogue(TWO_TURNS).tokens.tolist())
    assert text.endswith("Yes.<|im_end|>\n<eos>")
    assert chat.stop_ids[0] == byte_tokenizer.convert_tokens_to_ids("<|im_end|>")
    once = make_chat_format(byte_tokenizer, template=UNMARKED)
    assert chat.encode_prompt(TWO_TURNS[:4]).tolist() == once.encode_prompt(TWO_TURNS[:4]).tolist()


def test_todays_date_is_pinned_and_named_with_the_turn(
    byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        chat = make_chat_format(byte_tokenizer, template=DATED)
    assert "renders today's date in turn 0: pinned to 2024-07-26" in caplog.text
    text = _texts(byte_tokenizer, chat.encode_dialogue(TWO_TURNS).tokens.tolist())
    assert text.startswith("<|im_start|>Today: 26 Jul 2024\n<|im_start|>system")
    assert _targets(byte_tokenizer, chat, TWO_TURNS) == ["It is 5.<|im_end|>", "Yes.<|im_end|>"]


def test_a_refused_dialogue_leaves_the_others_alone(byte_tokenizer: Any) -> None:
    chat = make_chat_format(byte_tokenizer, template=ALTERNATES)
    good = TWO_TURNS[1:]
    first, refused, last = chat.encode_dialogues([good, TWO_TURNS, good[:2]])
    assert isinstance(refused, ChatTemplateError)
    assert "begin with the user" in str(refused)
    for encoded, messages in ((first, good), (last, good[:2])):
        alone = chat.encode_dialogue(messages)
        assert encoded.tokens.tolist() == alone.tokens.tolist()
        assert encoded.loss_mask.tolist() == alone.loss_mask.tolist()
    with pytest.raises(ChatTemplateError, match="begin with the user"):
        chat.encode_dialogue(TWO_TURNS)


def test_a_prompt_ends_where_the_assistant_begins(byte_tokenizer: Any) -> None:
    chat = make_chat_format(byte_tokenizer, template="chatml")
    with pytest.raises(ChatTemplateError, match="must not end with an assistant's turn"):
        chat.encode_prompt(TWO_TURNS)
    text = _texts(byte_tokenizer, chat.encode_prompt(TWO_TURNS[:2]).tolist())
    assert text.endswith("2+3?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("template", ["plain", "vicuna", UNMARKED])
def test_a_format_is_rebuilt_from_its_template(byte_tokenizer: Any, template: str) -> None:
    chat = make_chat_format(byte_tokenizer, template=template)
    again = make_chat_format(byte_tokenizer, template=chat.template)
    assert again.fingerprint == chat.fingerprint
    other = make_chat_format(byte_tokenizer, template="llama-2")
    assert other.fingerprint != chat.fingerprint


@pytest.mark.parametrize("template", ["plain", "llama-2", "chatml"])
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_whose_answer_has_begun_is_a_prefix_of_such_dialogues(
    named_format: Callable, name: str, template: str
) -> None:
    _, chat = named_format(name, template)
    begun = chat.encode_prompt(TWO_TURNS[:2], begins="It is").tolist()
    whole = chat.encode_dialogue(TWO_TURNS[:3]).tokens.tolist()  # it answers "It is 5."
    assert whole[: len(begun)] == begun
    assert len(begun) > len(chat.encode_prompt(TWO_TURNS[:2]))
    text = chat.prompt_text(TWO_TURNS[:2], begins="It is")
    assert text.endswith("\nIt is" if template == "chatml" else " It is")
    assert text.startswith(chat.prompt_text(TWO_TURNS[:2]))
