"""A process that loses another one ends with one line; a dictionary stands in for JAX's store."""

import threading
import time

import pytest

from ivl_jax.processes.watch import LOST_PROCESS, PeerWatch


class Store:
    """Key-value pairs in memory; `silent` makes every call wait for ever."""

    def __init__(self):
        self.values = {}
        self.silent = threading.Event()

    def key_value_set(self, key, value, allow_overwrite=False):
        self._answer()
        if key in self.values and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_dir_get(self, key):
        self._answer()
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]

    def _answer(self):
        if self.silent.is_set():
            threading.Event().wait()


class Watched(PeerWatch):
    """Notes its exit status instead of ending this process."""

    def __init__(self, store, index, count, **options):
        self.ended = []
        super().__init__(
            store,
            name="run",
            index=index,
            count=count,
            timeout=1.0,
            host=f"host-{index}",
            remedy="resume with X",
            end=self.ended.append,
            **options,
        )


@pytest.fixture
def start():
    """Starts a watch."""
    watches = []

    def start(store, index, count=3, **options):
        watches.append(Watched(store, index, count, **options))
        return watches[-1]

    yield start
    for watch in watches:
        watch.stop()


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_processes_that_all_live_are_left_alone(start):
    store = Store()
    watches = [start(store, index) for index in range(3)]
    assert not wait_for(lambda: any(watch.ended for watch in watches), seconds=2.5)


def test_a_silent_process_ends_all_others_with_the_same_line(start, capfd):
    store = Store()
    watches = [start(store, index) for index in range(3)]
    assert wait_for(lambda: "run/pulse/2" in store.values)
    watches[2].stop()  # as kill -9 or SIGSTOP would
    assert wait_for(lambda: watches[0].ended and watches[1].ended)
    assert watches[0].ended == watches[1].ended == [LOST_PROCESS] == [76]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    for index in range(2):
        (line,) = [line for line in lines if f"process {index} of 3 ends too (status 76)" in line]
        assert "process 2 (host-2) gave no sign of life for 1 s" in line
        assert line.endswith("resume with X")


def test_a_coordinator_that_no_longer_answers_ends_the_others(start, capfd):
    store = Store()
    watch = start(store, 1)
    start(store, 0)
    assert wait_for(lambda: 0 in watch._hosts)
    store.silent.set()
    assert wait_for(lambda: watch.ended)
    assert "process 0 (host-0) gave no sign of life" in capfd.readouterr().err


def test_a_lost_connection_ends_a_process_at_once(start, capfd):
    lost = threading.Event()
    watch = start(Store(), 1, link_lost=lost.is_set)
    begun = time.monotonic()
    lost.set()
    assert wait_for(lambda: watch.ended)
    assert time.monotonic() - begun < watch._timeout
    assert "process 0 closed the connection" in capfd.readouterr().err


@pytest.mark.parametrize("leaving", [0, 1])
def test_a_process_that_fails_tells_the_others_why(start, capfd, leaving):
    store = Store()
    watches = [start(store, index, count=2) for index in range(2)]
    watches[leaving].leave("ended with an error: the disk is full")
    other = watches[1 - leaving]
    assert wait_for(lambda: other.ended)
    assert not watches[leaving].ended
    expected = f"process {leaving} (host-{leaving}) ended with an error: the disk is full; process"
    assert expected in capfd.readouterr().err


def test_processes_that_fail_alike_each_end_with_their_own_error(start):
    store = Store()
    watches = [start(store, index, count=2) for index in range(2)]
    for watch in reversed(watches):
        watch.leave("ended with an error: wrong config")
    assert not wait_for(lambda: any(watch.ended for watch in watches), seconds=1.0)
