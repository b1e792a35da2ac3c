"""Limits on one rendering of a chat template: steps, characters, time and depth.

In: the size of the dialogue. Out: a budget that is charged for everything a template does, and that
ends the rendering when it is exceeded. Steps and characters are counted, so that the outcome does
not depend on the machine; a limit on the thread's time covers what they miss. Templates come with
models from anyone: none of them may hang a run or fill its memory.
"""

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NoReturn

from jinja2.runtime import Undefined
from jinja2.utils import Namespace


class ChatTemplateError(ValueError):
    """A dialogue that a chat template cannot render in a way that can be trained on."""


class TemplateLimitError(ChatTemplateError):
    """A chat template that needs more steps, memory or time than any dialogue should."""


_STEPS = 200_000  # and per message:
_STEPS_PER_MESSAGE = 2_000
_CHARACTERS = 250_000  # of a text, or items of a list; and per character of the dialogue:
_CHARACTERS_PER_CHARACTER = 16
_CHARACTERS_PER_STEP = 1_000  # copied in the time of a step
_INTEGER_BITS = 4_096
_DEPTH = 50  # nested calls
_SECONDS = 0.8  # of this thread's work; a dialogue takes milliseconds
_SECONDS_PER_MESSAGE = 2e-3
_SECONDS_PER_CHARACTER = 1e-6
_STEPS_PER_LOOK_AT_THE_CLOCK = 64


class Budget:
    """The remaining budget of one rendering.

    Attributes:
        characters: The largest allowed text or list.
    """

    def __init__(self, *, messages: int, characters: int):
        self.characters = _CHARACTERS + _CHARACTERS_PER_CHARACTER * characters
        self._steps = _STEPS + _STEPS_PER_MESSAGE * messages + characters
        self._output = self.characters
        self._depth = 0
        self._look_at = self._steps
        self._seconds = (
            _SECONDS + _SECONDS_PER_MESSAGE * messages + _SECONDS_PER_CHARACTER * characters
        )
        self._until = time.thread_time() + self._seconds

    def spend(self, characters: int = 0) -> None:
        """Charges one step, and the copying of characters."""
        self._steps -= 1 + characters // _CHARACTERS_PER_STEP
        if self._steps < self._look_at:
            self._look()

    def write(self, characters: int) -> None:
        """Charges one step, and text that is output."""
        self._steps -= 1 + characters // _CHARACTERS_PER_STEP
        self._output -= characters
        if self._steps < self._look_at or self._output < 0:
            self._look()

    def _look(self) -> None:
        """Ends the rendering if the budget is exceeded or the time is over."""
        self._look_at = self._steps - _STEPS_PER_LOOK_AT_THE_CLOCK
        if self._steps < 0:
            self._exceed("takes more steps than a dialogue of this size should")
        if self._output < 0:
            self._exceed(f"writes more than {self.characters:,} characters")
        if time.thread_time() > self._until:
            self._exceed(f"takes more than {self._seconds:.1f} s")

    def enter(self) -> None:
        """Charges a call; `leave` must follow."""
        self.spend()
        self._depth += 1
        if self._depth > _DEPTH:
            self._exceed(f"has more than {_DEPTH} nested calls")

    def leave(self) -> None:
        """Ends a call."""
        self._depth -= 1

    def allow(self, characters: int) -> None:
        """Checks the size of a value before it is made."""
        if characters > self.characters:
            self._exceed(f"makes a value of more than {self.characters:,} characters or items")

    def allow_bits(self, bits: int) -> None:
        """Checks the size of an integer before it is made."""
        if bits > _INTEGER_BITS:
            self._exceed(f"makes an integer of more than {_INTEGER_BITS:,} bits")

    def measure(self, value: Any) -> int:
        """Charges a new value, and returns its size: the total number of characters and items.

        A value that occurs in several places counts each time, as it is written each time.
        """
        if isinstance(value, str):
            size = len(value)
            if size > _CHARACTERS_PER_STEP:
                self.spend(size)
                self.allow(size)
            return size
        if value is None or isinstance(value, bool | float | Undefined):
            return 1
        if isinstance(value, int):
            self.allow_bits(value.bit_length())
            return 1
        return self._measure_items(value)

    def _measure_items(self, value: Any) -> int:
        size, count, left = 0, 0, [value]
        while left:
            item = left.pop()
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, list | tuple):
                left += item
            elif isinstance(item, dict):
                left += item.keys()
                left += item.values()
            elif isinstance(item, range):
                size += len(item)
            elif isinstance(item, Namespace):
                left += object.__getattribute__(item, "_Namespace__attrs").values()
            size += 1
            count += 1
            if size + len(left) > self.characters:
                self.allow(size + len(left))
            if count % _STEPS_PER_LOOK_AT_THE_CLOCK == 0:
                self.spend(_STEPS_PER_LOOK_AT_THE_CLOCK * _CHARACTERS_PER_STEP)
        self.spend(count % _STEPS_PER_LOOK_AT_THE_CLOCK * _CHARACTERS_PER_STEP)
        return size

    def _exceed(self, what: str) -> NoReturn:
        raise TemplateLimitError(what)


_CURRENT: ContextVar[Budget | None] = ContextVar("template budget", default=None)


def current_budget() -> Budget:
    """Returns the budget of the rendering in progress; a small one if there is none."""
    return _CURRENT.get() or Budget(messages=0, characters=0)


@contextlib.contextmanager
def spending(budget: Budget) -> Iterator[Budget]:
    """Makes this the budget of the rendering in progress."""
    token = _CURRENT.set(budget)
    try:
        yield budget
    finally:
        _CURRENT.reset(token)
