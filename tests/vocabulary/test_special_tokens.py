"""Special tokens are paired by the role they play, so that a composition stops."""

import logging

import pytest

from ivl_jax.tokenizer import TokenizerInfo
from ivl_jax.vocabulary.special_tokens import pair_special_tokens


def _info(
    special: dict[int, str], *, bos: int | None = None, eos: tuple[int, ...] = ()
) -> TokenizerInfo:
    return TokenizerInfo(
        vocab_size=100,
        fingerprint="f",
        special_tokens=special,
        bos_id=bos,
        eos_ids=eos,
        pad_id=0,
        unk_id=None,
    )


LLAMA2 = _info({0: "<unk>", 1: "<s>", 2: "</s>"}, bos=1, eos=(2,))
GPT2 = _info({50: "<|endoftext|>"}, bos=50, eos=(50,))
LLAMA3 = _info(
    {60: "<|begin_of_text|>", 61: "<|end_of_text|>", 69: "<|eot_id|>"}, bos=60, eos=(69, 61)
)
QWEN_BASE = _info({70: "<|endoftext|>", 71: "<|im_start|>", 72: "<|im_end|>"}, eos=(70,))
QWEN_CHAT = _info({70: "<|endoftext|>", 71: "<|im_start|>", 72: "<|im_end|>"}, eos=(72, 70))


def _pairs(base: TokenizerInfo, value: TokenizerInfo, *by_hand: str) -> dict[int, tuple[str, int]]:
    pairs = pair_special_tokens(base, value, base_name="BASE", value_name="VALUE", by_hand=by_hand)
    assert [base_id for _, base_id, _ in pairs] == sorted({base_id for _, base_id, _ in pairs})
    return {base_id: (role, value_id) for role, base_id, value_id in pairs}


def test_begin_and_end_take_the_other_sides_begin_and_end() -> None:
    assert _pairs(LLAMA2, GPT2) == {1: ("begin", 50), 2: ("end", 50)}
    assert _pairs(GPT2, LLAMA2) == {50: ("end", 2)}


def test_turn_ends_take_turn_ends_of_any_name() -> None:
    assert _pairs(LLAMA3, QWEN_CHAT) == {61: ("end", 70), 69: ("turn end", 72)}
    assert _pairs(QWEN_BASE, LLAMA3) == {70: ("end", 61), 72: ("turn end", 69)}


def test_a_turn_end_without_a_counterpart_takes_the_values_end() -> None:
    assert _pairs(LLAMA3, LLAMA2) == {60: ("begin", 1), 61: ("end", 2), 69: ("turn end", 2)}


def test_a_base_without_turn_ends_hears_what_the_value_ends_with_first() -> None:
    assert _pairs(LLAMA2, QWEN_CHAT)[2] == ("end", 72)
    assert _pairs(LLAMA2, LLAMA3) == {1: ("begin", 60), 2: ("end", 69)}


def test_other_special_tokens_are_paired_by_name() -> None:
    other = _info({5: "<|im_start|>", 6: "<|im_end|>", 7: "<|endoftext|>"}, eos=(7,))
    assert _pairs(QWEN_BASE, other) == {
        70: ("end", 7),
        71: ("same name", 5),
        72: ("turn end", 6),
    }


def test_same_tokenizer_pairs_every_special_token_with_itself() -> None:
    for info in (LLAMA2, GPT2, LLAMA3, QWEN_BASE, QWEN_CHAT):
        assert {k: v for k, (_, v) in _pairs(info, info).items()} == {
            token_id: token_id for token_id in info.special_tokens
        }


def test_an_end_nothing_is_paired_with_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert _pairs(LLAMA2, QWEN_BASE)[2] == ("end", 70)
    assert (
        "VALUE has the end token <|im_end|>, which is paired with no token of BASE" in caplog.text
    )
    assert "--pair '</s>=<|im_end|>'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert _pairs(LLAMA2, GPT2)
    assert caplog.text == ""


def test_pairs_by_hand_overrule_and_must_name_special_tokens() -> None:
    assert _pairs(LLAMA2, QWEN_BASE, "</s>=<|im_end|>")[2] == ("by hand", 72)
    odd = _info({3: "a=b"})
    assert _pairs(odd, odd, "a=b=a=b")[3] == ("by hand", 3)
    for wrong in ("</s>", "</s>=<|eot|>", "the=<|im_end|>"):
        with pytest.raises(
            ValueError, match=r"must be BASE_TOKEN=VALUE_TOKEN.*VALUE has <\|endoftext"
        ):
            _pairs(LLAMA2, QWEN_BASE, wrong)
