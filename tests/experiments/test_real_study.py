"""The whole study of a real model, with a tiny one in its place."""

import json
from pathlib import Path

import pytest

from ivl_jax.experiments.family.docstrings import DocstringPair
from ivl_jax.experiments.family.facts import Split
from ivl_jax.experiments.real import items as real_items
from ivl_jax.experiments.real.lab import RealLaboratory
from ivl_jax.experiments.real.measure import Measurements
from ivl_jax.experiments.real.settings import Budget
from ivl_jax.experiments.real.study import main, tuned, write_report
from ivl_jax.experiments.real.subjects import SUBJECTS
from tests.experiments.test_real_items import write_gsm8k
from tests.training.conftest import save_tiny_model

NUMBERS: dict[Split, range] = {
    "train": range(12),
    "validation": range(20, 22),
    "test": range(30, 33),
}
PAIRS = [
    DocstringPair(f"What does `f{i}` do?", f"It counts to {i}.", f"m{i}", split)
    for split, numbers in NUMBERS.items()
    for i in numbers
]
SMALL = "--dialogues 6 --text-tokens 6 --gsm8k-questions 8 --docstring-questions 8 --held-out 2"
SMALL += " --answered 2 --answer-tokens 4 --length 64 --rows 2 --first-layers 1 --last-layers 1"
SMALL += " --healing-tokens 256 --value-tokens 256 --tuning-tokens 256 --rank 2"


def test_the_published_best_steps_of_another_machine_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_items, "docstring_pairs", lambda: PAIRS)
    target = save_tiny_model(
        tmp_path / "target", seed=1, num_hidden_layers=3, max_position_embeddings=256
    )
    gsm8k = write_gsm8k(tmp_path / "gsm8k", train=40, test=4)
    budget = Budget(first_layers=1, last_layers=1, length=64, rows=2)
    items = real_items.real_items(gsm8k, budget)
    here = RealLaboratory(tmp_path / "work", target, items, budget)
    file = here.output("target_full").with_name("fit.json")
    file.parent.mkdir(parents=True)
    curve = [{"step": step, "nll": nll} for step, nll in ((10, 2.5), (20, 2.0), (30, 2.25))]
    file.write_text(json.dumps({"curve": curve}))
    own = {"best": 20, "steps": 30, "nll": 2.0, "sha256": here.key("target_full")}
    assert tuned(here, {}) == {"target_full": own}
    published = {
        stage: {"best": 1, "steps": 2, "nll": 9.0, "sha256": here.key(stage)}
        for stage in ("target_lora", "target_full")
    }
    published["donor_tuned"] = published["target_lora"]  # of other settings
    assert tuned(here, published) == {
        "target_lora": published["target_lora"],
        "target_full": own,
    }
    # Another machine that has only the published record writes the same one again.
    there = RealLaboratory(tmp_path / "there", target, items, budget)
    docs = tmp_path / "docs"
    docs.mkdir()
    measured = Measurements(there, tmp_path / "there" / "measured")
    figures = measured._about("target") | {"nll": {}, "questions": {}}
    measured._file("target").parent.mkdir(parents=True)
    measured._file("target").write_text(json.dumps(figures))
    (docs / "real.json").write_text(json.dumps({"measured": {}, "tuned": {"target_full": own}}))
    write_report(there, measured, docs)
    record = json.loads((docs / "real.json").read_text())
    assert record["tuned"] == {"target_full": own}
    assert set(record["measured"]) == {"target"}


@pytest.mark.slow
def test_every_stage_is_made_and_measured_and_a_second_run_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_items, "docstring_pairs", lambda: PAIRS)
    gsm8k = write_gsm8k(tmp_path / "gsm8k", train=40, test=4)
    target = save_tiny_model(
        tmp_path / "target", seed=1, num_hidden_layers=3, max_position_embeddings=256
    )
    work, docs = tmp_path / "work", tmp_path / "docs"
    arguments = [
        *("--model", str(target), "--gsm8k", str(gsm8k), *SMALL.split()),
        *("--work-dir", str(work), "--docs", str(docs)),
    ]
    assert main(arguments) == 0
    record = json.loads((docs / "real.json").read_text())
    assert set(record["measured"]) == set(SUBJECTS)
    assert record["missing"] == []
    assert record["models"]["donor"]["layers"] == 2
    assert set(record["tuned"]) == {"donor_tuned", "target_lora", "target_full"}
    nll = {name: one["nll"]["docstring"] for name, one in record["measured"].items()}
    assert len(set(nll.values())) == len(nll), "no two subjects are the same model"
    assert "## A real model" in (docs / "experiments.md").read_text()

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is made or measured again")

    page, exports = (docs / "experiments.md").read_text(), tmp_path / "exports"
    with monkeypatch.context() as patched:
        patched.setattr(RealLaboratory, "_fine_tune", refuse)
        patched.setattr(RealLaboratory, "_placed", refuse)
        patched.setattr(Measurements, "_model", refuse)
        assert main([*arguments, "--export", str(exports)]) == 0
    assert (docs / "experiments.md").read_text() == page
    assert sum(file.stat().st_size for file in exports.iterdir()) < 20e6

    trained = (work / "measured" / "target_lora.json").read_text()
    others = ["--docs", str(tmp_path / "others"), "--from-exports", str(exports), "--stages"]
    with monkeypatch.context() as patched:
        patched.setattr(RealLaboratory, "_fine_tune", refuse)
        patched.setattr(RealLaboratory, "_placed", refuse)
        assert main([*arguments, *others, "sibling", "value", "target_lora", "measure"]) == 0
    made = {path.name.partition("-")[0] for path in (work / "made_from_exports").iterdir()}
    assert {"sibling", "healing", "value", "target_lora"} <= made
    assert (work / "measured" / "target_lora.json").read_text() == trained
    restored = json.loads((tmp_path / "others" / "real.json").read_text())["measured"]
    assert {"donor", "donor_value", "target_value", "target_lora"} <= set(restored)
    for name, figures in restored.items():
        expected = record["measured"][name]["nll"]
        assert figures["nll"] == pytest.approx(expected, abs=2e-3), name
