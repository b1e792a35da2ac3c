"""The family's tokenizers lose nothing, and chat in tokens that plain text shows."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ivl_jax.experiments.family.tokenizers import (
    save_wrapped_tokenizer,
    train_byte_tokenizer,
    train_word_tokenizer,
    wrap_tokenizer,
)

_TEXT = "def snakeCase_name(self):\n        return 'Ωmega → 🙂', 12345  # two  spaces\n\n\n"
_DIALOGUE = [
    {"role": "user", "content": "Where does Ada live?"},
    {"role": "assistant", "content": "Ada lives in Kardale."},
]


def _tokenizer(kind: str, folder: Path):
    train, bos, eos = {
        "byte": (train_byte_tokenizer, "<|endoftext|>", "<|endoftext|>"),
        "word": (train_word_tokenizer, "<s>", "</s>"),
    }[kind]
    trained = train([_TEXT.replace("🙂", ""), "Question: Answer:"], entries=400)
    save_wrapped_tokenizer(wrap_tokenizer(trained, bos=bos, eos=eos), folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["byte", "word"])
def test_text_survives_encoding_whatever_its_characters(kind: str, tmp_path: Path) -> None:
    tokenizer = _tokenizer(kind, tmp_path)
    text = _TEXT + "\tunseen ☃\r\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("kind", ["byte", "word"])
def test_only_the_ends_of_a_dialogue_are_special_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = _tokenizer(kind, tmp_path)
    ids = tokenizer.apply_chat_template(_DIALOGUE, return_dict=False)
    specials = [index for index, one in enumerate(ids) if one in tokenizer.all_special_ids]
    assert specials == [0, len(ids) - 1]
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["byte", "word"])
def test_a_prompt_is_a_prefix_of_the_dialogue(kind: str, tmp_path: Path) -> None:
    tokenizer = _tokenizer(kind, tmp_path)
    whole = tokenizer.apply_chat_template(_DIALOGUE, return_dict=False)
    prompt = tokenizer.apply_chat_template(
        _DIALOGUE[:1], return_dict=False, add_generation_prompt=True
    )
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(prompt[1:]).endswith("?\nAnswer:")
