"""infer.py --prompt: the texts of a base, values, strengths, drafts and maps."""

import json
import os
import subprocess
import sys

import jax
import pytest

from tests.fast_compilation import FAST_COMPILATION


def test_the_base_alone_from_bos_prints_the_published_greedy_text(
    stories260k_dir, project_root, without_torch
):
    flags = ["--base", str(stories260k_dir), "--value", "none", "--prompt", ""]
    finished = subprocess.run(
        [sys.executable, "infer.py", *flags, "--max-new-tokens", "200"],
        capture_output=True,
        cwd=project_root,
        env={**os.environ, "XLA_FLAGS": FAST_COMPILATION, "PYTHONPATH": str(without_torch)},
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr.decode()
    expected = (stories260k_dir / "expected_greedy.txt").read_bytes()
    assert finished.stdout == expected + b"\n"
    said = finished.stderr.decode().splitlines()
    assert [line.split(" in ")[0].split(" (length)")[0] for line in said] == [
        f"INFO loaded {stories260k_dir}",
        "INFO compiling; programs are kept",
        "INFO 200 tokens",
    ]


def test_strength_zero_prints_the_bases_text_and_another_strength_another(infer, base_flags):
    flags = (*base_flags[:2], "--prompt", "Once", "--max-new-tokens", 20)
    status, alone, _ = infer(*flags, "--value", "none")
    assert status == 0
    assert infer(*flags, *base_flags[2:4], "--strength", 0)[1] == alone
    assert infer(*flags, *base_flags[2:4], "--strength", 1)[1] != alone


def test_a_language_model_counts_as_a_value_and_two_opposed_ones_cancel(
    infer, base_flags, stories260k_dir
):
    flags = (*base_flags, "--prompt", "Once", "--max-new-tokens", 20)
    _, expected, _ = infer(*flags)
    tuned = ("--value", stories260k_dir, "--strength", 1.5, "--value", stories260k_dir)
    assert infer(*flags, *tuned, "--strength", -1.5)[1] == expected
    assert infer(*flags, *tuned, "--strength", -4.5)[1] != expected


def test_a_draft_changes_no_text_and_its_acceptance_is_logged(infer, base_flags, stories260k_dir):
    flags = (*base_flags, "--prompt", "Once", "--max-new-tokens", 20)
    _, expected, messages = infer(*flags)
    assert "proposed" not in messages
    status, found, messages = infer(*flags, "--draft", stories260k_dir, "--draft-length", 3)
    assert (status, found) == (0, expected)
    # The draft is the base itself. After the first token: four rounds of 3 + 1, one of 2 + 1.
    assert "the draft: 14 of 14 proposed tokens accepted (100 %)" in messages


def test_a_value_with_another_tokenizer_decodes_through_its_map(infer, mapped_flags, tmp_path):
    flags = (*mapped_flags, "--max-new-tokens", 12)
    status, shown, _ = infer(*flags, "--prompt", "Once upon")
    assert status == 0
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Once upon"}\n')
    assert infer(*flags, "--input", source, "--output", output)[0] == 0
    assert json.loads(output.read_text())["text"] + "\n" == shown
    weak = infer(*flags, "--prompt", "Once upon", "--strength", 0)[1]
    assert weak not in ("\n", shown)
    settings = output.with_name(output.name + ".settings.json")
    assert len(json.loads(settings.read_text())["map_fingerprints"]) == 1


@pytest.mark.slow
def test_a_profile_holds_marked_steps_and_names_the_programs(infer, base_flags, tmp_path):
    flags = (*base_flags, "--max-new-tokens", 40, "--profile", tmp_path / "trace")
    status, text, messages = infer(*flags, "--prompt", "Once")
    assert status == 0
    assert text == infer(*flags[:-2], "--prompt", "Once")[1]
    (trace,) = (tmp_path / "trace").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for name in (b"decode", b"step_num", b"chunk_program"):
        assert name in content
    assert "trace of decode steps 3–7" in messages
    # Of a file the programs that refill rows too; a text that is too short says so.
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Once"}\n' * 6)
    flags = (*flags[:-1], tmp_path / "file", "--input", source, "--output", output)
    assert infer(*flags, "--batch-size", 2)[0] == 0
    (trace,) = (tmp_path / "file").rglob("*.xplane.pb")
    assert b"prefill_program" in trace.read_bytes()
    flags = (*base_flags, "--prompt", "Once", "--max-new-tokens", 4)
    assert "no trace in" in infer(*flags, "--profile", tmp_path / "none")[2]


def test_compiled_programs_are_kept_where_the_flag_says(infer, base_flags, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        status, _, _ = infer(*base_flags, "--prompt", "a", "--compilation-cache", tmp_path / "kept")
        assert status == 0
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "kept")
        infer(*base_flags, "--prompt", "a", "--compilation-cache", "none")
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
