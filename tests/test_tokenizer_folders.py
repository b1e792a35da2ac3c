"""Tokenizer files that are hostile or broken: nothing runs, nothing is asked, the file is named."""

import json
import shutil
from pathlib import Path

import pytest

from ivl_jax.tokenizer import describe_tokenizer, load_tokenizer

FAMILY_S = Path("ivl_jax") / "assets" / "family" / "S"
CODE = "from pathlib import Path\nPath({!r}).write_text('ran')\n"


@pytest.fixture
def folder(project_root: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "S"
    shutil.copytree(project_root / FAMILY_S, copy)
    return copy


def test_code_of_a_folder_is_refused_and_never_run(folder, tmp_path, monkeypatch):
    ran = tmp_path / "ran.txt"
    (folder / "evil_tok.py").write_text(CODE.format(str(ran)))
    path = folder / "tokenizer_config.json"
    names = {"AutoTokenizer": ["evil_tok.EvilTok", "evil_tok.EvilTok"]}
    config = json.loads(path.read_text()) | {"tokenizer_class": "EvilTok", "auto_map": names}
    path.write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("something was asked"))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: auto_map: .*evil_tok\.EvilTok"):
        load_tokenizer(folder)
    assert not ran.exists()


def test_a_broken_tokenizer_is_named_with_its_folder(folder):
    path = folder / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["merges"] = [["no such", "pieces"]]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"S: its tokenizer files cannot be read"):
        load_tokenizer(folder)


def test_a_panic_of_the_tokenizers_library_is_an_error_that_names_the_folder(folder, monkeypatch):
    kind = type("PanicException", (BaseException,), {})  # Rust's, raised for some altered merges

    def panic(*_, **__):
        raise kind("range end index 66 out of range")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(ValueError, match=f"{folder}: its tokenizer files.*range end index 66"):
        load_tokenizer(folder)


def test_an_id_beyond_any_vocabulary_is_refused_before_a_table_is_made(folder):
    path = folder / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["vocab"]["zebra"] = 2**31
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"S/tokenizer\.json: expected token ids .*got 2147483648"):
        describe_tokenizer(load_tokenizer(folder), folder)


def test_an_option_that_breaks_the_first_call_is_found_at_once(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "x"}))
    with pytest.raises(ValueError, match=r"S: its tokenizer files cannot be read .*TypeError"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "expected an object"), ('{"eos_token_id": "x"}', "eos_token_id")],
)
def test_a_broken_generation_config_is_named(folder, text, message):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"generation_config\.json.*{message}"):
        describe_tokenizer(load_tokenizer(folder), folder)
