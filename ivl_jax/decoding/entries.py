"""What goes into a batch, and what comes out of it: records.

In: a request with what it needs and uses. Out: what its row has generated since the last look.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ivl_jax.decoding.capacity import Need
from ivl_jax.decoding.device.finish import FinishReason
from ivl_jax.decoding.device.state import Requests
from ivl_jax.decoding.engine_model import Used
from ivl_jax.decoding.generation import TokenLogProbs
from ivl_jax.decoding.programs import Programs
from ivl_jax.decoding.requests import EncodedPrompt, RowArrays


class Entry(NamedTuple):
    """A request that is to begin."""

    id: int
    prompt: EncodedPrompt
    need: Need
    used: Used
    """The value networks that it uses; its row has caches of these."""

    @property
    def longest_text(self) -> int:
        """Tokens of the prompt as the network reads it that reads the most of them."""
        return longest_text(self.prompt, self.used)


def longest_text(prompt: EncodedPrompt, used: Used) -> int:
    """Tokens of a prompt as the network reads it that reads the most of them.

    Args:
        prompt: the prompt in the base's tokens.
        used: the value networks that it uses.
    """
    own = (len(text.tokens) for text in used.texts.values())
    return max(len(prompt.token_ids), *own, 0)


@dataclass
class Row:
    """A row of a batch, and the request that it continues."""

    entry: Entry
    """The request."""
    end: int
    """Length at which it ends (tokens)."""
    seen: int
    """Tokens that the host has looked at, prompt included."""


class News(NamedTuple):
    """What one row has generated since the last look."""

    id: int
    """The request that it continues."""
    token_ids: list[int]
    """New tokens, in order."""
    finish: FinishReason
    """Whether the row still generates, by the device and the value networks' contexts."""
    log_probs: list[TokenLogProbs]
    """Of the new tokens, where the request asks for them; else none."""
    proposed: int
    """Tokens proposed and verified so far."""
    accepted: int
    """Those that were accepted."""
    error: str | None
    """Why no next token could be chosen, where none could."""


def requests_of(arrays: RowArrays, programs: Programs) -> Requests:
    """What rows ask for, as the programs take it.

    Args:
        arrays: of `lay_out`.
        programs: they make the rows' keys.

    Returns:
        NumPy arrays: each becomes a device array as a program is called.
    """
    return Requests(
        prompt_lengths=arrays.prompt_lengths,  # pyright: ignore[reportArgumentType]
        limits=arrays.limits,  # pyright: ignore[reportArgumentType]
        stop_ids=arrays.stop_ids,  # pyright: ignore[reportArgumentType]
        strengths=arrays.strengths,  # pyright: ignore[reportArgumentType]
        keys=programs.row_keys(arrays.seeds, arrays.sample_indices),
        sampling=arrays.sampling,
        policies=arrays.policies,
    )
