import json

import pytest

from ivl_jax.evaluation.__main__ import main
from ivl_jax.rewards import is_right_number, last_number, reference_number

ITEMS = [
    {"question": " Lily has 2 cats. Tom has 3. How many? ", "answer": "2 + 3 = 5\n#### 5"},
    {"question": "What is 5 * 400?", "answer": "It is 2,000\n#### 2,000"},
    {"question": "And 0 - 10?", "answer": "#### -10"},
]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", "7"),
        ("it costs $1,234,567 in all", "1234567"),
        ("half of 3 is 1.5", "1.5"),
        ("a list: 1, 2, 3", "3"),
        ("it fell to -.5", "-.5"),
        ("below zero: -12", "12"),  # whole numbers lose their sign, as at the authors'
        ("no idea", None),
        ("", None),
    ],
)
def test_the_last_number_counts(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("2 + 3 is 5", "#### 5", True),
        ("5 or 6", "#### 5", False),
        ("2,000 apples", "5 * 400 = 2,000 #### 2,000", True),
        ("it is -10", "#### -10", True),
        ("18.00", "#### 18", False),
        ("none", "#### 0", False),
    ],
)
def test_an_answer_is_right_as_the_authors_count(text, answer, right):
    assert is_right_number(text, answer) is right


def test_the_references_of_all_test_items_are_numbers(gsm8k_dir):
    with (gsm8k_dir / "test.jsonl").open(encoding="utf-8") as lines:
        numbers = [reference_number(json.loads(line)["answer"]) for line in lines]
    assert len(numbers) == 1319
    assert all(float(number) for number in numbers)


@pytest.fixture
def run(stories260k_dir, value_folder, tmp_path, capsys):
    """Runs the command on ITEMS: (status, standard error); files are data.jsonl and out.jsonl."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))

    def command(*flags):
        status = main(
            [
                *("gsm8k", "--base", str(stories260k_dir), "--value", str(value_folder)),
                *("--strength", "0.3", "--data", str(data), "--max-new-tokens", "12"),
                *("--output", str(tmp_path / "out.jsonl"), "--batch-size", "2"),
                *("--mesh.tensor", "1", *flags),
            ]
        )
        return status, capsys.readouterr().err

    return command


def test_a_killed_run_resumes_and_its_summary_covers_all_items(run, tmp_path):
    assert run()[0] == 0
    output, summary = tmp_path / "out.jsonl", tmp_path / "out.json"
    whole, scored = output.read_bytes(), json.loads(summary.read_text())
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["question"] for row in rows] == [item["question"] for item in ITEMS]
    assert [row["right"] for row in rows] == [
        is_right_number(row["text"], row["answer"]) for row in rows
    ]
    assert (scored["items"], scored["right"]) == (3, sum(row["right"] for row in rows))
    assert scored["interval"][0] <= scored["accuracy"] <= scored["interval"][1]

    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"quest')
    summary.unlink()
    assert run()[0] == 0
    assert output.read_bytes() == whole
    assert json.loads(summary.read_text()) == scored
    status, messages = run("--max-new-tokens", "13")
    assert status == 2
    assert "max_new_tokens: 12 there, 13 now" in messages
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "<s> Question: {}\nAnswer:"),
        ("llama-2", "<s> [INST] {} [/INST] Answer:"),
        (None, "<s> {}\nAnswer:"),
    ],
)
def test_the_prompt_is_the_authors_and_begins_the_answer_once(
    run, read_prompts, base_alone, template, expected
):
    flags = ["--prompt", "text"] if template is None else ["--chat-template", template]
    assert run(*flags)[0] == 0
    first = read_prompts[0][0]
    text = base_alone.tokenizer.decode(first.token_ids)
    asked = "Answer the following question.\n\nQuestion: Lily has 2 cats. Tom has 3. How many?"
    assert text == expected.format(asked)
    assert first.options.max_new_tokens == 12
    assert first.options.temperature == 0
    assert set(first.options.stop) >= {"Question:", "Comment:"}


def test_items_without_a_reference_number_are_named_before_a_model_is_loaded(
    run, tmp_path, monkeypatch
):
    def fail(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("ivl_jax.composed.sources.ModelSource.load", fail)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "?", "answer": "five"}\n\n{"question": 3}\nnonsense\n')
    status, messages = run("--data", str(bad))
    assert status == 2
    assert f"{bad}:1: the answer has no number after `####`" in messages
    assert f"{bad}:3: no text `question`" in messages
    assert f"{bad}:4: not JSON" in messages
    (tmp_path / "empty.jsonl").touch()
    assert "is empty; expected" in run("--data", str(tmp_path / "empty.jsonl"))[1]
    assert "no file at" in run("--data", str(tmp_path / "absent.jsonl"))[1]
    assert "--output is missing: name a .jsonl file" in run("--output", "out.txt")[1]
