"""Pre-training: resumed equals uninterrupted, and the folder loads as a model."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest

from ivl_jax.experiments import pretrain_family
from ivl_jax.experiments.family.corpus import Corpus, SourceFile, Windows
from ivl_jax.experiments.family.facts import build_facts
from ivl_jax.experiments.pretrain_family import Options, make_model
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.assembly import abstract_params
from ivl_jax.weights.language_model import load_language_model

_TEXT = (
    '"""A module that counts."""\n\ndef count(things):\n    """Count."""\n    return len(things)\n'
)


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Corpus:
    tiny = pretrain_family.RECIPES["S"]._replace(
        entries=300, width=16, mlp_width=16, head_dim=4, epochs=1.0, rows=4
    )
    monkeypatch.setitem(pretrain_family.RECIPES, "S", tiny)
    sources = tuple(SourceFile(f"file{index}.py", _TEXT * 30) for index in range(10))
    return Corpus(sources, (SourceFile("held.py", _TEXT * 60),), tuple(build_facts(count=4)))


def test_xl_fits_value_networks_of_s_and_is_not_among_the_shipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = pretrain_family.RECIPES["XL"]
    arch = ArchConfig.from_hf(pretrain_family.architecture(recipe, bos=0, eos=0))
    leaves = jax.tree.leaves(abstract_params(arch))
    assert 30 < sum(math.prod(leaf.shape) for leaf in leaves) / 688_768 < 40
    tokenizer = pretrain_family.make_tokenizer("XL", Corpus((), (), ()), work_dir=tmp_path)
    assert len(tokenizer) == recipe.entries
    made: list[str] = []
    monkeypatch.setattr(pretrain_family, "load_corpus", lambda: None)
    monkeypatch.setattr(pretrain_family, "make_model", lambda name, *rest: made.append(name))
    assert pretrain_family.main([]) == 0
    assert made == ["S", "L", "X"]


def _options(folder: Path) -> Options:
    return Options(out=folder / "family", work_dir=folder / "work", checkpoint_every=2, log_every=1)


@pytest.mark.slow
def test_a_resumed_run_writes_the_bytes_of_one_that_never_stopped(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_model("S", corpus, _options(tmp_path / "whole"))
    assert whole["steps"] >= 4
    draw = Windows.batch

    def stop_before_the_fourth_step(self: Windows, step: int, *, rows: int):
        if step == 3:
            raise KeyboardInterrupt
        return draw(self, step, rows=rows)

    with monkeypatch.context() as patch:
        patch.setattr(Windows, "batch", stop_before_the_fourth_step)
        with pytest.raises(KeyboardInterrupt):
            make_model("S", corpus, _options(tmp_path / "twice"))
    make_model("S", corpus, _options(tmp_path / "twice"))
    first, second = (
        (tmp_path / name / "family" / "S" / "model.safetensors").read_bytes()
        for name in ("whole", "twice")
    )
    assert first == second


def test_the_folder_is_a_model_with_its_record(corpus: Corpus, tmp_path: Path) -> None:
    options = dataclasses.replace(_options(tmp_path), epochs=0.3)
    make_model("S", corpus, options)
    folder = options.out / "S"
    model = load_language_model(str(folder))
    assert model.arch.hidden_size == 16
    assert model.stop_ids == (model.tokenizer.eos_token_id,)
    record = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert record["corpus_sha256"] == corpus.fingerprint
    assert record["tokens_seen"] == record["steps"] * 4 * 256
    assert 0 <= record["facts_known"] <= 1
    assert record["held_out_nll"] > 0
