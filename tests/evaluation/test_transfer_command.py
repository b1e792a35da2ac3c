"""`python -m ivl_jax.evaluation transfer`: what it writes, and what it refuses before any work."""

import json

import pytest
from matplotlib.image import imread

from ivl_jax.config import ConfigError
from ivl_jax.evaluation import calibration, likelihood, transfer
from ivl_jax.evaluation.__main__ import main


def _refuse_to_load(monkeypatch):
    def fail(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("ivl_jax.composed.sources.ModelSource.load", fail)


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _pair(question, answer):
    return {"prompt": question, "completion": answer}


def test_the_command_writes_report_and_figure(stories260k_dir, value_folder, tmp_path, capsys):
    source = tmp_path / "few.jsonl"
    rows = [{"question": f"Who was it, {n}?", "answer": f"It was Lily {n}."} for n in range(6)]
    rows += [rows[0], {"question": "Long?", "answer": "It was " * 60}, {"question": "Why?"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, figure = tmp_path / "new" / "report.json", tmp_path / "new" / "report.png"
    flags = [
        *("transfer", "--base", str(stories260k_dir), "--data", str(source)),
        *("--value", str(value_folder), "--value", str(value_folder)),
        *("--strength", "0.3", "--strength", "-0.1", "--format", "fields"),
        *("--user-template", "{question}", "--assistant-template", "{answer}"),
        *("--output", str(output), "--plot", str(figure), "--data-dir", str(tmp_path / "stored")),
        *("--calibrate", "--max-length", "40", "--max-malformed-fraction", "0.2"),
    ]
    assert main(flags) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "this base" in shown
    assert "--strength" in shown
    assert "value networks" in shown
    assert "Calibration: --strength" in shown
    assert (
        "Rows: 1 that repeat an earlier dialogue; 1 malformed, left out; 1 longer than the limit."
        in shown
    )
    report = json.loads(output.read_text())
    counts = ("dialogues", "repeated", "malformed", "dropped", "cut")
    assert [report[name] for name in counts] == [8, 1, 1, 0, 1]
    settings = ("benchmark", "format", "limit", "max_length", "data")
    assert [report[name] for name in settings] == ["transfer", "fields", 50, 40, [str(source)]]
    assert report["row_names"] == [f"few.jsonl:{line}" for line in (1, 2, 3, 4, 5, 6, 8)]
    assert len(report["row_gains"]) == report["overall"]["rows"] == 7
    assert report["model"]["strength"] == [0.3, -0.1]
    assert report["overall"]["interval"][0] <= report["overall"]["interval"][1]
    assert report["by_entropy"][-1]["to"] is None
    assert report["calibration"]["given_nll"] > 0
    assert len(report["calibration"]["strengths"]) == 2
    assert imread(figure).std() > 0.01


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--value", "none"), ["--value none is the base alone", "--data is missing"]),
        (("--value", "x", "--strength", "0", "--data", "d"), ["--strength is 0 for every value"]),
        (("--value", "x", "--data", "d", "--plot", "gs://b/p.png"), ["--plot"]),
        (("--value", "x", "--data", "d", "--plot", "figure.pdf"), ["--plot figure.pdf must end"]),
        (("--value", "x", "--data", "d", "--plot", "figure"), ["--plot figure must end with .png"]),
        (
            ("--value", "x", "--data", "d", "--calibrate", "--strength-policy", "entropy"),
            ["--calibrate fits constant strengths, which --strength-policy entropy varies"],
        ),
    ],
)
def test_flags_that_cannot_tell_anything_are_refused(stories260k_dir, capsys, flags, said):
    assert main(["transfer", "--base", str(stories260k_dir), *flags]) == 2
    messages = capsys.readouterr().err
    for part in said:
        assert part in messages


@pytest.mark.parametrize("flags", [transfer.Flags, likelihood.Flags])
@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"batch_size": 0}, "--batch-size must be ≥ 1, got 0"),
        ({"batch_size": -1, "limit": -1}, "--batch-size must be ≥ 1, got -1; --limit must be ≥ 0"),
        ({"max_length": 0}, "--max-length must be ≥ 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused_in_the_flags(flags, numbers, said):
    with pytest.raises(ConfigError, match=said):
        flags(**numbers)


@pytest.fixture
def flags(stories260k_dir, value_folder, tmp_path):
    """Of a run over six rows, but for its outputs."""
    rows = [_pair(f"Who was it, {n}?", f"It was Lily {n}.") for n in range(6)]
    source = _write(tmp_path / "few.jsonl", rows)
    return [
        *("transfer", "--base", str(stories260k_dir), "--value", str(value_folder)),
        *("--data", str(source), "--format", "prompt_completion"),
        *("--data-dir", str(tmp_path / "stored")),
    ]


@pytest.mark.parametrize("name", ["transfer", "likelihood"])
def test_a_report_that_would_overwrite_the_demonstrations_is_refused(
    flags, tmp_path, monkeypatch, capsys, name
):
    _refuse_to_load(monkeypatch)
    source = tmp_path / "few.jsonl"
    before = source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    for output in (source, tmp_path / "link.jsonl", tmp_path / "stored" / ".." / "few.jsonl"):
        assert main([name, *flags[1:], "--output", str(output)]) == 2
        assert "is, or is inside, what --data reads" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_the_report_is_written_before_the_calibration(flags, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ArithmeticError("no fit")

    monkeypatch.setattr(calibration, "calibration_report", fail)
    output = tmp_path / "report.json"
    assert main([*flags, "--output", str(output), "--calibrate"]) == 1
    report = json.loads(output.read_text())
    assert report["overall"]["rows"] == 6
    assert "calibration" not in report


def test_one_dialogue_in_copies_cannot_be_calibrated(flags, tmp_path, monkeypatch, capsys):
    _refuse_to_load(monkeypatch)
    _write(tmp_path / "few.jsonl", [_pair("Who?", "Lily.")] * 3)
    assert main([*flags, "--calibrate"]) == 2
    assert "expected at least 2 different dialogues, got 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], ["--data: ", "few.jsonl has no rows"]),
        (
            [{"question": "Who?", "answer": "Lily."}] * 8,
            [
                "--data: 8 of 8 rows are malformed",
                "few.jsonl:1: no field 'prompt'; the row has 'question', 'answer' (and 7 more",
                "--format prompt_completion",
                "--user-template and --assistant-template",
                "raise --max-malformed-fraction",
            ],
        ),
        ([_pair("Who? " * 99, "Lily.")], ["raise --max-malformed-fraction or --max-length"]),
    ],
    ids=["empty", "other fields", "too long"],
)
def test_errors_in_rows_speak_of_the_flags(flags, tmp_path, monkeypatch, capsys, rows, said):
    _refuse_to_load(monkeypatch)
    _write(tmp_path / "few.jsonl", rows)
    assert main([*flags, "--max-length", "64"]) == 2
    messages = capsys.readouterr().err
    for part in said:
        assert part in messages
    assert "data." not in messages.replace("few.jsonl", "")
    assert "train" not in messages


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("transfer", "the same command starts anew"),
        ("likelihood", "the same command starts anew"),
        ("gsm8k", "the same command resumes"),
    ],
)
def test_what_a_stop_leaves_is_said_of_each_evaluation(monkeypatch, capsys, name, said):
    def stop(flags):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"ivl_jax.evaluation.{name}.run", stop)
    assert main([name]) == 130
    assert capsys.readouterr().err.strip().endswith(f"stopped; {said}")
