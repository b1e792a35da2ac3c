"""What command lines show besides their results: log records, without other packages' advice.

In: what a command is. Out: handlers of the root logger.
"""

import logging
import os
import sys


def log_to_stderr() -> None:
    """Show our records and others' warnings on standard error, which results never go to."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("ivl_jax").setLevel(logging.INFO)
    silence_failed_saves()


def log_to_stdout(*, times: bool = False) -> None:
    """Show every record on standard output, of commands that have no other output.

    Args:
        times: whether each line begins with the time.
    """
    form = "%(asctime)s %(message)s" if times else "%(message)s"
    # Libraries may have installed a handler of their own by now: ours replaces it.
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stdout, force=True)
    for chatty in ("absl", "jax"):  # Orbax logs every file that it touches
        logging.getLogger(chatty).setLevel(logging.WARNING)
    silence_failed_saves()


def silence_failed_saves() -> None:
    """Keep Orbax and gcsfs from showing tracebacks of errors that they also raise.

    It concerns today's handlers. TensorStore reports the same errors to an event loop that is
    closed by then.
    """
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_not_repeated_traceback)
    show = sys.unraisablehook

    def show_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others


def _is_not_repeated_traceback(record: logging.LogRecord) -> bool:
    return record.name not in ("absl", "gcsfs") or not record.exc_info


def silence_advice() -> None:
    """Keep transformers from advising to install PyTorch, which no command line needs."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
