"""Which chat template a tokenizer gets, and what is reported of it."""

import logging
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ivl_jax.data.chat import make_chat_format
from tests.data.test_chat import TWO_TURNS, UNMARKED, _targets


def test_the_template_that_auto_takes_is_said_once(
    byte_tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_tokenizer, "name_or_path", "said once")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            make_chat_format(byte_tokenizer)
    assert caplog.messages == ["chat template: plain (said once)"]


def test_auto_takes_the_tokenizers_own_template_else_plain(byte_tokenizer: Any) -> None:
    assert make_chat_format(byte_tokenizer).template == "plain"
    with pytest.raises(ValueError, match="has no template of its own"):
        make_chat_format(byte_tokenizer, template="tokenizer")
    byte_tokenizer.chat_template = UNMARKED
    try:
        chat = make_chat_format(byte_tokenizer)
        assert chat.template == UNMARKED
        assert make_chat_format(byte_tokenizer, template="plain").template == "plain"
    finally:
        byte_tokenizer.chat_template = None
    assert _targets(byte_tokenizer, chat, TWO_TURNS)[1] == "Yes.<|im_end|>"


def test_markers_that_the_tokenizer_lacks_are_reported(
    byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make_chat_format(byte_tokenizer, template="chatml")
    assert "has no token" not in caplog.text
    chat = make_chat_format(byte_tokenizer, template="llama-3")
    assert "has no token <|start_header_id|>, <|end_header_id|>, <|eot_id|>" in caplog.text
    assert chat.stop_ids == (byte_tokenizer.eos_token_id,)
    assert _targets(byte_tokenizer, chat, TWO_TURNS) == ["It is 5.<eos>", "Yes.<eos>"]


def test_a_template_that_never_ends_a_turn_is_reported(
    byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    endless += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    chat = make_chat_format(byte_tokenizer, template=endless)
    assert "will not stop by itself" in caplog.text
    assert chat.stop_ids == (byte_tokenizer.eos_token_id,)
    assert _targets(byte_tokenizer, chat, TWO_TURNS) == ["It is 5.\n", "Yes.\n"]


def test_unknown_template_names_are_refused(byte_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="expected auto, tokenizer, plain, llama-2"):
        make_chat_format(byte_tokenizer, template="llama2")
    backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    endless = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        make_chat_format(endless, template="plain")
