"""The platform that programs are traced for: this process's own, or that of a planned machine.

In: a platform's name. Out: the name that code asks for where it must differ by platform.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_TARGET: ContextVar[str | None] = ContextVar("target_platform", default=None)


def target_platform() -> str:
    """The platform to trace for: cpu, gpu or tpu."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Trace for devices that are not attached; functions traced outside are not reused.

    Args:
        platform: cpu, gpu or tpu.
    """
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)
        # JAX caches traces by function and shapes, which do not contain the platform.
        jax.clear_caches()
