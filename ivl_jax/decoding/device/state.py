"""A batch of rows being decoded, as pytrees of arrays.

In: nothing; these are records. `ivl_jax.decoding.device.generate` has the functions over them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ivl_jax.composed.forward import Caches
from ivl_jax.decoding.device.sampling import Sampling
from ivl_jax.decoding.streaming import FinishReason
from ivl_jax.model.kv_cache import KVCache


class Requests(NamedTuple):
    """What each row asks for; constant while it is decoded."""

    prompt_lengths: Int[Array, " B"]
    """Tokens of the prompt, at least 1."""
    limits: Int[Array, " B"]
    """Length, prompt included, at which the row ends; 0 marks a row that only fills the batch."""
    stop_ids: Int[Array, "B E"]
    """Ids that end the row; −1 fills up."""
    strengths: Float[Array, "B M"]
    """α of each value network."""
    keys: Key[Array, " B"]
    """One key a row; the token index is folded in at each step."""
    sampling: Sampling
    """How the next token is chosen; four arrays [B]."""


class DraftState(NamedTuple):
    """What a draft has read of each row, and how much of what it proposed was kept."""

    cache: KVCache
    """Its keys and values of each row's first lengths[b] tokens, [B K S H] a layer."""
    lengths: Int[Array, " B"]
    """Tokens it has read; it falls behind where nothing is proposed."""
    judged: Int[Array, " B"]
    """Proposals decided upon so far: those kept, and each first one that was not."""
    accepted: Int[Array, " B"]
    """Those that were kept."""
    recent_judged: Float[Array, " B"]
    """As `judged`, older ones weighing less; these two decide how many come next."""
    recent_accepted: Float[Array, " B"]
    """As `accepted`, likewise."""


class DecodeState(NamedTuple):
    """A batch of rows being decoded; row b's next token is sampled from its first lengths[b]."""

    tokens: Int[Array, "B S"]
    """Prompt, then what was generated; slot = position. Nothing is meant beyond a row's length."""
    lengths: Int[Array, " B"]
    """Tokens so far, prompt included."""
    finish: Int[Array, " B"]
    """A `FinishReason`; a row that is done keeps its tokens and its length."""
    requests: Requests
    """What each row asks for."""
    caches: Caches
    """Keys and values of each row's first lengths[b] − 1 tokens, [B K S H] per layer; of a value
    network with its own vocabulary, those of its own tokens."""
    draft: DraftState | None = None
    """The draft's part, where there is one."""

    @property
    def running(self) -> Bool[Array, " B"]:
        """The rows that generate."""
        return self.finish == FinishReason.RUNNING

    @property
    def last_positions(self) -> Int[Array, " B"]:
        """Position of each row's last token; 0 in a row that only fills the batch."""
        return jnp.maximum(self.lengths - 1, 0)

    @property
    def last_tokens(self) -> Int[Array, " B"]:
        """Each row's last token, which no cache holds yet while the row runs."""
        return jnp.take_along_axis(self.tokens, self.last_positions[:, None], axis=1)[:, 0]

    def extended(
        self, tokens: Int[Array, "B N"], gained: Int[Array, " B"], *, stopped: Bool[Array, " B"]
    ) -> "DecodeState":
        """Append tokens to rows.

        Args:
            tokens: [B N] what follows each row.
            gained: [B] how many of them the row gets, at most N; 0 for a row that is done.
            stopped: [B] whether the last of those is one of the row's stop ids.

        Returns:
            The state with their tokens, lengths and finish reasons; caches are left alone.
        """
        batch, capacity = self.tokens.shape
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        slots = jnp.where(places < gained[:, None], self.lengths[:, None] + places, capacity)
        lengths = self.lengths + gained
        full = jnp.where(lengths >= self.requests.limits, int(FinishReason.LENGTH), self.finish)
        reason = jnp.where(stopped, jnp.int32(FinishReason.EOS), full.astype(jnp.int32))
        return self._replace(
            tokens=self.tokens.at[rows, slots].set(tokens, mode="drop"),
            lengths=lengths,
            finish=jnp.where(self.running, reason, self.finish),
        )
