"""infer.py refuses bad flags, files and prompts before a model is loaded."""

import json
import shutil
import subprocess
import sys
import types

import pytest


def test_a_map_of_other_tokenizers_is_refused_before_a_model_is_loaded(
    infer, mapped_flags, monkeypatch
):
    from ivl_jax.assets import family_folder

    monkeypatch.setattr("ivl_jax.composed.sources.ModelSource.load", lambda *_, **__: 1 / 0)
    other = ("--base", family_folder("X"), *mapped_flags[2:], "--prompt", "a")
    status, _, messages = infer(*other)
    assert status == 2
    assert "was built for base S and value stories260k, not for base" in messages
    assert f"--base-tokenizer {family_folder('X')}" in messages
    status, _, messages = infer(*mapped_flags[:4], "--map", "absent", "--prompt", "a")
    assert status == 2
    assert "no vocabulary map at absent; build one" in messages
    status, _, messages = infer(*mapped_flags, "--map", "none", "--prompt", "a")
    assert status == 2
    assert "--map is given 2 time(s)" in messages


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), ["--base is missing", "--value is missing", "nothing to decode"]),
        (("--base", "BASE", "--value", "none", "--prompt", "a", "--strength", "2"), ["--strength"]),
        (
            ("--base", "BASE", "--value", "none", "--prompt", "a", "--input", "b"),
            ["cannot be combined"],
        ),
        (
            ("--base", "BASE", "--value", "none", "--input", "absent.jsonl"),
            ["must be used together"],
        ),
        (
            ("--base", "BASE", "--value", "none", "--input", "absent.jsonl", "--output", "o"),
            ["--input: no file at absent.jsonl"],
        ),
        (("--base", "./absent", "--value", "none", "--prompt", "a"), ["./absent: no such folder"]),
        (
            ("--base", "BASE", "--value", "./absent", "--prompt", "a"),
            ["--value ./absent: neither a value folder nor a language model"],
        ),
        (("--base", "BASE", "--value", "tests", "--prompt", "a"), ["neither ivl.json"]),
        (
            ("--base", "BASE", "--value", "a", "--value", "b", "--strength", "1", "--prompt", "a"),
            ["2 value(s), but --strength is given 1 time(s)"],
        ),
        (
            ("--base", "BASE", "--value", "GPT2", "--prompt", "a"),
            ["GPT2 (50257 ids) differ", "--value-tokenizer GPT2 --text TEXT", "--map"],
        ),
        (
            ("--base", "BASE", "--value", "none", "--draft", "GPT2", "--prompt", "a"),
            [
                "the draft GPT2 (50257 ids, ",
                "does not have the tokenizer of the base BASE (512 ids, ",
            ],
        ),
        (
            ("--base", "BASE", "--value", "none", "--draft-length", "3", "--prompt", "a"),
            ["--draft-length 3 needs --draft"],
        ),
        (
            ("--base", "BASE", "--value", "VALUE", "--policy-scale", "3", "--prompt", "a"),
            ["--policy-scale 3 needs --strength-policy entropy or kl"],
        ),
        (
            ("--base", "BASE", "--value", "none", "--chat", "--distributed"),
            ["--distributed needs --prompt or --input"],
        ),
        (
            ("--base", "BASE", "--value", "none", "--prompt", "a", "--top-p", "0"),
            ["top_p must"],
        ),
        (
            ("--base", "BASE", "--value", "none", "--prompt", "a", "--seed", "-1"),
            ["seed must"],
        ),
        (
            ("--base", "BASE", "--value", "GPT2", "--prompt", "a", "--strength", "nan"),
            ["--strength must be finite, got nan"],
        ),
        (("--base", "BASE", "--value", "none", "--prompt", "a", "--mesh.tensor", "9"), ["9"]),
    ],
    ids=lambda flags: " ".join(flags)[:60],
)
def test_bad_flags_and_files_are_reported_before_a_model_is_loaded(
    infer, stories260k_dir, gpt2_model_dir, monkeypatch, flags, said
):
    def fail(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("ivl_jax.composed.sources.ModelSource.load", fail)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: False))
    folders = {"BASE": str(stories260k_dir), "GPT2": str(gpt2_model_dir)}
    status, output, messages = infer(*[folders.get(flag, flag) for flag in flags])
    assert (status, output) == (2, "")
    for name, folder in folders.items():
        messages = messages.replace(folder, name)
    for part in said:
        assert part in messages


def test_a_damaged_value_folder_is_found_before_the_base_is_read(
    infer, stories260k_dir, value_folder, tmp_path, monkeypatch
):
    damaged = tmp_path / "value"
    shutil.copytree(value_folder, damaged)
    files = [path for path in (damaged / "params").rglob("*") if path.is_file()]
    array = max(files, key=lambda path: path.stat().st_size)
    array.write_bytes(array.read_bytes()[:-1] + b"?")

    def fail(*_, **__):
        pytest.fail("the base was loaded")

    monkeypatch.setattr("ivl_jax.composed.sources.ModelSource.load", fail)
    flags = ("--base", stories260k_dir, "--value", damaged, "--prompt", "a")
    status, output, messages = infer(*flags)
    assert (status, output) == (2, "")
    assert "was changed after it was written" in messages


def test_a_prompt_beyond_the_context_says_by_how_much_before_a_model_is_loaded(
    infer, base_flags, tmp_path, monkeypatch
):
    def fail(*_, **__):
        pytest.fail("weights were read")

    monkeypatch.setattr("ivl_jax.composed.sources.ModelSource.load", fail)
    status, _, messages = infer(*base_flags, "--prompt", "word " * 700)
    assert status == 2
    assert "--prompt: " in messages
    assert "more than the context of 512 tokens" in messages
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "Once"}\n\n' + json.dumps({"prompt": "word " * 700}) + "\n")
    status, _, messages = infer(*base_flags, "--input", source, "--output", tmp_path / "o.jsonl")
    assert status == 2
    assert f"{source}:3: " in messages
    assert not (tmp_path / "o.jsonl").exists()


def test_help_imports_no_jax(project_root):
    code = (
        "import sys, runpy\n"
        "sys.argv = ['infer.py', '--help']\n"
        "try:\n    runpy.run_path('infer.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code in (0, None)\n"
        "heavy = {'jax', 'flax', 'transformers', 'orbax'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=project_root, capture_output=True, check=False
    )
    assert finished.returncode == 0, finished.stderr.decode()
    assert b"--max-new-tokens" in finished.stdout


def test_an_interrupt_while_loading_is_one_line(infer, base_flags, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ivl_jax.composed.sources.ModelSource.load", interrupted)
    status, _, messages = infer(*base_flags, "--prompt", "a")
    assert status == 130
    assert messages.startswith("infer.py: stopped before anything was decoded\n")
