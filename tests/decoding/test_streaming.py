import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_jax.decoding.streaming import Detokenizer, StopStrings

BYTES = [bytes([i]) for i in range(256)]


def pieces_of(detokenizer, ids):
    return [*[detokenizer.push(i) for i in ids], detokenizer.finish()]


@given(st.text())
def test_bytes_one_at_a_time_give_back_the_text_in_whole_characters(text):
    pieces = pieces_of(Detokenizer(BYTES, strip_leading_space=False), text.encode())
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.binary())
def test_invalid_utf8_becomes_replacement_characters(data):
    pieces = pieces_of(Detokenizer(BYTES, strip_leading_space=False), data)
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


def test_a_character_that_never_completes_is_returned_at_the_end():
    detokenizer = Detokenizer(BYTES, strip_leading_space=False)
    assert [detokenizer.push(i) for i in "é".encode()[:1]] == [""]
    assert detokenizer.finish() == "\ufffd"


def test_only_the_first_space_of_the_text_is_dropped():
    detokenizer = Detokenizer([b"", b"  a", b" b"], strip_leading_space=True)
    assert [detokenizer.push(i) for i in (0, 1, 2)] == ["", " a", " b"]


def test_special_and_unknown_ids_stand_for_nothing():
    detokenizer = Detokenizer([b"", b"a"], strip_leading_space=False)
    assert [detokenizer.push(i) for i in (0, 1, 2, 999)] == ["", "a", "", ""]


def run(stop, pieces):
    matcher = StopStrings(stop)
    kept = [matcher.push(piece) for piece in pieces]
    return "".join([*kept, matcher.finish()]), matcher.matched, kept


def reference(stop, text):
    """The text before the stop string that ends first (the longest of those ending there)."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    if not ends:
        return text, None
    end, _, found = min(ends)
    return text[: end - len(found)], found


@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    text=st.text("abc", max_size=30),
    seed=st.integers(0, 100),
)
def test_any_split_of_the_text_is_cut_where_the_whole_text_is(stop, text, seed):
    generator = random.Random(seed)
    cuts = sorted(generator.randint(0, len(text)) for _ in range(5))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    kept, matched, _ = run(stop, pieces)
    assert (kept, matched) == reference(stop, text)


def test_text_that_may_begin_a_stop_string_is_held_back_and_released():
    assert run(["\n\nQ:"], ["A\n", "\nQ", "uiet"]) == (
        "A\n\nQuiet",
        None,
        ["A", "", "\n\nQuiet"],
    )


def test_nothing_is_emitted_after_a_match():
    assert run(["END"], ["one E", "ND two", "three"]) == ("one ", "END", ["one ", "", ""])


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
