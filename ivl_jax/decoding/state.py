"""What composed decoding works on: the networks, their arrays, and a batch of rows.

In: nothing; these are records. Static ones are hashable and key the compiled programs, the others
are pytrees of arrays. `ivl_jax.decoding.generate` has the functions over them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from ivl_jax.config import Connection
from ivl_jax.decoding.sampling import Sampling
from ivl_jax.decoding.streaming import FinishReason
from ivl_jax.model.decoder import Params
from ivl_jax.model.kv_cache import KVCache
from ivl_jax.model.network import Architecture
from ivl_jax.sharding import ShardingRules
from ivl_jax.vocabulary.mapping import VocabularyMap


@dataclass(frozen=True)
class Layout:
    """Where one network's arrays live."""

    mesh: Mesh
    rules: ShardingRules


@dataclass(frozen=True)
class Network:
    """The static half of one network of a composition."""

    graphdef: nnx.GraphDef
    arch: Architecture
    vocab_size: int
    """Real tokens that the network knows; output columns after them are padding."""
    cache_dtype: str
    connection: Connection | None = None
    """None for the base."""
    replacement_id: int = 0
    """What a value network reads in place of a token it does not know."""
    mapped: bool = False
    """A value network that reads and speaks its own vocabulary, through a vocabulary map."""
    centred: bool = False
    """Its value logits are centred before they are mapped."""
    layout: Layout | None = None
    """None: one device."""


@dataclass(frozen=True)
class Composition:
    """The static half of a composed decoder: hashable, the key of its compiled programs."""

    base: Network
    values: tuple[Network, ...] = ()
    draft: Network | None = None
    """A small base that proposes tokens; None: one token a step."""
    draft_length: int = 0
    """Tokens proposed at a time; 0: as many as pay."""

    @property
    def mapped(self) -> tuple[Network, ...]:
        """The value networks that have their own vocabulary."""
        return tuple(network for network in self.values if network.mapped)


class ComposedParams(NamedTuple):
    """The arrays of a composed decoder; read by every step, never donated."""

    base: Params
    """Parameters of the base model."""
    values: tuple[Params, ...]
    """Parameters of each value network."""
    unknown_ids: tuple[Int[Array, " U"], ...]
    """For each value network: base ids that mean something else to it."""
    vocabulary_maps: tuple[VocabularyMap, ...] = ()
    """For each value network with its own vocabulary: how the base reads its logits."""
    draft: Params | None = None
    """Parameters of the draft, if there is one."""
    draft_unknown_ids: Int[Array, " U"] | None = None
    """Base ids that mean something else to the draft."""


class Reading(NamedTuple):
    """What one value network with its own vocabulary reads in a call."""

    tokens: Int[Array, "B K"]
    """Its own tokens, right-padded with any id."""
    starts: Int[Array, " B"]
    """Position of each row's first one; what its cache has from there on is forgotten."""
    counts: Int[Array, " B"]
    """Real tokens of each row, at least 1; the last one's prediction is composed."""


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
    base_cache: KVCache
    """The base's keys and values of each row's first lengths[b] − 1 tokens, [B K S H] a layer."""
    value_caches: tuple[KVCache, ...]
    """The same for each value network; of its own tokens where it has its own vocabulary."""
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
