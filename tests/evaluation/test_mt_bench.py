import json

import pytest

from ivl_jax.evaluation.__main__ import main
from ivl_jax.evaluation.mt_bench import TEMPERATURES

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Tell me of Lily.", "And then?"]},
    {"question_id": 82, "category": "math", "turns": ["What is 2 + 3?"], "reference": ["5"]},
    {"question_id": 83, "category": "humanities", "turns": ["Who was Tom?", "And Sam?", "And?"]},
]


@pytest.fixture
def run(stories260k_dir, value_folder, tmp_path, capsys, read_prompts):
    """Runs the command on QUESTIONS: (status, messages); the answers are in out.jsonl."""
    questions = tmp_path / "question.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))

    def command(*flags):
        status = main(
            [
                *("mt-bench", "--base", str(stories260k_dir), "--value", str(value_folder)),
                *("--strength", "0.3", "--questions", str(questions), "--max-new-tokens", "12"),
                *("--output", str(tmp_path / "out.jsonl"), "--model-id", "mine"),
                *("--mesh.tensor", "1", "--batch-size", "2", *flags),
            ]
        )
        return status, capsys.readouterr().err

    return command


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_lines_that_fastchat_reads_and_a_killed_run_resumes(run, tmp_path):
    output = tmp_path / "out.jsonl"
    assert run()[0] == 0
    first = answers(output)
    assert [line["question_id"] for line in first] == [81, 82, 83]
    for line, question in zip(first, QUESTIONS, strict=True):
        assert line["model_id"] == "mine"
        (choice,) = line["choices"]
        assert choice["index"] == 0
        assert len(choice["turns"]) == len(question["turns"])
        assert all(isinstance(turn, str) for turn in choice["turns"])
    assert len({line["answer_id"] for line in first}) == 3

    output.write_text("".join(output.read_text().splitlines(keepends=True)[:1]))
    assert run()[0] == 0
    again = answers(output)
    assert again[0] == first[0]
    # Sampled answers depend on the question and the turn, not on who shares the batch.
    assert [line["choices"] for line in again] == [line["choices"] for line in first]
    assert "seed: 0 there, 1 now" in run("--seed", "1")[1]


def test_turns_see_the_answers_before_them_at_their_categorys_temperature(
    run, read_prompts, base_alone
):
    assert run("--batch-size", "3")[0] == 0
    assert [len(prompts) for prompts in read_prompts] == [3, 2, 1]
    temperatures = [prompt.options.temperature for prompt in read_prompts[0]]
    assert temperatures == [TEMPERATURES[q["category"]] for q in QUESTIONS] == [0.7, 0.0, 0.1]
    second = base_alone.tokenizer.decode(read_prompts[1][0].token_ids)
    assert "Tell me of Lily.\nAnswer: It is" in second
    assert second.endswith("Question: And then?\nAnswer:")
    assert len({prompt.sample_index for prompts in read_prompts for prompt in prompts}) == 6


def test_a_dialogue_that_outgrows_the_context_costs_one_answer_not_the_run(run, tmp_path):
    questions = tmp_path / "long.jsonl"
    turns = ["Hello.", "word " * 400, "Hello."]
    questions.write_text(json.dumps({"question_id": 1, "category": "math", "turns": turns}) + "\n")
    status, _ = run("--questions", str(questions))
    assert status == 0
    (line,) = answers(tmp_path / "out.jsonl")
    assert line["choices"][0]["turns"][1:] == ["ERROR", "ERROR"]
    assert line["choices"][0]["turns"][0] != "ERROR"


def test_questions_that_cannot_be_asked_are_named_first(run, tmp_path, read_prompts, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    row = {"question_id": 1, "category": "math", "turns": ["word " * 400]}
    bad.write_text((json.dumps(row) + "\n") * 2)
    with monkeypatch.context() as patched:
        patched.setattr("ivl_jax.composed.sources.ModelSource.load", None)  # not yet
        status, messages = run("--questions", str(bad))
    assert status == 2
    assert f"{bad}:1: " in messages
    assert f"{bad}:2: " in messages
    assert not (tmp_path / "out.jsonl").exists()
    assert "more than the context of 512 tokens" in messages
    bad.write_text('{"question_id": 1, "category": "math", "turns": []}\n{"turns": ["a"]}\n')
    messages = run("--questions", str(bad))[1]
    assert f"{bad}:1: `turns` must be a non-empty list" in messages
    assert f"{bad}:2: no `question_id`" in messages
    assert read_prompts == []
