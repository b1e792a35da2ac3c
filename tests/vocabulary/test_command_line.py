"""`python -m ivl_jax.vocabulary`: from folders and files to a map, with errors one can act on."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.vocabulary.__main__ import main
from ivl_jax.vocabulary.mapping import (
    apply_vocabulary_map,
    check_vocabulary_map,
    load_vocabulary_map,
    total_weights,
)


@pytest.fixture
def folders(byte_level_tokenizer, metaspace_tokenizer, save_folder) -> tuple[Path, Path]:
    return save_folder(metaspace_tokenizer(), "base"), save_folder(byte_level_tokenizer(), "value")


@pytest.fixture
def text_file(tmp_path, toy_corpus) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in toy_corpus))
    return path


def _build(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vocabulary", "build", *map(str, arguments)])
    return main()


def _options(folders: tuple[Path, Path], text: Path, output: Path) -> list[object]:
    base, value = folders
    return [
        *("--base-tokenizer", base, "--value-tokenizer", value),
        *("--text", text, "--output", output),
    ]


@pytest.mark.parametrize("method", ["dtw", "bytes", "projection"])
def test_build_writes_a_map_that_loads_applies_and_reports(
    folders, text_file, tmp_path, monkeypatch, capsys, method
) -> None:
    output = tmp_path / "map.safetensors"
    options = _options(folders, text_file, output)
    assert _build(monkeypatch, *options, "--method", method) == 0
    report = capsys.readouterr().out
    for part in (
        "base tokens mapped",
        "running text mapped",
        "</s> → <|endoftext|> (end)",
        "unmapped",
    ):
        assert part in report
    vocabulary_map, metadata = load_vocabulary_map(output)
    assert (metadata.base_name, metadata.value_name) == ("base", "value")
    assert (metadata.method, metadata.centred) == (method, False)
    z = jnp.ones((1, 1, metadata.value_vocab_size))
    mapped = apply_vocabulary_map(z, vocabulary_map)[0, 0]
    np.testing.assert_allclose(mapped, total_weights(vocabulary_map), rtol=1e-6)
    monkeypatch.setattr(sys, "argv", ["vocabulary", "show", str(output)])
    assert main() == 0
    shown = capsys.readouterr().out
    assert f"{metadata.token_coverage:.2%}" in shown
    assert f"{metadata.text_coverage:.2%}" in shown
    assert ("at most 4 value tokens per base token" in shown) == (method == "projection")


def test_build_stores_the_centring_and_takes_pairs_by_hand(
    metaspace_tokenizer, byte_level_tokenizer, save_folder, text_file, tmp_path, monkeypatch
) -> None:
    folders = (
        save_folder(metaspace_tokenizer(), "base"),
        save_folder(byte_level_tokenizer(also=("<|im_end|>",)), "value"),
    )
    output = tmp_path / "map.safetensors"
    options = _options(folders, text_file, output)
    assert _build(monkeypatch, *options, "--centred", "--pair", "</s>=<|im_end|>") == 0
    vocabulary_map, metadata = load_vocabulary_map(output)
    assert metadata.centred
    assert ("by hand", 2, 1) in metadata.special_pairs
    assert vocabulary_map.value_index[2] == 1


def test_a_map_fits_the_tokenizers_it_was_built_for_only(
    folders, text_file, tmp_path, monkeypatch
) -> None:
    from ivl_jax.tokenizer import describe_tokenizer, load_tokenizer

    output = tmp_path / "map.safetensors"
    assert _build(monkeypatch, *_options(folders, text_file, output)) == 0
    base, value = (describe_tokenizer(load_tokenizer(f)).fingerprint for f in folders)
    _, metadata = load_vocabulary_map(output)
    names = {"path": output, "base_name": "B", "value_name": "V"}
    check_vocabulary_map(metadata, base_fingerprint=base, value_fingerprint=value, **names)
    with pytest.raises(ValueError, match="base and value are swapped"):
        check_vocabulary_map(metadata, base_fingerprint=value, value_fingerprint=base, **names)


def test_unusable_input_is_a_sentence_and_status_1(
    folders, text_file, tmp_path, monkeypatch, capsys
) -> None:
    output = tmp_path / "map.safetensors"
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    (broken / "tokenizer_config.json").write_text("{}")
    base, value = folders
    for options, message in (
        (_options(folders, empty, output), f"{empty} has no text"),
        (_options(folders, tmp_path / "none.txt", output), "no text file at"),
        (
            _options((tmp_path, value), text_file, output),
            f"--base-tokenizer {tmp_path}: cannot read",
        ),
        (
            _options((base, broken), text_file, output),
            f"--value-tokenizer {broken}: cannot read a tokenizer",
        ),
        (_options(folders, text_file, tmp_path / "map.bin"), "expected the name of a .safetensors"),
        (
            _options(folders, text_file, tmp_path / "no" / "m.safetensors"),
            "in an existing folder",
        ),
        ([*_options(folders, text_file, output), "--entries", "0"], "at least 1 value token"),
        ([*_options(folders, text_file, output), "--pair", "a"], "must be BASE_TOKEN=VALUE_TOKEN"),
    ):
        assert _build(monkeypatch, *options) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("python -m ivl_jax.vocabulary: ")
        assert message in captured.err.replace("\n", "")
        assert not output.exists()
    monkeypatch.setattr(sys, "argv", ["vocabulary", "show", str(output)])
    assert main() == 1
    said = capsys.readouterr().err
    assert "no vocabulary map at" in said
    assert "--value-tokenizer VALUE/tokenizer" in said  # a value folder is not a tokenizer's


@pytest.mark.slow
def test_real_tokenizers_from_the_shell(
    llama2_tokenizer_dir, gpt2_tokenizer_dir, gsm8k_dir, tmp_path, project_root
) -> None:
    text = tmp_path / "texts.jsonl"
    with (gsm8k_dir / "test.jsonl").open() as rows:
        text.write_text("".join(row for row, _ in zip(rows, range(50), strict=False)))
    output = tmp_path / "map.safetensors"
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-m", "ivl_jax.vocabulary", "build"),
            *("--base-tokenizer", llama2_tokenizer_dir, "--value-tokenizer", gpt2_tokenizer_dir),
            *("--text", text, "--output", output, "--method", "bytes"),
        ],
        cwd=project_root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "32,000 ids" in done.stdout
    assert output.stat().st_size < 1_000_000
    vocabulary_map, metadata = load_vocabulary_map(output)
    assert metadata.text_coverage > 0.99
    assert vocabulary_map.value_index[2] == 50256
