"""Re-tokenising the tail is re-tokenising everything, at every step."""

import itertools
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ivl_jax.assets import family_folder
from ivl_jax.text_codec import Before, ReadText, TextCodec, TextEncoders
from ivl_jax.tokenizer import TokenizerInfo, describe_tokenizer, load_tokenizer
from ivl_jax.vocabulary.retokenize import Retokenizer, backward_pairs, forward_pairs
from ivl_jax.vocabulary.special_tokens import pair_special_tokens

NASTY = [
    "",
    " ",
    "naïve café, 水と火, 🙂 and 🙃👩‍👩‍👧: bytes that split a character",
    "水と火" * 60
    + " and "
    + "=" * 150
    + " " * 130
    + "x" * 90
    + "\n\n\n  def f():\n\t\treturn 1234567890",
    "</s> spelled <|endoftext|> as text <s>",
    " leading and trailing  ",
]


def retokenizer(source: TextCodec, target: TextCodec, **changes: Any) -> Retokenizer:
    pairs = pair_special_tokens(source.info, target.info, base_name="b", value_name="v")
    return Retokenizer(source, target, forward_pairs(pairs), **changes)


def said(source: TextCodec, ids: list[int]) -> str:
    """The text of ordinary tokens up to the last whole character, at the start of a text."""
    spelled = b"".join(source.token_bytes[i] for i in ids)
    for cut in range(3, 0, -1):
        # Bytes at the end that begin a character and need more of them.
        tail = spelled[-cut:]
        if len(tail) == cut and tail[0] >= 0xC0 and _unfinished(tail):
            spelled = spelled[:-cut]
            break
    text = spelled.decode(errors="replace")
    return text if source.prefix == "none" else text.removeprefix(" ")


def _unfinished(tail: bytes) -> bool:
    try:
        tail.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


@pytest.fixture(scope="module")
def tokenizers(llama2_tokenizer_dir: Path, gpt2_tokenizer_dir: Path) -> dict[str, Any]:
    folders = {"llama2": llama2_tokenizer_dir, "gpt2": gpt2_tokenizer_dir}
    folders |= {name: family_folder(name) for name in ("S", "X")}
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def codecs(tokenizers: dict[str, Any]) -> dict[str, TextCodec]:
    return {
        name: TextCodec(tokenizer, describe_tokenizer(tokenizer))
        for name, tokenizer in tokenizers.items()
    }


@pytest.mark.parametrize(
    ("source", "target"),
    [("gpt2", "llama2"), ("llama2", "gpt2"), ("S", "X"), ("X", "S"), ("X", "llama2")],
    ids=str,
)
def test_every_step_equals_reading_the_whole_text_anew(
    tokenizers: dict[str, Any],
    codecs: dict[str, TextCodec],
    gsm8k_dir: Path,
    source: str,
    target: str,
) -> None:
    rules = retokenizer(codecs[source], codecs[target])
    row = json.loads((gsm8k_dir / "test.jsonl").read_text().splitlines()[3])
    begins = [rules.target.info.bos_id]
    for text in [*NASTY, row["question"] + "\n" + row["answer"]]:
        ids = rules.source.encode(text, before="start")
        grown = rules.begin(())
        assert grown.tokens == begins
        for count in range(len(ids)):
            before = list(grown.tokens)
            same = grown.push(ids[count : count + 1])
            anew = tokenizers[target](
                said(rules.source, ids[: count + 1]), split_special_tokens=True, verbose=False
            )["input_ids"]
            assert grown.tokens == (anew if rules.target.beginning else begins + anew)
            assert before[:same] == grown.tokens[:same]
            assert before[same : same + 1] != grown.tokens[same : same + 1] or not before[same:]


def test_only_a_tail_is_read_anew_also_in_long_texts(
    codecs: dict[str, TextCodec], monkeypatch: pytest.MonkeyPatch
) -> None:
    for source, target in (("gpt2", "llama2"), ("llama2", "gpt2")):
        rules = retokenizer(codecs[source], codecs[target])
        read: list[int] = []
        encode = rules.target.encode

        def counting(text: str, *, before: Any, encode: Any = encode, read: Any = read) -> Any:
            read.append(len(text))
            return encode(text, before=before)

        monkeypatch.setattr(rules.target, "encode", counting)
        grown = rules.begin(())
        for token_id in rules.source.encode("All work and no play. 水" * 60, before="start"):
            grown.push([token_id])
        assert len(grown.tokens) > 300
        assert max(read) < 600
        read.clear()
        for token_id in rules.source.encode("All work and no play." * 60, before="start"):
            grown.push([token_id])
        assert max(read) < 12, "words are read one by one"


def test_text_between_breaks_is_tokenised_by_itself(codecs: dict[str, TextCodec]) -> None:
    characters = string.ascii_letters + string.digits * 3 + string.punctuation * 2 + "\n\n    é水"
    choices = random.Random(0).choices
    for codec in codecs.values():
        assert {"s.", "9+", "$2", "a\n"} <= codec.breaks
        for _ in range(1000):
            text = " x" + "".join(choices(characters, k=12))
            cuts = [i for i in range(1, len(text)) if text[i - 1 : i + 1] in codec.breaks]
            parts = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
            apart = [token for part in parts for token in codec.encode(part, before="text")]
            assert codec.encode(text, before="text") == apart


