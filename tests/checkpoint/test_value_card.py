"""The card of a value folder says what is known about it, and is nothing that a load depends on."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ivl_jax.checkpoint import load_value, save_value
from ivl_jax.checkpoint.value_card import (
    TrainingFacts,
    read_training_facts,
    value_card,
    write_card,
)
from ivl_jax.decoding.prompt_files import folder_fingerprint

FIGURES = {"nll": 1.0, "base_nll": 4.0, "accuracy": 0.5, "base_accuracy": 0.25, "tokens": 443.0}
FACTS = TrainingFacts("sft", ("rows.jsonl", "tfds:some"), FIGURES)


def test_the_card_names_base_data_scheme_objective_and_figures(metadata) -> None:
    text = value_card(metadata, FACTS)
    for row in (
        "| trained with the base | `some/base` |",
        "| connection scheme | `residual` |",
        "| objective | `sft` |",
        "| training data | `rows.jsonl`, `tfds:some` |",
        "| optimizer steps | 12 |",
        "| penalty on z_value | kind `l1`, weight `1.0`, positions `real` |",
        "| NLL | 4 | 1 |",
        "| accuracy | 0.25 | 0.5 |",
        "| tokens | 443 |",
        "Ratio of the two NLLs: 0.250.",
        "ivl-infer --base some/base --value VALUE",
    ):
        assert row in text, row


def test_the_card_of_an_adapter_names_its_model(metadata) -> None:
    model = {"name": "some/small", "revision": None, "fingerprint": "abc"}
    adapter = {"rank": 8, "alpha": 16.0, "targets": "attention", "model": model}
    text = value_card(dataclasses.replace(metadata, adapter=adapter))
    assert "| low-rank adapter of | `some/small`, rank 8; not included |" in text
    assert "is read from `some/small`, or from the folder that `--value-model` names" in text
    assert "low-rank" not in value_card(metadata)


@pytest.mark.parametrize(
    ("connection", "bases", "maps", "drafts"),
    [
        ("residual", "Any base with the same tokenizer works, larger ones too", True, True),
        ("cascade", "Any base with the same tokenizer works, larger ones too", False, False),
        ("cascade_no_text", "It reads the base's logits.", False, False),
        ("linear", "It reads the base's logits.", False, False),
        ("hidden", "the same tokenizer and hidden states of width 48 works", False, False),
        ("mine:scheme", "it needs the module that defines it", False, True),
    ],
)
def test_the_card_says_which_bases_fit_the_scheme(metadata, connection, bases, maps, drafts):
    architecture = metadata.architecture | {"base_hidden_size": 48 * (connection == "hidden")}
    text = value_card(
        dataclasses.replace(metadata, connection=connection, architecture=architecture)
    )
    assert bases in text
    assert ("ivl_jax.vocabulary build" in text) == maps
    assert ("nothing can draft" not in text) == drafts
    assert ("--connection mine:scheme" in text) == (connection == "mine:scheme")


def test_the_front_matter_is_the_hubs_with_the_licence_left_to_the_user(metadata) -> None:
    card = ModelCard(value_card(metadata, FACTS))
    assert card.data.to_dict() == {
        "library_name": "ivl_jax",
        "base_model": ["some/base"],
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["ivl_jax", "value-network", "inverse-value-learning", "residual"],
    }
    filled = value_card(metadata).replace("# license: name one", "license: mit  # name one", 1)
    assert ModelCard(filled).data.license == "mit"


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("some/base and other/base", ["some/base", "other/base"]),
        ("/models/llama", None),
        ("gs://bucket/llama", None),
        ("llama", None),
        ("", None),
    ],
)
def test_only_bases_on_the_hub_are_linked(metadata, name: str, listed) -> None:
    named = dataclasses.replace(metadata, training_base={"name": name, "fingerprint": ""})
    assert ModelCard(value_card(named)).data.base_model == listed


def test_a_local_folder_that_looks_like_a_hub_id_is_not_linked(
    metadata, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "some" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelCard(value_card(metadata)).data.base_model is None


def test_names_cannot_break_the_table_or_the_front_matter(metadata) -> None:
    odd = "a|b`c\n---\nlicense: mit"
    named = dataclasses.replace(
        metadata, connection="mine:a\n---", training_base={"name": odd}, chat_template=odd
    )
    text = value_card(named, TrainingFacts(odd, (odd,)))
    card = ModelCard(text)
    assert card.data.license is None
    assert card.data.tags[-1] == "mine:a\n---"
    assert "`a\\|bc --- license: mit`" in card.text


def test_a_lost_or_edited_card_changes_nothing_on_load(
    tmp_path: Path, params, metadata, tokenizer, caplog
) -> None:
    folder = tmp_path / "value"
    save_value(folder, params=params, metadata=metadata, tokenizer=tokenizer)
    assert "`some/base`" in (folder / "README.md").read_text()
    write_card(folder, metadata, FACTS)
    assert "rows.jsonl" in (folder / "README.md").read_text()
    before = folder_fingerprint(folder)
    with caplog.at_level(logging.WARNING):
        load_value(folder)
        (folder / "README.md").write_text("mine")
        (folder / ".gitattributes").write_text("of the hub")
        load_value(folder)
        assert folder_fingerprint(folder) == before, "a decoded file may be resumed"
        (folder / "README.md").unlink()
        load_value(folder)
    assert not caplog.messages
    (folder / "ivl.json").write_text("{}")
    assert folder_fingerprint(folder) != before


def test_the_figures_are_those_of_the_exported_step(tmp_path: Path, caplog) -> None:
    (tmp_path / "config.toml").write_text('objective = "dpo"\n[data]\ntrain = ["pairs.jsonl"]\n')
    records = [{"step": step, "held_out": {"nll": float(step)}} for step in (0, 10, 20)]
    lines = [json.dumps(record) for record in [*records, {"step": 10, "loss": 1.0}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 10, "hel')
    facts = read_training_facts(tmp_path, 10)
    assert facts == TrainingFacts("dpo", ("pairs.jsonl",), {"nll": 10.0})
    assert read_training_facts(tmp_path, 11) == TrainingFacts("dpo", ("pairs.jsonl",), {})
    (tmp_path / "config.toml").write_text("objective = 3")
    assert read_training_facts(tmp_path, 10) is None
    assert "objective" in caplog.text
