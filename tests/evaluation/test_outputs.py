"""Files that must not or cannot be written are named before any work."""

import os

import pytest

from ivl_jax.evaluation.outputs import make_folders, output_problems


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.jsonl").write_text("{}\n")
    (tmp_path / "value").mkdir()
    os.link(tmp_path / "few.jsonl", tmp_path / "same.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ({"--output": "./few.jsonl"}, "--output ./few.jsonl is, or is inside, what --data reads"),
        ({"--output": "same.jsonl"}, "--output same.jsonl is, or is inside, what --data reads"),
        ({"--plot": "value/a.png"}, "--plot value/a.png is, or is inside, what --value reads"),
        ({"--output": "a", "--plot": "x/../a"}, "--output and --plot are the same file"),
        ({"--output": "value"}, "--output value is a folder"),
        ({"--output": "/dev/null"}, "--output /dev/null is not a regular file"),
        ({"--output": "gs://b/o.json"}, "--output gs://b/o.json must be a local path"),
    ],
)
def test_what_must_not_be_written_is_named(folder, outputs, said):
    inputs = [("--data", "few.jsonl"), ("--data", "tfds:gsm8k"), ("--value", str(folder / "value"))]
    problems = output_problems(outputs, [*inputs, ("--base", "")])
    assert any(problem.startswith(said) for problem in problems), problems
    assert sorted(os.listdir(folder)) == ["few.jsonl", "same.jsonl", "value"]


def test_other_files_may_be_written_and_their_folders_are_made(folder):
    outputs = {"--output": "new/report.json", "--plot": "new/report.png", "--other": ""}
    (folder / "old.json").write_text("{}")
    assert output_problems({**outputs, "--old": "old.json"}, [("--data", "few.jsonl")]) == []
    assert make_folders(outputs) == []
    assert os.listdir(folder / "new") == []


def test_a_folder_that_cannot_be_written_is_named(folder):
    (problem,) = make_folders({"--output": "few.jsonl/report.json"})
    assert problem == "--output few.jsonl/report.json cannot be written: File exists"
    (problem,) = make_folders({"--output": "/proc/report.json"})
    assert problem.startswith("--output /proc/report.json cannot be written: ")
