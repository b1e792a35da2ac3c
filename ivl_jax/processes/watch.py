"""Ends this process, with one line, when another process of the run is gone.

In: the key-value store of JAX's coordination service. Out: nothing while all is well; else a line
on standard error that says what happened and how to resume, and exit status 76.

Every process counts up a pulse in the store. Process 0, where the store is, looks at all of them
and writes a notice when one stands still; the others look for that notice and at process 0's pulse.
The main thread may be inside a collective that never returns, so the line is written, and the
process ended, by a thread.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from ivl_jax.processes.roll_call import RollCall

LOST_PROCESS = 76
"""Exit status of a process whose run lost another one."""

_PULSES, _NOTICES = "pulse", "notices"
_COORDINATOR, _NOTICE = "coordinator", "notice"
_FAILED = "failed: "


@runtime_checkable
class Store(Protocol):
    """What the watch needs of `jaxlib`'s DistributedRuntimeClient."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = ...) -> None:
        """Set a key; an existing one is an error unless it may be overwritten."""
        ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """All keys below a folder, with their values."""
        ...


class PeerWatch:
    """Watches the other processes from two threads until `stop`.

    Attributes:
        interval: seconds between two pulses.
    """

    def __init__(
        self,
        store: Store,
        *,
        name: str,
        index: int,
        count: int,
        timeout: float,
        host: str,
        remedy: str,
        link_lost: Callable[[], bool] = lambda: False,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """Start watching.

        Args:
            store: shared by all processes.
            name: folder in the store, the same in all processes, of this watch only.
            index: of this process.
            count: of all processes.
            timeout: seconds of silence after which a process is lost.
            host: this machine's name, for the others' messages.
            remedy: ends the line: how to resume.
            link_lost: whether the connection to process 0 was closed.
            end: ends this process with a status.
        """
        self.interval = min(2.0, max(0.1, timeout / 10))
        self._store, self._name = store, name
        self._index, self._count, self._timeout = index, count, timeout
        self._host, self._remedy, self._link_lost, self._end = host, remedy, link_lost, end
        self._lock = threading.Lock()
        self._pulses: dict[int, str] = {}
        self._hosts: dict[int, str] = {}
        self._notice: str | None = None
        self._answers = 0
        self._stopped = threading.Event()
        self._leaving = threading.Event()
        self._threads = [
            threading.Thread(target=target, daemon=True, name="peer watch")
            for target in (self._beat, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop watching; nothing ends this process any more."""
        self._stopped.set()

    def wait_for_verdict(self) -> None:
        """Wait as long as it takes to see that another process is gone; returns only if none is."""
        self._stopped.wait(self._timeout + 4 * self.interval)

    def leave(self, why: str) -> None:
        """Tell the others that this process ends, and why; then stop watching.

        Process 0 waits a little: the others read the reason from its store.
        """
        self._leaving.set()
        self._announce(f"{_FAILED}process {self._index} ({self._host}) {why}")
        if self._index == 0:
            time.sleep(3 * self.interval)
        self.stop()

    def _beat(self) -> None:
        """Count up this process's pulse and read the others'; a call may never return."""
        own = f"{_NOTICES}/{_COORDINATOR}" if self._index == 0 else f"{_PULSES}/{self._index}"
        beats = 0
        while not self._stopped.wait(self.interval if beats else 0.0):
            beats += 1
            pulse = f"{beats} {self._host}"
            with contextlib.suppress(Exception):  # of RPCs; silence is judged by the other thread
                self._store.key_value_set(f"{self._name}/{own}", pulse, True)
                notices = self._read(_NOTICES)
                pulses = self._read(_PULSES) if self._index == 0 else {}
                with self._lock:
                    self._answers += 1
                    self._notice = notices.get(_NOTICE, self._notice)
                    heard = {0: notices.get(_COORDINATOR, "")} | {
                        int(key): value for key, value in pulses.items()
                    }
                    self._pulses |= {key: value for key, value in heard.items() if value}
                    self._hosts |= {
                        key: value.split(" ", 1)[1] for key, value in self._pulses.items()
                    }

    def _read(self, folder: str) -> dict[str, str]:
        """The entries of a folder by their last names."""
        found = self._store.key_value_dir_get(f"{self._name}/{folder}/")
        return {key.rsplit("/", 1)[1]: value for key, value in found}

    def _judge(self) -> None:
        """Look whether a process is gone."""
        watched = range(1, self._count) if self._index == 0 else [0]
        roll = RollCall(watched, longest_pause=2 * self.interval)
        store = RollCall([0], longest_pause=2 * self.interval)
        while not self._stopped.wait(self.interval / 2):
            now = time.monotonic()
            with self._lock:
                pulses, notice, answers = dict(self._pulses), self._notice, self._answers
            roll.hear(pulses, now=now)
            store.hear({0: str(answers)}, now=now)
            if notice is not None:
                if notice.startswith(_FAILED):
                    # If all fail alike, each says so itself.
                    self._stopped.wait(3 * self.interval)
                    if self._leaving.is_set():
                        return
                self._finish(notice)
            elif self._index and self._link_lost():
                self._finish("process 0 closed the connection: it was killed, or its host is gone")
            elif self._index and store.silent(self._timeout):
                self._finish(self._silent([0]))
            elif lost := roll.silent(self._timeout):
                self._finish(self._announce(self._silent(lost)))

    def _silent(self, lost: list[int]) -> str:
        named = ", ".join(
            f"{process} ({self._hosts[process]})" if process in self._hosts else f"{process}"
            for process in lost[:8]
        )
        more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
        return (
            f"process {named}{more} gave no sign of life for {self._timeout:g} s: killed, out of "
            "memory, preempted or stalled"
        )

    def _announce(self, notice: str) -> str:
        """Write the notice that all processes show, and return it, or the one there was."""
        done = threading.Event()
        found = [notice]

        def write() -> None:
            with contextlib.suppress(Exception):
                self._store.key_value_set(f"{self._name}/{_NOTICES}/{_NOTICE}", notice)
            with contextlib.suppress(Exception):
                found[0] = self._read(_NOTICES).get(_NOTICE, notice)
            done.set()

        # In a thread: the store may be what is gone.
        threading.Thread(target=write, daemon=True, name="peer watch notice").start()
        done.wait(2 * self.interval)
        return found[0]

    def _finish(self, notice: str) -> None:
        """Write the line and end the process."""
        if self._stopped.is_set():
            return
        program = os.path.basename(sys.argv[0])
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        line = (
            f"{program}: {notice.removeprefix(_FAILED)}; process {self._index} of {self._count} "
            f"ends too (status {LOST_PROCESS}); {self._remedy}\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
        if self._index == 0:  # the others read the notice from this process's store
            self._stopped.wait(3 * self.interval)
        self._end(LOST_PROCESS)
        self.stop()
