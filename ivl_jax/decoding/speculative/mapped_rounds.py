"""Rounds of speculative decoding under value networks with their own vocabularies.

In: a `DecodeState` with a proposer. Out: first what is proposed, which the host re-tokenises for
these networks (`OwnBlock`); then the state with the tokens that were accepted and the one after
them. All value networks read the proposals in the second part, also those that a draft has run.

A value network has to say something after each proposal: its tokens of the text up to there. They
lie one behind the other in one pass, as long as no proposal changes tokens before it; a row's block
ends before the first that does.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ivl_jax.composed.forward import HiddenStates, OwnTokens, network_logits, run_networks
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.decoding.device.proposals import Proposals, Proposer
from ivl_jax.decoding.device.state import DecodeState
from ivl_jax.decoding.speculative.in_place import when
from ivl_jax.decoding.speculative.rounds import (
    BlockLogits,
    append_outcome,
    count_proposals,
    verify_block,
)


class OwnBlock(NamedTuple):
    """What value networks with their own vocabularies read in a round."""

    tokens: tuple[OwnTokens, ...]
    """Of each network: what it has not read, then its tokens of the proposals."""
    ends: tuple[Int[Array, "B L"], ...]
    """Of each network: which of them is the last one of the text up to the row's last token, up to
    the first proposal, and so on."""
    caps: Int[Array, " B"]
    """How many proposals of each row `ends` is right for."""


def propose_block(
    composition: Composition, params: ComposedParams, proposer: Proposer, state: DecodeState
) -> tuple[DecodeState, Proposals, Int[Array, ""]]:
    """Propose what may follow each row.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        proposer: where proposals come from; it gives no `value_logits`.
        state: where the rows are.

    Returns:
        The state with what the proposer has read, the proposals, and how many of them are meant for
        all rows; 0 where a plain step is faster: the proposals are then zeros.
    """
    count = count_proposals(composition, params, proposer, state)
    propose = functools.partial(proposer.propose, composition, params)
    shapes, _ = jax.eval_shape(propose, state, count)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    proposals, state = when(count > 0, lambda held: propose(held[1], count), (nothing, state))
    return state, proposals, count


def speculate_block(
    composition: Composition,
    params: ComposedParams,
    proposer: Proposer,
    state: DecodeState,
    proposals: Proposals,
    count: Int[Array, ""],
    own: OwnBlock,
) -> DecodeState:
    """Verify proposals, and append those accepted and the token that follows.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        proposer: where they come from.
        state: the one that they were proposed for.
        proposals: of `propose_block`.
        count: of `propose_block`, at least 1 and below L.
        own: what value networks with their own vocabularies read; its L is the block's width.

    Returns:
        The state with one token more per running row, or up to `count` and one.
    """
    width = own.ends[0].shape[1]
    proposals = proposals._replace(tokens=proposals.tokens[:, : width - 1])
    tokens = jnp.concatenate([state.last_tokens[:, None], proposals.tokens], axis=1)
    steps = jnp.arange(width, dtype=jnp.int32)[None, :]
    hidden, caches = run_networks(
        composition,
        params,
        tokens,
        positions=state.last_positions[:, None] + steps,
        caches=state.caches,
        own_texts=own.tokens,
    )
    assert caches is not None
    ends, values = iter(own.ends), []
    for network, states in zip(composition.values, hidden.values, strict=True):
        if network.mapped:
            states = jnp.take_along_axis(states, next(ends)[:, :, None], axis=1)
        values.append(states)
    logits = network_logits(composition, params, HiddenStates(hidden.base, tuple(values)))
    outcome, state = verify_block(
        composition,
        params,
        state._replace(caches=caches),
        proposals,
        BlockLogits(logits.base, logits.values),
        count,
        caps=own.caps,
    )
    return append_outcome(proposer, state, proposals, outcome, count)
