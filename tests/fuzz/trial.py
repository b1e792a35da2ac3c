"""Feeds altered files to a reader and collects what must not happen.

In: a reader, a seed and a number of inputs. Out: the faults: errors that are no message to the
user, messages that do not name the file, and inputs that take too long.
"""

import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from ivl_jax.command_line.guard import is_for_the_user
from tests.fuzz.mutate import mutations
from tests.fuzz.readers import READERS

SECONDS_AT_MOST = 10.0  # for one input; the slowest take one, in which a template is stopped


class Fault(NamedTuple):
    """What must not happen."""

    number: int  # of the input, from 0
    what: str  # a line
    content: bytes
    trace: str


class Trial(NamedTuple):
    """What became of the inputs."""

    outcomes: Counter[str]  # accepted, refused, or a kind of fault
    faults: list[Fault]
    slowest: float  # seconds


class _TooLong(BaseException):
    """Stops a reader; not an Exception, which readers may catch."""


def run_trial(name: str, *, inputs: int, seed: int) -> Trial:
    """Feed altered files to a reader.

    Args:
        name: of `READERS`.
        inputs: how many.
        seed: decides them, together with the name.

    Returns:
        What became of them.
    """
    reader = READERS[name]
    outcomes: Counter[str] = Counter()
    faults: list[Fault] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        sound = reader.make(_new_folder(Path(temporary) / "sound"))
        reader.read(_copy(sound, Path(temporary)))
        contents = mutations([sound.read_bytes()], reader.kind, f"{name} {seed}")
        for number, content in enumerate(islice(contents, inputs)):
            path = _copy(sound, Path(temporary))
            path.write_bytes(content)
            start = time.monotonic()
            try:
                with _limited():
                    reader.read(path)
                outcome, trace = "accepted", ""
            except _TooLong:
                outcome, trace = f"took over {SECONDS_AT_MOST} s", traceback.format_exc()
            except Exception as error:
                outcome, trace = _judge(error, reader.named or path.name), traceback.format_exc()
            slowest = max(slowest, time.monotonic() - start)
            outcomes[outcome.partition(":")[0]] += 1
            if outcome not in ("accepted", "refused"):
                faults.append(Fault(number, outcome, content, trace))
    return Trial(outcomes, faults, slowest)


def _judge(error: Exception, named: str) -> str:
    """What an error is: a refusal, or a fault in a line."""
    said = " ".join(str(error).split())[:200]
    if not is_for_the_user(error):
        return f"traceback: {type(error).__name__}: {said}"
    if named not in str(error):
        return f"unnamed: {type(error).__name__}: {said}"
    return "refused"


@contextmanager
def _limited() -> Iterator[None]:
    """Stops what takes too long, where the system and the thread allow it."""
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_AT_MOST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _new_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _copy(sound: Path, temporary: Path) -> Path:
    """The sound file with all that belongs to it, anew."""
    root, altered = temporary / "sound", temporary / "altered"
    shutil.rmtree(altered, ignore_errors=True)
    shutil.copytree(root, altered)
    return altered / sound.relative_to(root)
