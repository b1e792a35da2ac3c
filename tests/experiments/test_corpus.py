"""The pre-training text and its windows."""

from pathlib import Path

import numpy as np
import pytest

from ivl_jax.experiments.family.corpus import (
    Corpus,
    SourceFile,
    Windows,
    held_out_windows,
    is_held_out,
    standard_library_files,
)
from ivl_jax.experiments.family.facts import build_facts
from ivl_jax.experiments.family.tokenizers import train_byte_tokenizer, wrap_tokenizer

_TEXT = (
    '"""A module that counts."""\n\ndef count(things):\n    """Count."""\n    return len(things)\n'
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    sources = tuple(SourceFile(f"file{index}.py", _TEXT * 9) for index in range(6))
    return Corpus(sources, (SourceFile("held.py", _TEXT * 3),), tuple(build_facts(count=4)))


@pytest.fixture(scope="module")
def tokenizer():
    end = "<|endoftext|>"
    return wrap_tokenizer(train_byte_tokenizer([_TEXT], entries=300), bos=end, eos=end)


def test_a_batch_depends_on_seed_and_step_alone(corpus, tokenizer) -> None:
    first, second = (Windows(corpus, tokenizer, length=32, seed=1) for _ in range(2))
    step = first.count // 4 + 1  # in the second epoch
    second.batch(0, rows=4)
    np.testing.assert_array_equal(first.batch(step, rows=4), second.batch(step, rows=4))
    other = Windows(corpus, tokenizer, length=32, seed=2).batch(step, rows=4)
    assert (other != first.batch(step, rows=4)).any()


def test_the_steps_of_an_epoch_never_repeat_a_window(corpus, tokenizer) -> None:
    windows = Windows(corpus, tokenizer, length=32, seed=0)
    whole = windows.batch(0, rows=windows.count)
    pieces = np.concatenate([windows.batch(step, rows=4) for step in range(windows.count // 4)])
    np.testing.assert_array_equal(pieces, whole[: len(pieces)])
    assert whole.shape == (windows.count, 33)


def test_held_out_windows_hold_the_held_out_files(corpus, tokenizer) -> None:
    rows = held_out_windows(corpus, tokenizer, length=16, rows=2)
    assert rows.shape == (2, 17)
    text = tokenizer.decode(rows.reshape(-1)[1:])
    assert _TEXT.startswith(text[: len(_TEXT)])


def test_tests_tables_and_unexplained_files_stay_out(tmp_path: Path) -> None:
    for name in ("good.py", "test/test_good.py", "encodings/cp1.py", "deep/good.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(_TEXT, encoding="utf-8")
    (tmp_path / "bare.py").write_text("x = 1\n" * 50, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def (", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"'''caf\xe9'''\n")
    paths = [file.path for file in standard_library_files(tmp_path)]
    assert paths == ["deep/good.py", "good.py"]


def test_held_out_files_are_a_small_share() -> None:
    share = np.mean([is_held_out(f"module{index}.py") for index in range(4000)])
    assert 0.01 < share < 0.05
