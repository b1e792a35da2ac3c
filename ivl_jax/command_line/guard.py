"""How a command line ends: its exit status, one line per failure, and where the traceback is.

In: a command as a function. Out: its exit status. Imports only the standard library, so that a
missing package is reported like any other error.
"""

import contextlib
import errno
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from ivl_jax.command_line.console import silence_advice

WRONG_INPUT = 2
FAILED = 1
_PACKAGE = "ivl_jax"
_SAME_REQUEST_SECONDS = 0.1
_AGAIN_SECONDS = 0.05

ends_at_once = threading.Event()
"""Set where threads would keep the process alive: they wait for a process that is gone."""


class StoppedBySignal(KeyboardInterrupt):
    """SIGTERM or SIGHUP was received; handled like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = signal.Signals(number)


def run_command(
    program: str,
    command: Callable[[Sequence[str]], int | None],
    arguments: Sequence[str] | None = None,
    *,
    when_stopped: Callable[[], str] = lambda: "stopped",
    failure_status: int | Callable[[], int] = WRONG_INPUT,
    unexpected_status: int = FAILED,
) -> int:
    """Run a command line; never prints a traceback on the console.

    Args:
        program: what the user called, for messages: `infer.py`.
        command: takes the arguments; returns the exit status, None for 0.
        arguments: without the program's name; None: this process's. `--version` is handled here.
        when_stopped: returns what to print after Ctrl-C, SIGTERM or SIGHUP.
        failure_status: exit status of errors whose message is for the user, except invalid
            configurations, whose status is 2; a function where it depends on how far the command
            got.
        unexpected_status: exit status after an error whose message is not for the user.

    Returns:
        The exit status: 0, `failure_status`, 2, `unexpected_status`, 128 + the number of the signal
        that stopped it, or 141 if the reader of a pipe closed it.
    """
    status = _run_command(
        program,
        command,
        sys.argv[1:] if arguments is None else list(arguments),
        when_stopped=when_stopped,
        failure_status=failure_status,
        unexpected_status=unexpected_status,
    )
    if ends_at_once.is_set():
        os._exit(status)
    return status


def _run_command(
    program: str,
    command: Callable[[Sequence[str]], int | None],
    given: Sequence[str],
    *,
    when_stopped: Callable[[], str],
    failure_status: int | Callable[[], int],
    unexpected_status: int,
) -> int:
    silence_advice()
    if "--version" in given:
        sys.stdout.write(f"{version_line()}\n")
        return 0
    try:
        with _signals_as_exceptions():
            status = command(given)
            sys.stdout.flush()
        return status or 0
    except KeyboardInterrupt as stop:
        number = signal.Signals(getattr(stop, "number", signal.SIGINT))
        by = "" if number == signal.SIGINT else f" ({number.name})"
        _say(program, f"{when_stopped()}{by}")
        return 128 + number
    except BrokenPipeError:
        _discard_output()
        return 128 + 13  # SIGPIPE, which Windows does not have
    except Exception as error:
        if is_for_the_user(error):
            _say(program, _message(error))
            if type(error).__name__ == "ConfigError":
                return WRONG_INPUT
            return failure_status() if callable(failure_status) else failure_status
        _say(program, describe_unexpected(error, program=program, arguments=given))
        return unexpected_status
    finally:
        # Text that a full disk refused must not be tried again when the interpreter ends.
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            _discard_output()


def long_run_command(
    program: str,
    command: Callable[[Sequence[str]], int | None],
    arguments: Sequence[str] | None = None,
    *,
    when_stopped: str = "stopped; the same command resumes",
) -> int:
    """Run a command line that takes minutes to hours, so that people stop it on purpose.

    Args:
        program: as in `run_command`.
        command: as in `run_command`.
        arguments: as in `run_command`.
        when_stopped: what to print after Ctrl-C, SIGTERM or SIGHUP.

    Returns:
        The exit status: that of `run_command`, 1 where an error's message is for the user.
    """
    return run_command(
        program, command, arguments, when_stopped=lambda: when_stopped, failure_status=FAILED
    )


def called_as() -> str:
    """What the user called, for messages: `train.py` or `ivl-train`."""
    return os.path.basename(sys.argv[0])


def version_line() -> str:
    """The versions of the package, JAX, Flax and Python."""
    from importlib.metadata import PackageNotFoundError, version

    from ivl_jax.version import __version__

    parts = []
    for name in ("jax", "flax"):
        with contextlib.suppress(PackageNotFoundError):
            parts.append(f"{name} {version(name)}")
    parts.append(f"Python {sys.version.split()[0]}")
    return f"ivl_jax {__version__} ({', '.join(parts)})"


def is_for_the_user(error: Exception) -> bool:
    """Whether an error's message tells the user what to change.

    That holds for this package's own exception classes, for errors of the operating system, and for
    a ValueError that this package raised itself.
    """
    if type(error).__module__.split(".")[0] == _PACKAGE or isinstance(error, OSError):
        return True
    if isinstance(error, ModuleNotFoundError):
        return not str(error.name).startswith(_PACKAGE)
    return isinstance(error, ValueError) and _raising_package(error) == _PACKAGE


def describe_unexpected(error: BaseException, *, program: str, arguments: Sequence[str]) -> str:
    """Save the traceback of an unexpected error.

    Args:
        error: what was raised.
        program: what the user called.
        arguments: with which arguments.

    Returns:
        One line: what happened, and where the traceback is.
    """
    report = "".join(
        [
            f"{shlex.join([program, *arguments])}\n{version_line()}\n\n",
            *traceback.format_exception(error),
        ]
    )
    first = (str(error).strip().splitlines() or [""])[0][:300]
    what = f"unexpected {type(error).__name__}{': ' if first else ''}{first}"
    try:
        descriptor, name = tempfile.mkstemp(prefix="ivl_jax-traceback-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(report)
    except OSError as trouble:
        return f"{what}; its traceback could not be saved ({trouble.strerror}):\n{report}"
    return f"{what}; the traceback is in {name}"


def _raising_package(error: BaseException) -> str:
    """The top-level package whose code raised an error."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    names = {} if place is None else place.tb_frame.f_globals
    # A module that `python -m` runs is called __main__, but knows its package.
    name = names.get("__package__") or names.get("__name__", "")
    return str(name).split(".")[0]


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error}: install what ivl_jax needs (in a clone: pip install -e .)"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}the disk is full: free some space and run the same command again"
    return str(error) or type(error).__name__


