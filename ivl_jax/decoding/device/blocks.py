"""Long prompts are read block by block, so that what else is decoded need not wait for all of them.

In: a state whose rows have read the blocks before. Out: one that has read the next one; after the
last block every row has its first token, as after `prefill`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ivl_jax.composed.forward import OwnTokens
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.decoding.device.generate import append_tokens, read_tokens, with_prompts
from ivl_jax.decoding.device.proposals import Proposer
from ivl_jax.decoding.device.state import DecodeState, Requests


def read_block(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    prompts: Int[Array, "B P"],
    requests: Requests,
    *,
    start: Int[Array, ""],
    is_last: Bool[Array, ""],
    width: int,
    own_tokens: tuple[OwnTokens, ...] = (),
    proposer: Proposer | None = None,
) -> DecodeState:
    """Read the tokens of the prompts from one position on.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: empty rows of more than P slots, or what the blocks before have made of them.
        prompts: [B P] int32 token ids, right-padded with any id; the same in every block.
        requests: what each row asks for, likewise.
        start: position of the block's first token.
        is_last: whether nothing is left to read after it; the first tokens are then generated.
        width: tokens of the block, at most `widest_block`.
        own_tokens: what each value network with its own vocabulary reads in this block.
        proposer: where proposals come from; None: one token per step.

    Returns:
        The state afterwards.
    """
    state, lengths = with_prompts(state, prompts, requests), requests.prompt_lengths
    # A row whose prompt has ended reads its last token again, into the slot where it already is.
    positions = jnp.minimum(
        start + jnp.arange(width, dtype=jnp.int32)[None, :], lengths[:, None] - 1
    )
    tokens = jnp.take_along_axis(prompts, positions, axis=1)
    logits, base_logits, state = read_tokens(
        composition,
        params,
        state,
        tokens,
        positions=positions,
        wanted=jnp.clip(lengths[:, None] - 1 - start, 0, width - 1),
        own_tokens=own_tokens,
    )
    if proposer is not None:
        assert state.speculation is not None
        own = proposer.read_prompts(
            composition, params, state.speculation.proposer, tokens, positions, None
        )
        state = state._replace(speculation=state.speculation._replace(proposer=own))
    return jax.lax.cond(
        is_last, lambda: append_tokens(state, logits[:, 0], base_logits[:, 0]), lambda: state
    )
