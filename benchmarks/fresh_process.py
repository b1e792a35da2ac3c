"""Runs a function in a new Python process, for measurements that need a clean one.

In: a function at the top level of a module. Out: its result.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def in_fresh_process(
    function: Callable[P, R],
    environment: Mapping[str, str],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """Call a function in a new process and wait for what it returns.

    Peak memory, caches and compiled programs are then the function's own.

    Args:
        function: at the top level of a module, so that the new process finds it by name.
        environment: variables set in the new process, in addition to this one's.
        args: its arguments, picklable.
        kwargs: its keyword arguments, picklable.

    Returns:
        What the function returned.

    Raises:
        Exception: what the function raised; or that its process died.
    """
    spawn = multiprocessing.get_context("spawn")
    with _set(environment), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args, **kwargs).result()


@contextmanager
def _set(environment: Mapping[str, str]) -> Iterator[None]:
    """Temporarily change this process's variables, which a spawned one inherits."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
