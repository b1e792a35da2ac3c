import importlib.util
import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import types

import jax
import pytest

from ivl_jax.checkpoint import save_value
from ivl_jax.weights.language_model import load_language_model
from tests.decoding.conftest import make_value


@pytest.fixture(scope="module")
def value_folder(stories260k_dir, tmp_path_factory):
    base = load_language_model(stories260k_dir)
    value = make_value(base)
    folder = tmp_path_factory.mktemp("value") / "value"
    save_value(folder, params=value.params, metadata=value.metadata, tokenizer=value.tokenizer)
    return folder


@pytest.fixture(scope="module")
def module(project_root):
    """infer.py as a module."""
    spec = importlib.util.spec_from_file_location("infer", project_root / "infer.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def infer(module, monkeypatch, capsys, caplog):
    """Runs the command line in this process, on one of its devices: (status, output, messages)."""
    logger = logging.getLogger("ivl_jax")
    level = logger.level

    def run(*flags):
        flags = ["--mesh.tensor", "1", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", ["infer.py", *flags])
        caplog.clear()
        try:
            status = module.main()
        except SystemExit as end:  # tyro's own errors
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err + caplog.text

    yield run
    logger.setLevel(level)


@pytest.fixture(scope="module")
def gpt2_model_dir(gpt2_tokenizer_dir, stories260k_dir, tmp_path_factory):
    """A language model's folder with another tokenizer, as far as it is read before the weights."""
    folder = tmp_path_factory.mktemp("gpt2")
    for path in (*gpt2_tokenizer_dir.iterdir(), stories260k_dir / "config.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def base_flags(stories260k_dir, value_folder):
    return ("--base", stories260k_dir, "--value", value_folder, "--strength", 0.3)


@pytest.fixture
def without_torch(tmp_path):
    """A folder that hides PyTorch, which transformers then advises to install."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *more: name != 'torch' and find(name, *more) or None\n"
    )
    return tmp_path


def test_the_base_alone_from_bos_prints_the_published_greedy_text(
    stories260k_dir, project_root, without_torch
):
    flags = ["--base", str(stories260k_dir), "--value", "none", "--prompt", ""]
    finished = subprocess.run(
        [sys.executable, "infer.py", *flags, "--max-new-tokens", "200"],
        capture_output=True,
        cwd=project_root,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(without_torch)},
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


@pytest.fixture(scope="module")
def mapped_flags(stories260k_dir, tmp_path_factory):
    """stories260k as a value on S, through a map built on the spot."""
    from ivl_jax.assets import family_folder
    from ivl_jax.vocabulary.__main__ import build

    folder = tmp_path_factory.mktemp("map")
    (folder / "text.txt").write_text("Once upon a time there was a girl. She said: return 0\n" * 5)
    sides = {"base_tokenizer": family_folder("S"), "value_tokenizer": stories260k_dir}
    path = folder / "map.safetensors"
    build(**sides, text=(folder / "text.txt",), output=path, method="bytes")
    return ("--base", family_folder("S"), "--value", stories260k_dir, "--map", path)


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


def test_a_chat_prompt_goes_through_the_values_template(infer, base_flags):
    flags = (*base_flags, "--max-new-tokens", 10)
    _, talked, _ = infer(*flags, "--chat", "--prompt", "Hello")
    _, written, _ = infer(*flags, "--prompt", "Hello")
    assert talked != written


def test_talking_keeps_the_conversation_until_it_is_reset(infer, base_flags, monkeypatch):
    lines = iter(["Hello", "", "Hello", "/reset", "Hello", "word " * 600, "Hello", "/exit"])
    asked = []

    def read_line(mark):
        sys.stdout.write(mark)
        asked.append(next(lines))
        return asked[-1]

    monkeypatch.setattr("builtins.input", read_line)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    status, output, messages = infer(*base_flags, "--chat", "--max-new-tokens", 30)
    assert status == 0
    assert asked[-1] == "/exit"
    answers = output.split("> ")
    first, again, after_reset = answers[1], answers[3], answers[5]
    assert first == after_reset
    assert again != first
    assert "more than the context of 512 tokens" in messages
    assert messages.count("30 tokens (length)") == 4


def test_messages_may_come_through_a_pipe(infer, base_flags, monkeypatch):
    flags = (*base_flags, "--chat", "--max-new-tokens", 12)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/reset\nHello\n"))
    status, output, _ = infer(*flags)
    assert status == 0
    once = infer(*flags, "--prompt", "Hello")[1]
    assert output == once * 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 600))
    status, output, messages = infer(*flags)
    assert (status, output) == (1, "")
    assert "more than the context of 512 tokens" in messages
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    status, _, messages = infer(*flags)
    assert status == 2
    assert "standard input is not UTF-8" in messages


def test_a_termination_signal_ends_a_conversation(infer, base_flags, monkeypatch):
    from ivl_jax.command_line.guard import StoppedBySignal

    def stopped(mark):
        raise StoppedBySignal(signal.SIGTERM)

    monkeypatch.setattr("builtins.input", stopped)
    status, _, messages = infer(*base_flags, "--chat")
    assert status == 143
    assert "infer.py: stopped (SIGTERM)" in messages


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
    processes = [
        subprocess.Popen(
            [sys.executable, "infer.py", *flags, str(output), "--distributed"],
            cwd=project_root,
            env={**os.environ, "XLA_FLAGS": "", **cluster, "JAX_PROCESS_ID": str(index)},
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


def test_the_end_of_input_ends_a_conversation(infer, base_flags, monkeypatch):
    def read_line(mark):
        raise EOFError

    monkeypatch.setattr("builtins.input", read_line)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    assert infer(*base_flags, "--chat")[0] == 0


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
