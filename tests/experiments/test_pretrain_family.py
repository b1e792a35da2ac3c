"""Pre-training: resumed equals uninterrupted, and the folder loads as a model."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.config import ConfigError
from ivl_jax.decoding.compose import compose
from ivl_jax.experiments import pretrain_family
from ivl_jax.experiments.family import continued
from ivl_jax.experiments.family.corpus import Corpus, SourceFile, Windows
from ivl_jax.experiments.family.facts import build_facts
from ivl_jax.experiments.family.pretraining import Probe, _check_resumes
from ivl_jax.experiments.family.recall import recalled
from ivl_jax.experiments.pretrain_family import Options, make_model
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.assembly import abstract_params
from ivl_jax.model.decoder import build_decoder
from ivl_jax.weights.fingerprint import weights_fingerprint
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


def _stop(corpus: Corpus, options: Options) -> None:
    """An interruption before the fourth step; the checkpoint of the second one is left."""
    draw = Windows.batch

    def stop_before_the_fourth_step(self: Windows, step: int, *, rows: int):
        if step == 3:
            raise KeyboardInterrupt
        return draw(self, step, rows=rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Windows, "batch", stop_before_the_fourth_step)
        with pytest.raises(KeyboardInterrupt):
            make_model("S", corpus, options)


@pytest.mark.slow
def test_a_resumed_run_writes_the_bytes_of_one_that_never_stopped(
    corpus: Corpus, tmp_path: Path
) -> None:
    whole = make_model("S", corpus, _options(tmp_path / "whole"))
    assert whole["steps"] >= 4
    _stop(corpus, _options(tmp_path / "twice"))
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
    assert not (options.work_dir / "S").exists(), "a finished run leaves no checkpoints"


def test_checkpoints_of_another_run_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    options = _options(tmp_path)
    _stop(corpus, options)
    other_text = corpus._replace(sources=corpus.sources[1:])
    checkpoints = options.work_dir / "S"
    for text, changed, named in (
        (corpus, {"epochs": 0.5}, r"schedule\.epochs: 1\.0 there, 0\.5 now"),
        (corpus, {"seed": 1}, "seed: 0 there, 1 now"),
        (other_text, {}, f"corpus_sha256: {corpus.fingerprint} there, {other_text.fingerprint}"),
    ):
        with pytest.raises(ConfigError, match=f"S: {checkpoints} .*another run") as raised:
            make_model("S", text, dataclasses.replace(options, **changed))
        assert re.search(named, str(raised.value))
    with pytest.raises(ConfigError, match=r"an earlier version wrote them\. Delete the folder"):
        _check_resumes("S", tmp_path, {"seconds": 1.0}, {"seed": 0})
    assert not (tmp_path / "family" / "S").exists()
    make_model("S", corpus, options)


def test_a_finished_model_is_kept_and_another_run_replaces_it(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(_options(tmp_path), epochs=0.3)
    manifest = make_model("S", corpus, options)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_family, "pretrain", None)  # not called
        assert make_model("S", corpus, options) == manifest
    longer = make_model("S", corpus, dataclasses.replace(options, epochs=0.5))
    assert longer["steps"] > manifest["steps"]


def test_held_out_figures_count_recall_as_recall_does(corpus: Corpus) -> None:
    model = load_language_model(str(family_folder("S")))
    asked = corpus._replace(facts=tuple(build_facts()[:32]))
    params = jax.tree.map(lambda leaf: leaf.astype("float32"), model.params)
    known = Probe(build_decoder(model.arch), asked, model.tokenizer)(params)["facts_known"]
    assert 0 < known < 1
    assert known == recalled(compose(model), asked.facts, rows=32).mean()


def _continued(work_dir: Path, manifest: dict | None) -> Path:
    folder = work_dir / "S-continued"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_a_continued_model_is_kept_only_if_it_is_todays(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continued, "continued_corpus", lambda: corpus)
    monkeypatch.setattr(continued, "pretrain", None)  # nothing is trained
    schedule = continued.SCHEDULES["S"]._asdict()
    # Of an earlier version, whose manifests name neither the seed nor the start.
    earlier = {"schedule": schedule, "corpus_sha256": corpus.fingerprint, "steps": 7}
    folder = _continued(tmp_path, earlier)
    assert continued.continue_pretraining("S", work_dir=tmp_path) == folder
    for changed, named in (
        ({"schedule": schedule | {"epochs": 3.0}}, "schedule.epochs: 3.0 there, 1.5 now"),
        ({"corpus_sha256": "other"}, f"corpus_sha256: other there, {corpus.fingerprint} now"),
        ({"start": "other weights"}, "start: other weights there, "),
    ):
        _continued(tmp_path, earlier | changed)
        with pytest.raises(ConfigError, match="S-continued") as raised:
            continued.continue_pretraining("S", work_dir=tmp_path)
        assert named in str(raised.value)
        assert str(folder) in str(raised.value)


def test_a_continued_model_is_made_once_and_tells_what_it_is(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continued, "continued_corpus", lambda: corpus)
    short = continued.SCHEDULES["S"]._replace(epochs=0.5, rows=4)
    monkeypatch.setitem(continued.SCHEDULES, "S", short)
    folder = continued.continue_pretraining("S", work_dir=tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["start"] == weights_fingerprint(family_folder("S"))
    assert manifest["schedule"] == short._asdict()
    assert [path.name for path in tmp_path.iterdir()] == ["S-continued"]
    monkeypatch.setattr(continued, "pretrain", None)
    assert continued.continue_pretraining("S", work_dir=tmp_path) == folder