def test_what_follows_a_word_is_read_apart_from_it_and_what_joins_it_once(
    codecs: dict[str, TextCodec], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = retokenizer(codecs["gpt2"], codecs["llama2"])
    read: list[str] = []
    encode = rules.target.encode

    def recording(text: str, *, before: Any) -> list[int]:
        read.append(text)
        return encode(text, before=before)

    monkeypatch.setattr(rules.target, "encode", recording)
    ids = rules.source.encode(" costs $22.50, Siobhan=9+6: zyzzyva?", before="text")
    pieces = [rules.source.token_bytes[token_id].decode() for token_id in ids]
    for joined in (True, False):
        grown = rules.begin(rules.source.encode("It is", before="start"))
        read.clear()
        for token_id in ids:
            grown.push([token_id])
        assert all(text.strip().isalnum() or text in pieces for text in read)
        # The first time, the parts of words are joined; afterwards they are looked up.
        assert any(text not in pieces for text in read) == joined


def toy_codec(**changes: Any) -> TextCodec:
    """Reads characters, and a space with the letter after it; with `changes`, else too."""
    names = ["?", *map(chr, range(32, 127)), *(f" {chr(i)}" for i in range(97, 123))]
    merges = [(" ", chr(i)) for i in range(97, 123)]
    if "digits" in changes:
        numbers = list(itertools.product(string.digits, repeat=2))
        names, merges = [*names, *map("".join, numbers)], [*merges, *numbers]
    if "spanning" in changes:
        names, merges = [*names, "b c"], [*merges, ("b", " c")]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="?"))
    tokenizer.normalizer = changes.get("normalizer")
    tokenizer.pre_tokenizer = changes.get("pre_tokenizer")
    tokenizer.add_tokens(changes.get("added", []))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    return TextCodec(fast, describe_tokenizer(fast))