def _say(program: str, message: str) -> None:
    # Standard error may be a closed pipe, too.
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{program}: {message}\n")
        sys.stderr.flush()


def _discard_output() -> None:
    """Prevent writes to a closed pipe when the interpreter exits."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _signal_main_thread(number: int) -> None:
    if hasattr(signal, "pthread_kill"):  # interrupts what the main thread waits for
        signal.pthread_kill(threading.main_thread().ident, number)  # type: ignore[arg-type]
    else:
        signal.raise_signal(number)


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Raise SIGTERM and SIGHUP as exceptions, so that files are closed, unless they are ignored.

    A second SIGTERM ends the process at once. A signal that arrives where Python ignores
    exceptions, such as in a finaliser or in JAX's callback of the garbage collector, is delivered
    again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    last: dict[int, float] = {}
    ended = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        now, before = time.monotonic(), last.get(number)
        if before is None:
            last[number] = now
            raise StoppedBySignal(number)
        # A closing terminal may send SIGHUP twice; GNU timeout sends SIGTERM twice, at one time.
        if number == signal.SIGTERM and now - before > _SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def deliver_again(ignored: "sys.UnraisableHookArgs") -> None:
        if ended.is_set() or not isinstance(ignored.exc_value, KeyboardInterrupt):
            report_ignored(ignored)
            return
        number = getattr(ignored.exc_value, "number", signal.SIGINT)
        last.pop(number, None)
        timer = threading.Timer(_AGAIN_SECONDS, _signal_main_thread, [number])
        timer.daemon = True
        timer.start()

    report_ignored, sys.unraisablehook = sys.unraisablehook, deliver_again
    names = ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # `nohup` starts a process with SIGHUP ignored.
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is signal.SIG_DFL}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        ended.set()
        if sys.unraisablehook is deliver_again:  # else another hook calls it
            sys.unraisablehook = report_ignored
        for number, handler in before.items():
            signal.signal(number, handler)
