"""infer.py --input and --output: lines written as they end, resumed, shared by processes."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.fast_compilation import FAST_COMPILATION


def test_each_line_of_a_file_may_have_its_own_strengths(infer, base_flags, tmp_path):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    strengths = [[0.3], None, [0.0], [-3.0]]
    lines = [{"prompt": "Once", **({"strengths": own} if own else {})} for own in strengths]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = (*base_flags, "--max-new-tokens", 12, "--input", source, "--output", output)
    assert infer(*flags)[0] == 0
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert texts[0] == texts[1]  # the command's own strength is 0.3
    assert texts[3] not in texts[:3]


def test_a_file_of_prompts_resumes_where_a_killed_run_stopped(
    infer, base_flags, tmp_path, monkeypatch
):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    records = [{"prompt": "Once " * (1 + i % 3), "id": i} for i in range(5)]
    records.append({"messages": [{"role": "user", "content": "Hi"}], "id": 5})
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = [
        *(*base_flags, "--input", source, "--output", output, "--max-new-tokens", 12),
        *("--temperature", 0.8, "--seed", 3, "--batch-size", 2),
    ]
    assert infer(*flags)[0] == 0
    whole = output.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in rows] == list(range(6))
    assert {row["finish_reason"] for row in rows} <= {"length", "eos"}
    assert rows[0]["generated_tokens"] == 12
    assert rows[1]["prompt_tokens"] > rows[0]["prompt_tokens"]

    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"prompt": "On')
    status, _, messages = infer(*flags)
    assert status == 0
    assert output.read_bytes() == whole
    assert "half-written last line" in messages
    assert "3 of 6 prompts are done" in messages

    with monkeypatch.context() as patched:
        patched.setattr("ivl_jax.composed.sources.ModelSource.load", None)  # nothing is left
        status, _, messages = infer(*flags)
    assert status == 0
    assert "all 6 prompts are done already" in messages
    assert output.read_bytes() == whole

    status, _, messages = infer(*flags, "--temperature", 0.9)
    assert status == 2
    assert "temperature: 0.8 there, 0.9 now" in messages
    assert output.read_bytes() == whole


def test_lines_are_written_as_they_are_done_and_an_interrupt_loses_none(
    infer, base_flags, tmp_path, monkeypatch
):
    from ivl_jax.decoding.engine import Engine

    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Once"}\n' * 5)
    seen = []
    step = Engine.step

    def watched(self, **named):
        seen.append(len(output.read_bytes().splitlines()))
        if seen[-1] == 4:
            raise KeyboardInterrupt
        return step(self, **named)

    monkeypatch.setattr(Engine, "step", watched)
    flags = ("--input", source, "--output", output, "--batch-size", 2, "--max-new-tokens", 12)
    assert infer(*base_flags, *flags)[0] == 130
    assert list(dict.fromkeys(seen)) == [0, 2, 4]
    monkeypatch.setattr(Engine, "step", step)
    assert infer(*base_flags, *flags)[0] == 0
    lines = output.read_bytes().splitlines()
    assert len(lines) == 5
    assert len(set(lines)) == 1


@pytest.mark.slow
def test_two_processes_that_decode_together_write_every_line_once(
    infer, stories260k_dir, project_root, tmp_path
):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Once {i}"}) + "\n" for i in range(5)))
    flags = ["--base", stories260k_dir, "--value", "none", "--input", source, "--batch-size", 2]
    flags = [*map(str, flags), "--max-new-tokens", "12", "--output"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    cluster["XLA_FLAGS"] = FAST_COMPILATION
    processes = [
        subprocess.Popen(
            [sys.executable, "infer.py", *flags, str(output), "--distributed"],
            cwd=project_root,
            env=os.environ | cluster | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "5/5" in said[0]
    assert "5/5" not in said[1]
    assert infer(*flags, tmp_path / "alone.jsonl")[0] == 0
    assert output.read_text() == (tmp_path / "alone.jsonl").read_text()


@pytest.fixture
def failing(monkeypatch):
    """The second of all prompts, or the only one, ends with an error; nothing is computed."""
    from ivl_jax.decoding.generation import Generation
    from ivl_jax.decoding.model import ComposedModel

    def generate_prepared(self, prompts, **_):
        for index, prompt in enumerate(prompts):
            error = "not finite" if index == 1 else None
            reason = "error" if error else "eos"
            yield Generation(f"text {index}", (5,), reason, len(prompt.token_ids), error)

    def stream_prepared(self, prompt, **_):
        yield "begun"
        yield Generation("begun", (5,), "error", len(prompt.token_ids), "not finite")

    monkeypatch.setattr(ComposedModel, "generate_prepared", generate_prepared)
    monkeypatch.setattr(ComposedModel, "stream_prepared", stream_prepared)


def test_a_prompt_that_ended_with_an_error_says_so_in_its_line_and_in_the_status(
    infer, failing, base_flags, tmp_path
):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    # A field of that name in the row is the row's own where nothing went wrong.
    rows = [{"prompt": "One", "error": "mine"}, {"prompt": "Two", "error": "mine"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (*base_flags, "--input", source, "--output", output)
    status, _, messages = infer(*flags)
    assert status == 1
    assert "1 of 2 prompts ended with an error: see the field `error`" in messages
    assert f"of their lines in {output}" in messages
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["error"] for line in lines] == ["mine", "not finite"]
    assert [line["finish_reason"] for line in lines] == ["eos", "error"]
    # The same command finds both lines done.
    assert infer(*flags)[0] == 0


def test_one_prompt_that_ended_with_an_error_shows_its_text_and_then_the_error(
    infer, failing, base_flags
):
    status, shown, messages = infer(*base_flags, "--prompt", "Once")
    assert (status, shown) == (1, "begun\n")
    assert "infer.py: not finite" in messages
