"""A lock has one holder, says who that is, and never outlives its process."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ivl_jax import file_lock
from ivl_jax.file_lock import FileLock, LockedError

HOLD = (
    "import sys, time; from ivl_jax.file_lock import FileLock\n"
    "with FileLock(sys.argv[1]):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


@pytest.fixture
def holder(tmp_path, project_root):
    """Another process that holds `tmp_path/lock`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")],
        cwd=project_root,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_held_lock_names_host_process_time_and_command(tmp_path: Path, holder) -> None:
    with pytest.raises(LockedError) as raised, FileLock(tmp_path / "lock"):
        pass
    said = str(raised.value)
    assert f"process {holder.pid} on {socket.gethostname()}, since 20" in said
    assert f"(-c {tmp_path}/lock) holds {tmp_path}/lock" in said
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid, "left as it was"


def test_a_lock_ends_with_its_process_even_by_kill_9(tmp_path: Path, holder, caplog) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "lock").exists()
    with FileLock(tmp_path / "lock"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()
    assert not caplog.text


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), FileLock(tmp_path / "lock"):
        raise ZeroDivisionError
    with FileLock(tmp_path / "lock"), pytest.raises(LockedError), FileLock(tmp_path / "lock"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_removed_before_it_was_locked_is_made_anew(tmp_path: Path, monkeypatch) -> None:
    """Its last holder removes the file between our opening and our locking it."""
    lock, taken = FileLock(tmp_path / "lock"), []
    original = FileLock._lock

    def slow(self: FileLock, descriptor: int) -> None:
        if not taken:
            self.path.unlink()
        taken.append(descriptor)
        original(self, descriptor)

    monkeypatch.setattr(FileLock, "_lock", slow)
    with lock, pytest.raises(LockedError), FileLock(tmp_path / "lock"):
        pass
    assert len(taken) == 3


def test_without_locks_of_the_file_system_a_warning_names_who_was_there(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "lock").write_text(
        json.dumps({"host": "other", "pid": 7, "since": "2026-01-01", "command": "train.py"})
    )
    monkeypatch.setattr(file_lock.fcntl, "flock", no_locks)
    with FileLock(tmp_path / "lock"):
        pass
    assert "cannot be locked (No locks available)" in caplog.text
    assert "process 7 on other, since 2026-01-01 (train.py) does not write to" in caplog.text


def test_a_lock_left_by_another_host_is_named(tmp_path: Path, caplog) -> None:
    (tmp_path / "lock").write_text(
        json.dumps({"host": "other", "pid": 7, "since": "2026-01-01", "command": "train.py"})
    )
    with FileLock(tmp_path / "lock"):
        pass
    assert "process 7 on other, since 2026-01-01 (train.py) left its lock behind" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"host": 1}', b"[" * 100_000])
def test_an_unreadable_holder_is_another_process(tmp_path: Path, content: bytes) -> None:
    with FileLock(tmp_path / "lock"):
        (tmp_path / "lock").write_bytes(content)
        with pytest.raises(LockedError, match="another process holds"), FileLock(tmp_path / "lock"):
            pass
