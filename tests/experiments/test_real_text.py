"""Text that a model writes itself: kept line by line, sampled alike after an interruption."""

import json

import pytest

from ivl_jax.config import ConfigError
from ivl_jax.decoding.compose import compose
from ivl_jax.experiments.real.text import Writing, turn_beginning, write_dialogues
from ivl_jax.weights.language_model import load_language_model
from tests.training.conftest import save_tiny_model

WRITING = Writing(invented=3, max_new_tokens=5, temperature=1.0, batch_size=4)
QUESTIONS = ["2+2?", "Who?"]


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A tiny model that answers with random bytes."""
    folder = save_tiny_model(
        tmp_path_factory.mktemp("writer") / "model", seed=5, num_hidden_layers=1
    )
    return compose(load_language_model(folder))


def test_dialogues_are_of_given_and_of_invented_questions_and_resume(writer, tmp_path):
    file = write_dialogues(writer, QUESTIONS, tmp_path / "text", WRITING)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all([one["role"] for one in row["messages"]] == ["user", "assistant"] for row in rows)
    assert all(one["content"].strip() for row in rows for one in row["messages"])
    asked = [row["group"] for row in rows]
    assert [row["messages"][0]["content"] for row in rows] == asked
    invented = [question for question in asked if question not in QUESTIONS]
    assert len(set(invented)) == len(invented) > 0, "each is sampled anew"
    assert asked == [*invented, *(question for question in QUESTIONS if question in asked)]

    answers = tmp_path / "text" / "answers.jsonl"
    whole, before = answers.read_text(), file.read_text()
    answers.write_text("".join(whole.splitlines(keepends=True)[:2]) + '{"half')
    file.unlink()
    again = write_dialogues(writer, QUESTIONS, tmp_path / "text", WRITING)
    assert again.read_text() == before
    assert answers.read_text() == whole
    assert write_dialogues(writer, [], tmp_path / "text", WRITING) == file, "written once"


def test_an_invented_question_begins_where_the_template_begins_a_users_turn(writer):
    assert turn_beginning(writer) == "Question: "


def test_text_of_other_settings_is_not_continued(writer, tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"prompt": "Who?", "text": "x"}\n')
    (tmp_path / "answers.jsonl.settings.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"answers\.jsonl"):
        write_dialogues(writer, ["Who?"], tmp_path, WRITING._replace(invented=0))
