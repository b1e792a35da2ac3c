"""A batch of rows being decoded, as pytrees of arrays.

In: nothing; these are records. `ivl_jax.decoding.device.generate` has the functions over them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ivl_jax.composed.forward import Caches
from ivl_jax.composed.strength_policies import RowPolicies
from ivl_jax.decoding.device.finish import FinishReason
from ivl_jax.decoding.device.sampling import Sampling


class Requests(NamedTuple):
    """What each row asks for; constant while it is decoded."""

    prompt_lengths: Int[Array, " B"]
    """Tokens of the prompt, at least 1."""
    limits: Int[Array, " B"]
    """Length, prompt included, at which the row ends; 0 marks a padding row."""
    stop_ids: Int[Array, "B E"]
    """Ids that end the row; −1 fills up."""
    strengths: Float[Array, "B M"]
    """α of each value network."""
    keys: Key[Array, " B"]
    """One key per row; the token index is folded in at each step."""
    sampling: Sampling
    """How the next token is chosen."""
    policies: RowPolicies | None = None
    """How much of the strengths applies at each position; None: all of it in every row."""


class LogProbs(NamedTuple):
    """Log-probabilities (nats) of generated tokens under the composed distribution.

    That is the softmax of the composed logits, before logit bias, temperature, top-k, top-p and
    min-p.
    """

    chosen: Float[Array, "B S"]
    """Of the token itself; slot = position in the state, or the N places of a block."""
    top_ids: Int[Array, "B S K"]
    """The K likeliest tokens there, the likeliest first; K may be 0."""
    top: Float[Array, "B S K"]
    """Their log-probabilities."""
    base: Float[Array, "B S"]
    """Of the token itself under the base alone."""


class SpeculationState(NamedTuple):
    """What a proposer has read of each row, and how many of its tokens were accepted."""

    proposer: Any
    """The proposer's own arrays, rows first."""
    proposed: Int[Array, " B"]
    """Tokens proposed and verified so far: those accepted, and each first one that was not."""
    accepted: Int[Array, " B"]
    """Those that were accepted."""
    recent_proposed: Float[Array, " B"]
    """As `proposed`, older ones weighing less; these two decide how many come next."""
    recent_accepted: Float[Array, " B"]
    """As `accepted`, likewise."""


class DecodeState(NamedTuple):
    """A batch of rows being decoded; row b's next token is sampled from its first lengths[b]."""

    tokens: Int[Array, "B S"]
    """Prompt, then what was generated; slot = position. Undefined beyond a row's length."""
    lengths: Int[Array, " B"]
    """Tokens so far, prompt included."""
    finish: Int[Array, " B"]
    """A `FinishReason`; a row that is done keeps its tokens and its length."""
    requests: Requests
    """What each row asks for."""
    caches: Caches
    """Keys and values of each row's first lengths[b] − 1 tokens, [B K S H] per layer; of a value
    network with its own vocabulary, those of its own tokens."""
    speculation: SpeculationState | None = None
    """The proposer's part, where there is one."""
    log_probs: LogProbs | None = None
    """Of every generated token; None: no row asks for them, and they are not computed."""

    @property
    def running(self) -> Bool[Array, " B"]:
        """The rows that generate."""
        return self.finish == FinishReason.RUNNING

    @property
    def last_positions(self) -> Int[Array, " B"]:
        """Position of each row's last token; 0 in a padding row."""
        return jnp.maximum(self.lengths - 1, 0)

    @property
    def last_tokens(self) -> Int[Array, " B"]:
        """Each row's last token, which no cache holds yet while the row runs."""
        return jnp.take_along_axis(self.tokens, self.last_positions[:, None], axis=1)[:, 0]

    @property
    def top_log_probs(self) -> int | None:
        """How many likeliest tokens are kept per generated token; None: no log-probabilities."""
        return None if self.log_probs is None else self.log_probs.top_ids.shape[-1]

    def extended(
        self,
        tokens: Int[Array, "B N"],
        gained: Int[Array, " B"],
        *,
        stopped: Bool[Array, " B"],
        failed: Bool[Array, " B"],
        log_probs: LogProbs | None = None,
    ) -> "DecodeState":
        """Append tokens to rows.

        Args:
            tokens: [B N] what follows each row.
            gained: [B] how many of them the row gets, at most N; 0 for a row that is done.
            stopped: [B] whether the last of those is one of the row's stop ids.
            failed: [B] whether the logits after those were not finite; the row then ends.
            log_probs: of the N tokens, where the state has them.

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
        reason = jnp.where(failed, jnp.int32(FinishReason.ERROR), reason)

        def written(held: Array, new: Array) -> Array:
            return held.at[rows, slots].set(new, mode="drop")

        kept = self.log_probs
        if kept is not None:
            assert log_probs is not None
            kept = jax.tree.map(written, kept, log_probs)
        return self._replace(
            tokens=written(self.tokens, tokens),
            lengths=lengths,
            finish=jnp.where(self.running, reason, self.finish),
            log_probs=kept,
        )
