"""The models that ship with the package."""

import json

import pytest

from ivl_jax.assets import family_folder
from ivl_jax.weights.language_model import load_language_model

_SIZES = {"S": (0.6e6, 0.8e6), "L": (5.5e6, 7e6), "X": (1.5e6, 2.5e6)}
_SHIPPED = [name for name in _SIZES if family_folder(name).exists()]


def _manifest(name: str) -> dict:
    return json.loads((family_folder(name) / "manifest.json").read_text(encoding="utf-8"))


def test_the_demo_has_its_two_bases() -> None:
    assert {"S", "L"} <= set(_SHIPPED)


@pytest.mark.parametrize("name", _SHIPPED)
def test_a_shipped_model_loads_with_the_size_its_manifest_tells(name: str) -> None:
    model = load_language_model(str(family_folder(name)))
    low, high = _SIZES[name]
    assert low < _manifest(name)["parameters"] < high
    assert model.arch.num_attention_heads % 4 == model.arch.num_key_value_heads % 4 == 0
    assert model.tokenizer_info.vocab_size == model.arch.vocab_size
    assert model.stop_ids == (model.tokenizer.eos_token_id,)


def test_s_and_l_share_a_tokenizer() -> None:
    small, large = ((family_folder(name) / "tokenizer.json").read_bytes() for name in ("S", "L"))
    assert small == large


def test_l_is_the_better_base_and_knows_more_facts() -> None:
    small, large = _manifest("S"), _manifest("L")
    assert small["corpus_sha256"] == large["corpus_sha256"]
    assert large["held_out_nll"] < small["held_out_nll"]
    assert small["facts_known"] < 0.6 < 0.85 < large["facts_known"]


def test_the_family_stays_under_20_megabytes() -> None:
    files = [path for path in family_folder("S").parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6


def test_no_shipped_file_holds_a_sentence_of_the_standard_library() -> None:
    for name in _SHIPPED:
        for path in family_folder(name).glob("*.json"):
            assert "Return a string" not in path.read_text(encoding="utf-8")
