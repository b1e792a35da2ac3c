"""Our decoder: a base and value networks with random weights, run by the real programs.

In: shapes. Out: `Composed`, with the same two methods as a peer, and the bytes that a step reads.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivl_jax.composed.kernel_form import lay_out_network
from ivl_jax.composed.network import (
    ComposedParams,
    Composition,
    DraftArrays,
    Network,
    ValueArrays,
)
from ivl_jax.composition import SCHEMES
from ivl_jax.decoding.device.state import DecodeState, Requests
from ivl_jax.decoding.programs import Programs, build_programs
from ivl_jax.decoding.requests import GenerationOptions, lay_out
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params, init_params

_NEVER = ()  # no stop ids: every row has the requested length


class Weights(NamedTuple):
    """One network: its shape, and parameters as trained."""

    arch: ArchConfig
    params: Params


@dataclass(frozen=True)
class Composed:
    """A base with value networks, ready to decode greedily.

    Attributes:
        composition: The static half.
        params: The arrays, arranged for decoding.
        strengths: α of each value network.
    """

    composition: Composition
    params: ComposedParams
    strengths: tuple[float, ...]

    def prefill(self, prompts: np.ndarray, new_tokens: int) -> DecodeState:
        """Read prompts [B T] and generate the first of `new_tokens` tokens."""
        batch = len(prompts)
        rows = lay_out(
            prompts.tolist(),
            [GenerationOptions(max_new_tokens=new_tokens)] * batch,
            sample_indices=range(batch),
            context=self.composition.base.arch.max_position_embeddings,
            stop_ids=_NEVER,
            strengths=self.strengths,
            row_multiple=1,
        )
        programs = self._programs
        keys = programs.row_keys(rows.seeds, rows.sample_indices)
        requests = Requests(
            prompt_lengths=jnp.asarray(rows.prompt_lengths),
            limits=jnp.asarray(rows.limits),
            stop_ids=jnp.asarray(rows.stop_ids),
            strengths=jnp.asarray(rows.strengths),
            keys=keys,
            sampling=rows.sampling,
        )
        return programs.prefill(self.params, rows.prompts, requests, capacity=rows.capacity)

    def decode(self, state: DecodeState) -> np.ndarray:
        """Generate what is left in one chunk; all tokens [B T] come back."""
        return self.decode_to_end(state)[0]

    def decode_to_end(self, state: DecodeState) -> tuple[np.ndarray, DecodeState]:
        """As `decode`, with the last state."""
        nothing = np.zeros(len(state.tokens), bool)
        state = self._programs.decode_chunk(self.params, state, np.int32(2**31 - 1), nothing)
        return np.asarray(state.tokens)[:, : int(state.lengths[0])], state

    @property
    def _programs(self) -> Programs:
        return build_programs(self.composition)


def random_weights(arch: ArchConfig, seed: int) -> Weights:
    """Weights of a network, drawn in one program."""
    return Weights(arch, jax.jit(lambda key: init_params(arch, key))(jax.random.key(seed)))


def composed(
    base: Weights, *values: Weights, strengths: Sequence[float] = (), int8_base: bool = False
) -> Composed:
    """Compose value networks with a base of the same vocabulary, like `ivl_jax.compose`.

    Args:
        base: the base.
        values: the value networks.
        strengths: α of each; empty: 1 each.
        int8_base: the base's kernels in int8.

    Returns:
        The composed model.
    """
    base_network, base_params = _network(base, is_value=False, int8=int8_base)
    laid_out = [_network(value, is_value=True) for value in values]
    nothing_unknown = jnp.zeros(0, jnp.int32)
    return Composed(
        Composition(base_network, tuple(network for network, _ in laid_out)),
        ComposedParams(
            base_params,
            tuple(ValueArrays(params, nothing_unknown) for _, params in laid_out),
        ),
        tuple(strengths) or (1.0,) * len(values),
    )


def with_draft(model: Composed, draft: Weights, *, length: int = 0) -> Composed:
    """Let a draft propose tokens for a composed model.

    Args:
        model: without one.
        draft: of the same vocabulary.
        length: tokens it proposes at a time; 0: chosen while decoding.

    Returns:
        The same model with the draft.
    """
    network, params = _network(draft, is_value=False)
    return dataclasses.replace(
        model,
        composition=dataclasses.replace(model.composition, draft=network, draft_length=length),
        params=model.params._replace(draft=DraftArrays(params, jnp.zeros(0, jnp.int32))),
    )


def bytes_a_step(networks: Sequence[Weights], *, batch: int, slots: float) -> int:
    """Bytes that one step of decoding reads: every weight once, and the caches.

    Args:
        networks: all networks of the composition.
        batch: rows.
        slots: tokens in each row's caches, on average over the steps.

    Returns:
        Bytes; an embedding that is not also the head is not counted, since only a few of its rows
        are read.
    """
    total = 0.0
    for arch, params in networks:
        leaves = jax.tree.leaves(params)
        total += sum(leaf.nbytes for leaf in leaves)
        if not arch.tie_word_embeddings:
            total -= params["embed_tokens"]["embedding"].nbytes
        width = arch.num_key_value_heads * arch.head_dim * arch.num_hidden_layers
        total += batch * slots * 2 * width * leaves[0].dtype.itemsize
    return round(total)


def _network(weights: Weights, *, is_value: bool, int8: bool = False) -> tuple[Network, Params]:
    graphdef, params = lay_out_network(weights.params, weights.arch, None, int8=int8)
    network = Network(
        graphdef=graphdef,
        arch=weights.arch,
        vocab_size=weights.arch.vocab_size,
        cache_dtype=jax.tree.leaves(weights.params)[0].dtype.name,
        scheme=SCHEMES["residual"] if is_value else None,
    )
    return network, params
