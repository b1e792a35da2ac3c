"""Signals become a request; the second of a kind aborts."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ivl_jax.training.interrupts import AbortedError, Interrupts


def test_a_signal_is_a_request_and_the_old_handlers_come_back():
    signals = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    before = [signal.getsignal(number) for number in signals]
    for number, name in zip(signals, ("SIGTERM", "Ctrl-C", "SIGHUP"), strict=True):
        with Interrupts() as interrupts:
            assert interrupts.requested(1) is None
            signal.raise_signal(number)
            assert interrupts.requested(2) == name
        assert [signal.getsignal(number) for number in signals] == before


def test_a_second_ctrl_c_aborts(caplog):
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested(1) == "Ctrl-C"
        assert "again aborts" in caplog.text
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_second_sigterm_aborts_and_a_third_would_kill(monkeypatch, caplog):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.requested(1) == "SIGTERM"
        assert "SIGTERM again aborts" in caplog.text
        with pytest.raises(AbortedError) as aborted:
            signal.raise_signal(signal.SIGTERM)
        assert aborted.value.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_gnu_timeout_sends_sigterm_twice_and_means_it_once(monkeypatch):
    clock = iter([10.0, 10.001])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.requested(1) == "SIGTERM"


def test_a_closing_terminal_may_hang_up_more_than_once():
    with Interrupts() as interrupts:
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert interrupts.requested(1) == "SIGHUP"


def test_what_nohup_ignores_stays_ignored(project_root):
    code = (
        "import os, signal\n"
        "from ivl_jax.training.interrupts import Interrupts\n"
        "with Interrupts() as interrupts:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print(interrupts.requested(1))\n"
    )
    done = subprocess.run(
        ["nohup", sys.executable, "-c", code],
        cwd=project_root,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None\n"


def test_another_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter():
        with Interrupts() as interrupts:
            seen.append(interrupts.requested(1))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]
    assert signal.getsignal(signal.SIGTERM) is before
