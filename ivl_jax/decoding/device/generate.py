"""Composed decoding as pure functions: read the prompts, then generate tokens one by one.

In: parameters of a base and of any number of value networks, and what each row asks for. Out: a
`DecodeState`, the whole state of a batch of rows. All of it stays on device; the host
looks at a state when it wants to, not after every token.

Every network's cache has a slot for every position that is still seen, and a row of length n has
its first n − 1 tokens in every cache. So rolling a row back is setting a smaller length, and right
padding needs no mask.

A value network with a vocabulary of its own reads the row's text in its own tokens, at its own
positions. The host says before each step which those are (`OwnTokens`): such a composition is
decoded token by token. Meanwhile the base reads the same token (`read_base`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.composed.forward import (
    NetworkLogits,
    OwnTokens,
    compose,
    network_logits,
    pick,
    run_cached,
    run_networks,
)
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.decoding.device.finish import FinishReason
from ivl_jax.decoding.device.log_probs import score_chosen
from ivl_jax.decoding.device.placement import empty_rows
from ivl_jax.decoding.device.proposals import Proposer
from ivl_jax.decoding.device.sampling import are_finite, sample_tokens
from ivl_jax.decoding.device.state import DecodeState, Requests
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.kv_cache import LOOKAHEAD


def prefill(
    composition: Composition,
    params: ComposedParams,
    prompts: Int[Array, "B P"],
    requests: Requests,
    *,
    capacity: int,
    own_tokens: tuple[OwnTokens, ...] = (),
    mapped_capacity: int = 0,
    top_log_probs: int | None = None,
    proposer: Proposer | None = None,
) -> DecodeState:
    """Read the prompts into fresh caches and generate the first token of every row.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        prompts: [B P] int32 token ids, right-padded with any id.
        requests: what each row asks for.
        capacity: slots per row, S ≥ P (tokens).
        own_tokens: the prompts as each value network with its own vocabulary reads them.
        mapped_capacity: slots per row in their caches (tokens).
        top_log_probs: likeliest tokens kept per generated token; None: no log-probabilities.
        proposer: where proposals come from; None: one token per step.

    Returns:
        The state after one generated token; rows whose limit leaves no room are done at once.
    """
    batch, width = prompts.shape
    lengths = requests.prompt_lengths
    empty = empty_rows(
        composition,
        rows=batch,
        capacity=capacity,
        stop_ids=requests.stop_ids.shape[1],
        mapped_capacity=mapped_capacity,
        top_log_probs=top_log_probs,
        proposer=proposer,
    )
    state = with_prompts(empty, prompts, requests)
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    logits, base_logits, state = read_tokens(
        composition,
        params,
        state,
        prompts,
        positions=positions,
        wanted=lengths[:, None] - 1,
        prompt_lengths=lengths,
        own_tokens=own_tokens,
    )
    if proposer is not None:
        assert state.speculation is not None
        own = proposer.read_prompts(
            composition, params, state.speculation.proposer, prompts, positions, lengths
        )
        state = state._replace(speculation=state.speculation._replace(proposer=own))
    return append_tokens(state, logits[:, 0], base_logits[:, 0])


def with_prompts(state: DecodeState, prompts: Int[Array, "B P"], requests: Requests) -> DecodeState:
    """Put prompts into rows.

    Args:
        state: B rows of at least P slots.
        prompts: [B P] int32 token ids, right-padded with any id.
        requests: what each row asks for.

    Returns:
        The rows of these prompts, none of which has been read; those whose limit leaves no room are
        done.
    """
    lengths, more = requests.prompt_lengths, state.tokens.shape[1] - prompts.shape[1]
    return state._replace(
        tokens=jnp.pad(prompts, ((0, 0), (0, more))),
        lengths=lengths,
        finish=jnp.where(
            lengths < requests.limits, int(FinishReason.RUNNING), int(FinishReason.LENGTH)
        ).astype(jnp.int32),
        requests=requests,
    )


def decode_chunk(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    *,
    max_tokens: Int[Array, ""],
    stopped: Bool[Array, " B"],
    enough_done: Int[Array, ""],
) -> DecodeState:
    """Generate until enough rows are done, or every running row has `max_tokens` more.

    For compositions of one vocabulary.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: where the rows are.
        max_tokens: tokens per row, at most.
        stopped: [B], rows that the host has ended since the last chunk (a stop string).
        enough_done: rows that are done when it ends, those that were done before included: B, or
            fewer where prompts wait for the rows that they leave.

    Returns:
        The state afterwards.
    """

    def unfinished(carry: tuple[Int[Array, ""], DecodeState]) -> Bool[Array, ""]:
        count, state = carry
        done = jnp.sum(~state.running)
        return (count < max_tokens) & (done < enough_done)

    def one_token(
        carry: tuple[Int[Array, ""], DecodeState],
    ) -> tuple[Int[Array, ""], DecodeState]:
        count, state = carry
        return count + 1, decode_step(composition, params, state)

    return jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), halt(state, stopped)))[1]


def decode_step(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    *,
    own_tokens: tuple[OwnTokens, ...] = (),
    base_hidden: Float[Array, "B 1 D"] | None = None,
) -> DecodeState:
    """Generate one token per running row.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: where the rows are.
        own_tokens: what each value network with its own vocabulary has to read, so that it has read
            the row's text so far.
        base_hidden: of `read_base`, if the base has read these rows' last tokens.

    Returns:
        The state afterwards.
    """
    # A row that is done reads its last token again, into the slot where it already is.
    tokens = state.last_tokens[:, None]
    logits, base_logits, state = read_tokens(
        composition,
        params,
        state,
        tokens,
        positions=state.last_positions[:, None],
        wanted=jnp.zeros_like(tokens),
        own_tokens=own_tokens,
        base_hidden=base_hidden,
    )
    return append_tokens(state, logits[:, 0], base_logits[:, 0])


def read_base(
    composition: Composition, params: ComposedParams, state: DecodeState
) -> tuple[DecodeState, Float[Array, "B 1 D"]]:
    """Let the base alone read each row's last token, ahead of the next step.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: where the rows are.

    Returns:
        The state with the base's cache one token ahead, which changes nothing for any later step,
        and the base's final hidden states, for a `decode_step` of the same rows.
    """
    hidden, cache = run_cached(
        composition.base,
        params.base,
        state.caches.base,
        state.last_tokens[:, None],
        positions=state.last_positions[:, None],
    )
    return state._replace(caches=state.caches._replace(base=cache)), hidden


def halt(state: DecodeState, stopped: Bool[Array, " B"]) -> DecodeState:
    """End running rows.

    Args:
        state: where the rows are.
        stopped: [B], which of them end.

    Returns:
        The state with these rows' finish reason; the host knows why they ended.
    """
    halted = stopped & state.running
    reason = jnp.int32(FinishReason.STOP_STRING)
    return state._replace(finish=jnp.where(halted, reason, state.finish))


def read_tokens(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    wanted: Int[Array, "B C"],
    prompt_lengths: Int[Array, " B"] | None = None,
    own_tokens: tuple[OwnTokens, ...] = (),
    base_hidden: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, "B C V"], Float[Array, "B C V"], DecodeState]:
    """Run base and value networks over tokens, and compose the logits where they are wanted.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: its caches are read and written; tokens and lengths are left alone.
        tokens: [B T] token ids.
        positions: [B T] position of each token, and its slot in every cache.
        wanted: [B C] which of the T tokens' predictions are composed (index into T).
        prompt_lengths: [B] real tokens of each row, where these are its first; None: it continues.
        own_tokens: what each value network with its own vocabulary reads; C is then 1.
        base_hidden: the base's final hidden states, if it has read these tokens.

    Returns:
        Composed logits [B C V] and those of the base alone, both in float32, and the state with new
        caches.
    """
    at_most = widest_block(composition, tokens.shape[1])
    assert prompt_lengths is not None or tokens.shape[1] <= at_most, "more than a ring can hold"
    hidden, caches = run_networks(
        composition,
        params,
        tokens,
        positions=positions,
        caches=state.caches,
        prompt_lengths=prompt_lengths,
        base_hidden=base_hidden,
        own_texts=own_tokens,
    )
    assert caches is not None
    picked = pick(composition, hidden, wanted, own_tokens)
    logits = network_logits(composition, params, picked)
    composed = compose_requested(composition, params, logits, state.requests)
    return composed, logits.base, state._replace(caches=caches)


def compose_requested(
    composition: Composition, params: ComposedParams, logits: NetworkLogits, requests: Requests
) -> Float[Array, "B T V"]:
    """Compose logits as rows ask for it.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        logits: of every network; a draft's may take the place of the base's.
        requests: what each row asks for: its strengths and its strength policy.

    Returns:
        Composed logits in float32, −inf in the padding columns.
    """
    return compose(
        composition,
        params.values,
        logits,
        strengths=requests.strengths,
        policies=requests.policies,
    )


def widest_block(composition: Composition, wanted: int) -> int:
    """How many tokens may be added to a row in one call.

    Args:
        composition: the static half.
        wanted: how many there are (tokens).

    Returns:
        As many, or what a ring can take where a network may have rings.
    """
    each = (composition.base, *composition.values, composition.draft)
    archs = [network.arch for network in each if network is not None and not network.mapped]
    windows = [arch.sliding_window for arch in archs if isinstance(arch, ArchConfig)]
    return wanted if all(window is None for window in windows) else min(wanted, LOOKAHEAD)


def append_tokens(
    state: DecodeState, logits: Float[Array, "B V"], base_logits: Float[Array, "B V"]
) -> DecodeState:
    """Choose the next token of every row.

    Args:
        state: where the rows are.
        logits: [B V] composed, after each row's last token.
        base_logits: [B V] those of the base alone.

    Returns:
        The state with one token more in each running row, its length and its finish reason.
    """
    requests = state.requests
    token_indices = state.lengths - requests.prompt_lengths
    chosen = sample_tokens(logits, requests.sampling, requests.keys, token_indices)
    stopped = jnp.any(chosen[:, None] == requests.stop_ids, axis=1)
    finite, top = are_finite(logits), state.top_log_probs
    return state.extended(
        chosen[:, None],
        (state.running & finite).astype(jnp.int32),
        stopped=stopped,
        failed=~finite,
        log_probs=None if top is None else score_chosen(logits, base_logits, chosen, top=top),
    )