@pytest.mark.parametrize(
    ("changes", "apart"),
    [
        ({}, True),
        ({"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])}, True),
        ({"spanning": True}, False),
        ({"normalizer": normalizers.Replace(Regex(" +"), " ")}, False),
        ({"normalizer": normalizers.Strip()}, False),
        ({"added": [AddedToken("word", rstrip=True)]}, False),
        # A space after "!" is a token of its own, but not where a text begins with it.
        ({"pre_tokenizer": pre_tokenizers.Split(Regex("(?<=!) "), "isolated")}, False),
    ],
    ids=str,
)
def test_words_are_read_apart_only_where_that_changes_nothing(
    changes: dict[str, Any], *, apart: bool
) -> None:
    target = toy_codec(**changes)
    assert target.breaks_before_words is apart
    grown = Retokenizer(toy_codec(), target, {}).begin(())
    text = "a b c  word d! e word"
    for count, letter in enumerate(text, 1):
        grown.push([ord(letter) - 31])
        assert grown.tokens[1:] == target.encode(text[:count], before="start")


def test_tokens_break_nowhere_that_later_text_matters() -> None:
    # Two digits are one token, but not if the second one is before a letter.
    split = pre_tokenizers.Split(Regex("(?<=[0-9])[0-9](?=[a-z])"), "isolated")
    target = toy_codec(digits=True, pre_tokenizer=split)
    assert "a1" in target.breaks
    # An appended word may be one only where no letter or digit is beside it.
    assert not toy_codec(added=[AddedToken("word", single_word=True)]).breaks
    assert not any(pair[0].isdigit() and pair[1].islower() for pair in target.breaks)
    grown = Retokenizer(toy_codec(), target, {}).begin(())
    text = "a b 12 12c d34e"
    for count, letter in enumerate(text, 1):
        grown.push([ord(letter) - 31])
        assert grown.tokens[1:] == target.encode(text[:count], before="start")


class FarReaching(TextCodec):
    """One token a byte, of which there are two kinds: a "!" anywhere turns all into the other."""

    def __init__(self) -> None:
        self.info = TokenizerInfo(512, "", {}, bos_id=511, eos_ids=(), pad_id=0, unk_id=None)
        self.token_bytes = tuple(bytes([i % 256]) for i in range(512))
        self.special_ids = frozenset()
        self.prefix, self.beginning, self.is_bpe = "none", (), True
        self.breaks_before_words = False

    def encode(self, text: str, *, before: Before) -> list[int]:
        other = 256 if "!" in text else 0
        return [byte + other for byte in text.encode()]

    def encode_special(self, text: str, *, before: Before) -> ReadText:
        return ReadText([], text)


def test_where_a_change_reaches_the_tails_beginning_everything_is_read_anew() -> None:
    fake = FarReaching()
    grown = Retokenizer(fake, fake, {}).begin(())
    text = "x" * 300 + "!" + "x" * 300
    for count, letter in enumerate(text, 1):
        grown.push([ord(letter)])
        assert grown.tokens == [511, *fake.encode(text[:count], before="start")]


def test_special_tokens_are_paired_by_role_and_close_the_text_before_them(
    tokenizers: dict[str, Any], codecs: dict[str, TextCodec]
) -> None:
    rules = retokenizer(codecs["llama2"], codecs["gpt2"])
    first = rules.source.encode("One two", before="start")
    second = rules.source.encode("three", before="special")
    grown = rules.begin([1, *first, 2, 1, *second])
    gpt2 = tokenizers["gpt2"]
    one, three = gpt2("One two")["input_ids"], gpt2("three")["input_ids"]
    assert grown.tokens == [50256, *one, 50256, 50256, *three]
    # A special token inside a character leaves bytes that can no longer become one.
    grown.push([rules.source.token_bytes.index(b"\xe6"), 2])
    assert grown.tokens[-2:] == [*gpt2("three\ufffd")["input_ids"][-1:], 50256]


def test_a_prompts_special_tokens_may_be_spelled_out_but_not_those_that_are_generated(
    tokenizers: dict[str, Any], codecs: dict[str, TextCodec]
) -> None:
    rules = retokenizer(codecs["llama2"], codecs["gpt2"])
    spelled = rules.source.encode("a<|endoftext|>b", before="start")
    gpt2 = tokenizers["gpt2"]
    a, b = gpt2("a")["input_ids"], gpt2("b")["input_ids"]
    grown = rules.begin(spelled)
    assert grown.tokens == [*a, 50256, *b]
    grown.push(spelled)
    ordinary = gpt2("b a<|endoftext|>b", split_special_tokens=True)["input_ids"]
    assert grown.tokens[len(a) + 1 :] == ordinary


def test_a_prompt_that_both_sides_have_is_never_read_anew(
    tokenizers: dict[str, Any], codecs: dict[str, TextCodec]
) -> None:
    rules = retokenizer(codecs["gpt2"], codecs["llama2"])
    prompt = [1, *rules.target.encode("Answer:", before="special")]
    grown = rules.resume(prompt, source_ids=rules.source.encode("Answer:", before="start"))
    grown.push(rules.source.encode(" 42", before="text"))
    assert grown.tokens == [*prompt, *rules.target.encode(" 42", before="text")]
    # After a special token SentencePiece puts its own space, and takes the base's away.
    after = rules.resume([1], source_ids=[50256])
    after.push(rules.source.encode("Hi", before="special"))
    assert after.tokens == tokenizers["llama2"]("Hi")["input_ids"]
    back = retokenizer(codecs["llama2"], codecs["gpt2"])
    spaced = back.resume([50256], source_ids=[1])
    spaced.push(back.source.encode("Hi", before="special"))
    assert spaced.tokens == [50256, *tokenizers["gpt2"]("Hi")["input_ids"]]


class Interrupted:
    """A tokenizer before which something else happens, as when threads take turns."""

    encoder: Tokenizer
    interrupt: Callable[[], object]
    pause: bool

    def __init__(self, encoder: Tokenizer, interrupt: Callable[[], object]) -> None:
        vars(self).update(encoder=encoder, interrupt=interrupt, pause=False)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.encoder, name, value)

    def encode(self, text: str, **named: Any) -> Any:
        if not self.pause:
            vars(self).update(pause=True)
            self.interrupt()
            vars(self).update(pause=False)
        return self.encoder.encode(text, **named)


@pytest.mark.parametrize("first", ["plain", "special"])
def test_threads_that_read_special_tokens_and_plain_text_share_a_codec(
    codecs: dict[str, TextCodec], monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    codec = codecs["S"]
    text = "Fire and water, earth and air: <|endoftext|> and what comes after it"
    read = {
        "plain": lambda: codec.encode(text, before="start"),
        "special": lambda: codec.encode_special(text, before="start"),
    }
    (other,) = read.keys() - {first}
    alone = read[first]()
    for name, held in list(vars(codec).items()):
        if isinstance(held, TextEncoders):
            whole = Interrupted(held.whole, read[other])
            monkeypatch.setattr(codec, name, held._replace(whole=whole))
    assert read[first]() == alone


def test_a_fork_grows_on_its_own(codecs: dict[str, TextCodec]) -> None:
    rules = retokenizer(codecs["S"], codecs["X"])
    ids = rules.source.encode("naïve 水 and fire 🙂", before="start")
    one = rules.begin(ids[:6])
    other = one.fork()
    before = list(one.tokens)
    other.push(ids[6:])
    assert one.tokens == before
    one.push(ids[6:])
    assert one.tokens == other.tokens


def test_a_value_token_with_several_roles_becomes_the_bases_end() -> None:
    pairs = (("begin", 1, 50256), ("end", 2, 50256), ("same name", 7, 9))
    assert backward_pairs(pairs) == {50256: 2, 9: 7}
    assert forward_pairs(pairs) == {1: 50256, 2: 50256, 7: 9}
