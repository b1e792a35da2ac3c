"""The networks of a composition: what is static about each of them, and its arrays.

In: nothing; these are records. Static ones are hashable and key the compiled programs, the others
are pytrees of arrays. `ivl_jax.composed.forward` runs them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ivl_jax.composition import ConnectionScheme
from ivl_jax.model.decoder import Constrain, Params
from ivl_jax.model.network import Architecture
from ivl_jax.sharding import ShardingRules, activation_constraint
from ivl_jax.vocabulary.mapping import VocabularyMap


@dataclass(frozen=True)
class Layout:
    """How one network's arrays are split over a mesh."""

    mesh: Mesh
    rules: ShardingRules


@dataclass(frozen=True)
class Network:
    """The static half of one network of a composition."""

    graphdef: nnx.GraphDef
    arch: Architecture
    vocab_size: int
    """Real tokens that the network knows; output columns after them are padding."""
    cache_dtype: str = "float32"
    scheme: ConnectionScheme | None = None
    """How it is connected to the base; None for the base itself, and for its draft."""
    replacement_id: int = 0
    """What a value network reads in place of a token it does not know."""
    mapped: bool = False
    """A value network that reads and speaks its own vocabulary, through a vocabulary map."""
    centred: bool = False
    """Its value logits are centred before they are mapped."""
    layout: Layout | None = None
    """None: one device."""

    @property
    def connection(self) -> ConnectionScheme:
        """The scheme of a value network."""
        assert self.scheme is not None, "a base has no connection scheme"
        return self.scheme

    @property
    def constrain(self) -> Constrain | None:
        """The sharding constraint for its activations; None on one device."""
        layout = self.layout
        return None if layout is None else activation_constraint(layout.mesh, layout.rules)


@dataclass(frozen=True)
class Composition:
    """The static half of a composed model: hashable, the key of its compiled programs."""

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

    @property
    def reads_base_logits(self) -> bool:
        """Whether any value network reads the base's logits at every position."""
        return any(network.connection.reads_base_logits for network in self.values)


class ValueArrays(NamedTuple):
    """The arrays of a value network."""

    params: Params
    """Its parameters."""
    unknown_ids: Int[Array, " U"] | None = None
    """Base ids that mean something else to it; None: there are none."""
    vocabulary_map: VocabularyMap | None = None
    """How the base reads its logits; None where the two share a vocabulary."""


class DraftArrays(NamedTuple):
    """The arrays of a draft."""

    params: Params
    """Its parameters."""
    unknown_ids: Int[Array, " U"]
    """Base ids that mean something else to it."""


class ComposedParams(NamedTuple):
    """The arrays of a composed model; read by every step, never donated."""

    base: Params
    """Parameters of the base model."""
    values: tuple[ValueArrays, ...] = ()
    """The arrays of each value network."""
    draft: DraftArrays | None = None
    """The arrays of the draft, if there is one."""


def known_tokens(
    network: Network, tokens: Int[Array, "B T"], unknown_ids: Int[Array, " U"] | None
) -> Int[Array, "B T"]:
    """Replace the tokens that a network beside the base cannot read.

    Args:
        network: a value network, or the draft.
        tokens: [B T] ids of the base.
        unknown_ids: ids that mean something else to the network.

    Returns:
        [B T] ids that it knows.
    """
    unknown = tokens >= network.vocab_size
    if unknown_ids is not None:
        unknown |= jnp.isin(tokens, unknown_ids)
    return jnp.where(unknown, jnp.int32(network.replacement_id), tokens)
