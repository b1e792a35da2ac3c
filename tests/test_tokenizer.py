"""The tokens' bytes are the bytes they decode to; two tokenizers agree exactly when they should."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_jax.token_bytes import ordinary_token_bytes
from ivl_jax.tokenizer import TokenizerInfo, describe_tokenizer, load_tokenizer, save_tokenizer
from ivl_jax.tokenizer_agreement import TokenizerMismatchError, check_compatible

TEXTS = st.text(min_size=1, max_size=40) | st.sampled_from(
    [
        "\n\t  two  spaces",
        "naïve café — “quotes”",
        "日本語 の テキスト",
        "🤗🏽‍🚀 \x00\x7f",
        "Ġ▁<0x41>",
    ]
)


def _edited(source: Path, target: Path, edit: Any, *, name: str = "tokenizer.json") -> Path:
    """A copy of a tokenizer's folder with one JSON file changed."""
    shutil.copytree(source, target)
    path = target / name
    record = json.loads(path.read_text()) if path.exists() else {}
    edit(record)
    path.write_text(json.dumps(record))
    return target


def _info(folder: Path) -> TokenizerInfo:
    return describe_tokenizer(load_tokenizer(folder), folder)


def _append(record: dict, *texts: str, special: bool) -> None:
    for text in texts:
        record["added_tokens"].append(
            {
                "id": len(record["model"]["vocab"]) + len(record["added_tokens"]) - 3,
                "content": text,
                "special": special,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        )


@pytest.fixture(scope="module")
def byte_level(gpt2_tokenizer_dir: Path) -> tuple[Any, tuple]:
    tokenizer = load_tokenizer(gpt2_tokenizer_dir)
    return tokenizer, ordinary_token_bytes(tokenizer)


@pytest.fixture(scope="module", params=["llama2", "stories260k"])
def sentencepiece(request: pytest.FixtureRequest) -> tuple[Any, tuple]:
    fixture = {"llama2": "llama2_tokenizer_dir", "stories260k": "stories260k_dir"}[request.param]
    tokenizer = load_tokenizer(request.getfixturevalue(fixture))
    return tokenizer, ordinary_token_bytes(tokenizer)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(text=TEXTS)
def test_bytes_of_byte_level_tokens_join_to_the_text(byte_level: tuple, text: str) -> None:
    tokenizer, spelled = byte_level
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert b"".join(spelled[token] for token in ids) == text.encode()


@settings(derandomize=True, deadline=None, max_examples=100)
@given(text=TEXTS)
def test_bytes_of_sentencepiece_tokens_join_to_the_text(sentencepiece: tuple, text: str) -> None:
    tokenizer, spelled = sentencepiece
    if "▁" in text:  # SentencePiece cannot tell its word mark from a space
        text = text.replace("▁", "_")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert b"".join(spelled[token] for token in ids) == b" " + text.encode()


def test_special_tokens_are_not_ordinary(byte_level: tuple, stories260k_dir: Path) -> None:
    assert byte_level[1][50256] is None
    info = _info(stories260k_dir)
    assert info.special_tokens == {0: "<unk>", 1: "<s>", 2: "</s>"}
    assert info.ordinary_tokens[:4] == (None, None, None, b"\x00")
    assert info.vocab_size == 512
    assert (info.bos_id, info.eos_ids, info.pad_id, info.unk_id) == (1, (2,), 2, 0)


def test_info_survives_json(stories260k_dir: Path) -> None:
    info = _info(stories260k_dir)
    record = json.loads(json.dumps(info.to_json()))
    assert TokenizerInfo.from_json(record) == info
    assert TokenizerInfo.from_json({**record, "vocab_size": 513}) != info
    del record["eos_ids"]
    with pytest.raises(ValueError, match="expected the keys"):
        TokenizerInfo.from_json(record)


@pytest.mark.parametrize(
    "fixture", ["stories260k_dir", "llama2_tokenizer_dir", "gpt2_tokenizer_dir"]
)
def test_a_saved_tokenizer_is_the_same(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(fixture)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{{ messages }}"
    save_tokenizer(tokenizer, tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert describe_tokenizer(saved) == describe_tokenizer(tokenizer)
    assert (
        describe_tokenizer(saved).ordinary_tokens == describe_tokenizer(tokenizer).ordinary_tokens
    )
    assert saved.chat_template == "{{ messages }}"
    text = "Ein  Würfel\n\n<s>"
    assert saved(text).input_ids == tokenizer(text).input_ids


def test_every_configured_end_of_text_is_kept(stories260k_dir: Path, tmp_path: Path) -> None:
    folder = _edited(
        stories260k_dir,
        tmp_path / "a",
        lambda record: record.update(eos_token_id=[5, 2, 9]),
        name="generation_config.json",
    )
    assert _info(folder).eos_ids == (2, 5, 9)
    folder = _edited(
        stories260k_dir,
        tmp_path / "b",
        lambda record: record.update(eos_token_id=7),
        name="config.json",
    )
    assert _info(folder).eos_ids == (2, 7)


def test_a_tokenizer_agrees_with_itself(stories260k_dir: Path) -> None:
    info = _info(stories260k_dir)
    unknown = check_compatible(info, info, base_name="base", value_name="value")
    assert not unknown
    read_back = TokenizerInfo.from_json(info.to_json())
    assert not check_compatible(info, read_back, base_name="base", value_name="value")


def test_renamed_special_tokens_are_named_and_accepted(
    stories260k_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def rename(record: dict) -> None:
        record["added_tokens"][0]["content"] = "<reserved>"
        record["model"]["vocab"] = {
            ("<reserved>" if text == "<unk>" else text): token
            for text, token in record["model"]["vocab"].items()
        }
        record["model"]["unk_token"] = "<reserved>"

    folder = _edited(stories260k_dir, tmp_path / "renamed", rename)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<reserved>"}))
    base, value = _info(folder), _info(stories260k_dir)
    assert base.fingerprint == value.fingerprint
    with caplog.at_level(logging.WARNING):
        unknown = check_compatible(base, value, base_name="base", value_name="value")
    assert unknown.renamed == {0: ("<reserved>", "<unk>")}
    assert unknown.ids == ()
    assert "'<reserved>'/'<unk>'" in caplog.text


def test_appended_tokens_are_unknown_to_the_value(
    stories260k_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = _info(
        _edited(
            stories260k_dir,
            tmp_path / "longer",
            lambda record: _append(record, "<|im_end|>", "Krampus", special=False),
        )
    )
    value = _info(stories260k_dir)
    assert base.vocab_size == 514
    with caplog.at_level(logging.WARNING):
        unknown = check_compatible(base, value, base_name="base", value_name="value")
    assert unknown.ids == (512, 513)
    assert "512 '<|im_end|>', 513 'Krampus'" in caplog.text
    with pytest.raises(TokenizerMismatchError, match=r"id 512: absent in the base, '<\|im_end\|>'"):
        check_compatible(value, base, base_name="base", value_name="value")


def test_ordinary_tokens_appended_by_continued_training_are_unknown_ids(
    stories260k_dir: Path, tmp_path: Path
) -> None:
    base = _info(
        _edited(
            stories260k_dir,
            tmp_path / "continued",
            lambda record: record["model"]["vocab"].update({"▁Rübe": 512}),
        )
    )
    value = _info(stories260k_dir)
    assert base.fingerprint != value.fingerprint
    unknown = check_compatible(base, value, base_name="base", value_name="value")
    assert unknown.ids == (512,)


def test_one_ordinary_token_that_differs_is_an_error_naming_both_sides(
    stories260k_dir: Path, tmp_path: Path
) -> None:
    def swap(record: dict) -> None:
        vocabulary = record["model"]["vocab"]
        vocabulary["ed"], vocabulary["nd"] = vocabulary["nd"], vocabulary["ed"]

    base, value = (
        _info(_edited(stories260k_dir, tmp_path / "swapped", swap)),
        _info(stories260k_dir),
    )
    with pytest.raises(TokenizerMismatchError) as caught:
        check_compatible(base, value, base_name="/models/base", value_name="runs/value")
    for part in ("/models/base", "runs/value", "b'nd' in the base, b'ed' in the value", "2 tokens"):
        assert part in str(caught.value) or part.replace("nd", "ed") in str(caught.value)
    assert "vocabulary map" in str(caught.value)
    read_back = TokenizerInfo.from_json(value.to_json())
    with pytest.raises(TokenizerMismatchError, match="load both tokenizers"):
        check_compatible(base, read_back, base_name="base", value_name="value")


def test_an_ordinary_token_kept_whole_stays_ordinary(stories260k_dir: Path, tmp_path: Path) -> None:
    def keep_whole(record: dict) -> None:
        entry = {**record["added_tokens"][0], "id": 265, "content": "▁the", "special": False}
        record["added_tokens"].append(entry)

    kept = _info(_edited(stories260k_dir, tmp_path / "kept", keep_whole))
    assert kept.ordinary_tokens[265] == b" the"
    assert kept.fingerprint == _info(stories260k_dir).fingerprint


def test_folders_without_a_usable_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(ValueError, match=r"add the tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_unknown_spelling_is_refused(stories260k_dir: Path, tmp_path: Path) -> None:
    folder = _edited(
        stories260k_dir,
        tmp_path / "wordpiece",
        lambda record: record.update(
            decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}
        ),
    )
    with pytest.raises(ValueError, match="WordPiece"):
        _info(folder)


def test_tokenizers_load_where_neither_torch_nor_tensorflow_is_installed(
    stories260k_dir: Path, project_root: Path
) -> None:
    program = f"""
import importlib.util, sys
find, absent = importlib.util.find_spec, ("torch", "tensorflow")
importlib.util.find_spec = lambda name, *rest: None if name in absent else find(name, *rest)
sys.modules.update(dict.fromkeys(absent))  # importing them raises
from ivl_jax.tokenizer import load_tokenizer, describe_tokenizer
assert "transformers" not in sys.modules, "importing the module alone loads transformers"
assert describe_tokenizer(load_tokenizer({str(stories260k_dir)!r})).vocab_size == 512
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=project_root)
