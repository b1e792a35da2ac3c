"""A piece of text is tokenised as the continuation of what stands before it."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ivl_jax.data.pieces import PieceEncoder

NAMES = ["stories260k", "llama2", "gpt2"]


_encoder = functools.lru_cache(PieceEncoder)


def _joined(tokenizer: Any, pieces: list[str]) -> list[str]:
    (encoded,) = _encoder(tokenizer).encode([pieces])
    return tokenizer.convert_ids_to_tokens([token for piece in encoded for token in piece.ids])


def _metaspace_tokenizer(prepend_scheme: str) -> Any:
    vocabulary = {text: i for i, text in enumerate(["?", "</s>", "▁", "a", "b"])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="?"))
    if prepend_scheme == "normalizer":
        replace = normalizers.Replace(" ", "▁")
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize(
    ("prepend_scheme", "expected"),
    [
        ("normalizer", "▁ a b </s> ▁ a </s> ▁ b"),
        ("always", "▁ a b </s> ▁ a </s> ▁ b"),
        ("first", "▁ a b </s> a </s> b"),
        ("never", "a b </s> a </s> b"),
    ],
)
def test_a_prefix_space_stands_where_the_tokenizer_puts_it_in_a_whole_text(
    prepend_scheme: str, expected: str
) -> None:
    tokenizer = _metaspace_tokenizer(prepend_scheme)
    whole = "ab</s>a</s>b"
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == expected.split()
    for pieces in (
        ["ab</s>a</s>b"],
        ["a", "b</s>a</s>b"],
        ["ab</s>", "a</s>b"],
        ["ab</s>a", "</s>b"],
    ):
        assert _joined(tokenizer, pieces) == expected.split(), pieces


@pytest.mark.parametrize("name", ["stories260k", "llama2"])
def test_no_space_is_put_before_a_piece_in_the_middle(
    shared_tokenizer: Callable[[str], Any], name: str
) -> None:
    tokens = _joined(shared_tokenizer(name), ["<s>Sum:\n", "42"])
    assert tokens[-3:] == ["<0x0A>", "4", "2"]


@settings(derandomize=True, deadline=None, max_examples=30)
@given(data=st.data(), words=st.lists(st.text("aéx\n<.", min_size=1, max_size=4), min_size=1))
@pytest.mark.parametrize("name", NAMES)
def test_cuts_at_spaces_and_special_tokens_change_no_token(
    shared_tokenizer: Callable[[str], Any], name: str, data: st.DataObject, words: list[str]
) -> None:
    # "ab" ends no word of the vocabularies with a space, so no token reaches across such a cut.
    tokenizer = shared_tokenizer(name)
    pieces = [words[0] + "ab"]
    for word in words[1:]:
        between = data.draw(st.sampled_from([" ", tokenizer.eos_token]))
        if between == " ":
            pieces.append(f" {word}ab")
        else:
            pieces[-1] += between
            pieces.append(f"{word}ab")
    (encoded,) = _encoder(tokenizer).encode([pieces])
    whole = tokenizer("".join(pieces), add_special_tokens=False).input_ids
    assert [token for piece in encoded for token in piece.ids] == whole


@pytest.mark.parametrize("name", NAMES)
def test_offsets_cover_each_piece_in_order(
    shared_tokenizer: Callable[[str], Any], name: str
) -> None:
    tokenizer = shared_tokenizer(name)
    pieces = ["Hé: ", f"yo 42{tokenizer.eos_token}\nnext", "é"]
    (encoded,) = _encoder(tokenizer).encode([pieces])
    for piece, tokens in zip(pieces, encoded, strict=True):
        offsets = tokens.offsets()
        assert len(offsets) == len(tokens.ids)
        assert offsets == sorted(offsets)
        assert offsets[-1][1] == len(piece)
    ids, offsets = encoded[1].ids, encoded[1].offsets()
    assert offsets[ids.index(tokenizer.eos_token_id)] == (5, 5 + len(tokenizer.eos_token))


def test_special_texts_are_found_longest_first() -> None:
    vocabulary = {text: i for i, text in enumerate(["?", "<e>", "<e>2", " ", "a"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    tokenizer.add_special_tokens({"pad_token": "<e>2", "mask_token": " "})
    encoder = PieceEncoder(tokenizer)
    assert encoder.special_at("ab<e>2", 2) == "<e>2"
    assert encoder.special_at("ab<e>3", 2) == "<e>"
    assert encoder.special_at("ab<e>2", 1) == ""
    assert encoder.holds_special("ab<e>c")
    assert not encoder.holds_special("a b<e")
    assert encoder.ends_with_special("ab<e>")
    assert not encoder.ends_with_special("ab<e> ")
