"""The networks of a composition: the static half of each, and its arrays.

These are records only. The static ones are hashable and key the compiled programs; the others are
pytrees of arrays. `ivl_jax.composed.forward` runs them.
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
    """How one network's arrays are sharded over a mesh."""

    mesh: Mesh
    rules: ShardingRules


@dataclass(frozen=True)
class Network:
    """The static half of one network of a composition."""

    graphdef: nnx.GraphDef
    arch: Architecture
    vocab_size: int
    """Number of real tokens that the network knows; later output columns are padding."""
    cache_dtype: str = "float32"
    scheme: ConnectionScheme | None = None
    """How it is connected to the base; None for the base itself and for its draft."""
    replacement_id: int = 0
    """What a value network reads in place of a token it does not know."""
    mapped: bool = False
    """Whether a value network has its own vocabulary, used through a vocabulary map."""
    centred: bool = False
    """Whether its value logits are centred before they are mapped."""
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
    """The static half of a composed model; hashable, and the key of its compiled programs."""

    base: Network
    values: tuple[Network, ...] = ()
    draft: Network | None = None
    """A small base that proposes tokens; None: one token per step."""
    draft_length: int = 0
    """Tokens proposed at a time; 0: chosen while decoding."""

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
    """Base ids that it does not know; None: there are none."""
    vocabulary_map: VocabularyMap | None = None
    """Maps its logits to the base's vocabulary; None where the two share a vocabulary."""


class DraftArrays(NamedTuple):
    """The arrays of a draft."""

    params: Params
    """Its parameters."""
    unknown_ids: Int[Array, " U"]
    """Base ids that it does not know."""


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
    """Replace the tokens that a value network or a draft does not know.

    Args:
        network: a value network, or the draft.
        tokens: [B T] ids of the base.
        unknown_ids: ids that mean something else to the network.

    Returns:
        [B T] ids that the network knows.
    """
    unknown = tokens >= network.vocab_size
    if unknown_ids is not None:
        unknown |= jnp.isin(tokens, unknown_ids)
    return jnp.where(unknown, jnp.int32(network.replacement_id), tokens)
