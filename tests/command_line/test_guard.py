"""A command line ends with an exit status and one line, whatever happens in it."""

import contextlib
import errno
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.guard import run_command
from ivl_jax.config import ConfigError
from ivl_jax.text_files import MalformedFileError


def fail(error):
    def command(arguments):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("no base: name one"), 2, "no base: name one"),
        (MalformedFileError("a.json", "not JSON", line=3), 1, "a.json, line 3: not JSON"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 1, "'x'"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out.jsonl"),
            1,
            "out.jsonl: the disk is full: free some space and run the same command again",
        ),
        (ModuleNotFoundError("No module named 'x'", name="x"), 1, "'x': install what ivl_jax"),
        (KeyboardInterrupt(), 130, "halted"),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, BaseException) else "",
)
def test_what_the_user_can_mend_is_one_line(capsys, error, status, said):
    found = run_command("it.py", fail(error), [], when_stopped=lambda: "halted", failure_status=1)
    assert found == status
    shown = capsys.readouterr().err
    assert shown.startswith("it.py: ")
    assert shown.count("\n") == 1
    assert said in shown


def test_our_own_value_errors_are_messages_and_those_of_libraries_are_not(capsys):
    def ours(arguments):
        from ivl_jax.sharding import make_mesh

        make_mesh(data=1000, fsdp=1, tensor=1)

    assert run_command("it.py", ours, [], failure_status=1) == 1
    assert "unexpected" not in capsys.readouterr().err
    assert run_command("it.py", lambda arguments: int("five"), []) == 1
    assert "unexpected ValueError: invalid literal" in capsys.readouterr().err


def test_an_error_of_a_module_that_python_runs_is_ours(capsys):
    module = {"__name__": "__main__", "__package__": "ivl_jax.vocabulary"}
    exec("def fail(_): raise ValueError('no such tokenizer')", module)
    assert run_command("it", module["fail"], [], failure_status=1) == 1
    assert capsys.readouterr().err == "it: no such tokenizer\n"


def test_an_unexpected_error_is_one_line_and_its_traceback_is_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_command("it.py", fail(KeyError("first\nsecond")), ["--flag", "a b"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "unexpected KeyError: 'first\\nsecond'; the traceback is in " in shown
    report = Path(shown.rstrip("\n").rpartition(" is in ")[2]).read_text()
    assert report.startswith("it.py --flag 'a b'\nivl_jax ")
    assert "Traceback (most recent call last)" in report
    assert "KeyError" in report
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    assert run_command("it.py", fail(RuntimeError("x")), []) == 1
    assert "could not be saved (No such file or directory)" in capsys.readouterr().err


def test_version_is_answered_before_anything_else(capsys):
    assert run_command("it.py", fail(AssertionError), ["sub", "--version"]) == 0
    line = r"ivl_jax \d+\.\d+\.\d+ \(jax [\d.]+, flax [\d.]+, Python [\d.]+\)\n"
    assert re.fullmatch(line, capsys.readouterr().out)


CHILD = """
import sys, time
from ivl_jax.command_line.guard import run_command

def command(arguments):
    try:
        print("ready", flush=True)
        if arguments == ["talk"]:
            while True:
                print("y" * 100, flush=True)
        time.sleep(60)
    finally:
        print("closed", file=sys.stderr, flush=True)
        if arguments == ["close slowly"]:
            time.sleep(60)

sys.exit(run_command("it.py", command))
"""


@contextlib.contextmanager
def child(project_root, *arguments):
    """A process that has begun to run a command."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        cwd=project_root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_closes_files_and_ends_with_its_status(project_root, name):
    with child(project_root) as process:
        process.send_signal(getattr(signal, name))
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + getattr(signal, name)
    by = "" if name == "SIGINT" else f" ({name})"
    assert said == f"closed\nit.py: stopped{by}\n"


def test_a_second_sigterm_ends_a_command_that_is_slow_to_close(project_root):
    with child(project_root, "close slowly") as process:
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert process.stderr.readline() == "closed\n"
        time.sleep(0.2)  # at once it would count as the same request
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("logs", [False, True])
def test_a_signal_where_python_ignores_exceptions_is_not_lost(capsys, monkeypatch, name, logs):
    number = getattr(signal, name)
    monkeypatch.setattr(sys, "unraisablehook", before := sys.unraisablehook)  # restored in the end

    class Finalised:
        def __del__(self):
            signal.raise_signal(number)

    def command(arguments):
        del arguments
        if logs:
            log_to_stdout()
        Finalised()
        time.sleep(20)  # a lost signal would let it sleep

    started = time.monotonic()
    assert run_command("it.py", command, []) == 128 + number
    assert time.monotonic() - started < 15
    assert "stopped" in capsys.readouterr().err
    assert logs or sys.unraisablehook is before


def test_output_that_a_full_disk_refuses_is_one_line(project_root):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", CHILD],
            cwd=project_root,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == (
        "closed\nit.py: the disk is full: free some space and run the same command again\n"
    )


def test_an_ignored_hang_up_stays_ignored(project_root):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with child(project_root) as process:
            process.send_signal(signal.SIGHUP)
            time.sleep(0.3)
            assert process.poll() is None
            process.terminate()
            assert process.wait(timeout=30) == 143
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_goes_away_ends_the_command_quietly(project_root):
    with child(project_root, "talk") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(timeout=30) == 141
    assert said == "closed\n"
