"""Dialogues are read for every network of a composition, and only those that were given."""

import json

import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.config import ComposedModelConfig, RowsConfig
from ivl_jax.data.formats import Demonstration, Message
from ivl_jax.data.tokenized import tokenize_demonstrations
from ivl_jax.decoding.compose import compose
from ivl_jax.evaluation.flags import ModelFlags
from ivl_jax.evaluation.held_out import cut_to_own_vocabularies, read_held_out, rows_of
from ivl_jax.evaluation.scoring import score_rows
from tests.decoding.anew import random_map
from tests.decoding.tiny import language_model

CONTEXT = 40


@pytest.fixture(scope="module")
def mapped(stories260k_dir):
    """A base with a value network of another vocabulary and a small context."""
    base = language_model(family_folder("S"), seed=0)
    value = language_model(stories260k_dir, seed=2, context=CONTEXT)
    return compose(base, value, maps=[random_map(base, value)])


def tokenized(model, *texts):
    demonstrations = [
        Demonstration((Message("user", question), Message("assistant", answer)), f"x.jsonl:{n}")
        for n, (question, answer) in enumerate(texts, 1)
    ]
    return tokenize_demonstrations(
        demonstrations, model.chat_format, sequence_length=200, cache_dir=None
    )


def test_a_dialogue_is_cut_to_what_a_value_with_its_own_vocabulary_can_read(mapped, caplog):
    given = tokenized(
        mapped, ("Hi", "Yes."), ("Who?", "unbelievable " * 20), ("Why? " * 20, "No."), ("A", "Ja.")
    )
    found = cut_to_own_vocabularies(given, mapped.prompts)
    assert found.rows.tolist() == [0, 1, 3]
    assert [found.row_id(index) for index in range(3)] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:4"]
    for new, old in ((0, 0), (2, 3)):
        assert found[new].tokens.tolist() == given[old].tokens.tolist()
    kept = len(found[1].tokens)
    assert found[1].tokens.tolist() == given[1].tokens[:kept].tolist()
    assert found[1].loss_mask.tolist() == given[1].loss_mask[:kept].tolist()
    assert (found.report.kept, found.report.cut, found.report.dropped) == (3, 2, 1)
    assert found.report.targets == sum(found[index].loss_mask[1:].sum() for index in range(3))
    assert "2 of 4 dialogues are longer than the context of" in caplog.text
    rows = rows_of(mapped, found)
    for index, scores in score_rows(mapped, rows, batch_size=4):
        assert np.isfinite(scores.tokens.log_prob[found[index].loss_mask[1:]]).all()
    # One more token is too many.
    longer = rows[1]._replace(token_ids=given[1].tokens[: kept + 1].tolist())
    with pytest.raises(ValueError, match=rf"^x.jsonl:2: .* more than the context of {CONTEXT}"):
        list(score_rows(mapped, [longer], batch_size=1))


def test_dialogues_that_are_all_too_long_are_refused(mapped):
    given = tokenized(mapped, ("Why? " * 20, "No."))
    with pytest.raises(ValueError, match="none of 1 dialogues has an assistant's token within"):
        cut_to_own_vocabularies(given, mapped.prompts)


def test_of_preferences_the_chosen_dialogues_are_read(stories260k_dir, tmp_path):
    pairs = [{"prompt": f"Who, {n}?", "chosen": f"Lily {n}.", "rejected": "No."} for n in range(3)]
    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    found = {}
    for row_format, rows in (("preference", pairs), ("prompt_completion", chosen)):
        source = tmp_path / f"{row_format}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[row_format] = read_held_out(
            ModelFlags(ComposedModelConfig(base=str(stories260k_dir))),
            (str(source),),
            rows=RowsConfig(format=row_format),
            max_length=64,
            limit=0,
            data_dir=str(tmp_path / "stored"),
            outputs={},
        ).dialogues
    preferred, expected = found.values()
    assert preferred.middles is None
    assert preferred.tokens.tolist() == expected.tokens.tolist()
    assert preferred.loss_mask.tolist() == expected.loss_mask.tolist()
