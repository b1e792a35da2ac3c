"""Signals become a request; the second Ctrl-C aborts."""

import signal
import threading

import pytest

from ivl_jax.training.interrupts import Interrupts


def test_a_signal_is_a_request_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert interrupts.requested(1) is None
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.requested(2) == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_ctrl_c_aborts(caplog):
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested(1) == "Ctrl-C"
        assert "again aborts" in caplog.text
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


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
