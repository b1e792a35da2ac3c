"""Why a row ends, as the device and the host write it."""

import enum


class FinishReason(enum.IntEnum):
    """Why a row generates no further token."""

    RUNNING = 0
    EOS = 1
    """It generated one of its stop ids."""
    STOP_STRING = 2
    """The host found one of its stop strings in the text."""
    LENGTH = 3
    """It reached its own limit or the end of the context."""
    ERROR = 4
    """No next token could be chosen: the composed logits were not finite numbers."""
