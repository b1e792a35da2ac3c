"""Teacher forcing: what a composition says of given texts, token by token, in bucketed batches.

In: a composed model and rows of token ids. Out: for each token after a row's first, its
log-probability and whether it is the arg-max; where asked for, the same of the base alone, the
divergence between the two, and the size of the value logits.

A value network with its own vocabulary is conditioned on each prefix as it would read it while
decoding: re-tokenised (`ivl_jax.decoding.prefix_reading`).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from ivl_jax.composition import ValueTerm, compose_logits, value_hidden
from ivl_jax.decoding.forward import constraint_of, known_tokens
from ivl_jax.decoding.prefix_reading import PrefixReading, lay_out_prefixes, read_prefixes
from ivl_jax.decoding.requests import EncodedPrompt, bucket
from ivl_jax.decoding.state import ComposedParams, Composition
from ivl_jax.decoding.text import ComposedModel
from ivl_jax.model.decoder import hidden_states, logits_from_hidden
from ivl_jax.sharding import batch_ways
from ivl_jax.vocabulary.retokenize import RetokenizedText

_SMALLEST_LENGTH = 16
# Composed logits that exist at once: 32 MB in float32 stays near a CPU's caches, 512 MB fills an
# accelerator's matmuls.
_MAX_LOGITS = {"cpu": 1 << 23}
_MAX_LOGITS_ACCELERATOR = 1 << 27


class TokenScores(NamedTuple):
    """What a composition says of the tokens it reads; numpy [N] a row on the host."""

    log_prob: Float[Array | np.ndarray, "*T"]  # log p(token | those before it), nats
    largest: Bool[Array | np.ndarray, "*T"]  # the token has the largest logit, ties included


class BaseScores(NamedTuple):
    """How the composition differs from its base, token by token."""

    log_prob: Float[Array | np.ndarray, "*T"]  # of the base alone, nats
    largest: Bool[Array | np.ndarray, "*T"]  # of the base alone
    divergence: Float[Array | np.ndarray, "*T"]  # KL(composed ‖ base) of the next token, nats
    magnitude: Float[Array | np.ndarray, "*T M"]  # mean over V of |z_value|, each value network


class RowScores(NamedTuple):
    """One row of n tokens, scored: entry t is about token t + 1."""

    tokens: TokenScores  # [n − 1]
    choices: TokenScores  # [c], other candidates for the last token; the last one itself first
    base: BaseScores | None  # [n − 1]; None where not asked for


class Row(NamedTuple):
    """Token ids to score, at least two."""

    token_ids: Sequence[int]
    other_last: Sequence[int] = ()  # candidates that may stand in the last token's place
    prompt: EncodedPrompt | None = None
    """What `token_ids` begin with, as `ComposedModel.prepare` gives it: value networks with their
    own vocabulary then read it as they do while decoding (a dialogue through their own template).
    With such networks, scores of the prompt itself are NaN: they never predict it."""


def score_rows(
    model: ComposedModel, rows: Sequence[Row], *, batch_size: int, with_base: bool = False
) -> Iterator[tuple[int, RowScores]]:
    """Score rows, longest first, so that what runs out of memory does so at once.

    Shapes come from few buckets (2ᵏ and 3·2ᵏ⁻¹ tokens): rows of other lengths compile nothing new.

    Args:
        model: what scores them, with its own strengths.
        rows: none longer than the model's context plus one, for the last token is only predicted.
        batch_size: rows scored together.
        with_base: also compare with the base alone.

    Yields:
        Index of a row and its scores, in the order of computation.

    Raises:
        ValueError: a row has fewer than two tokens, is too long, or has ids outside the vocabulary;
            raised before anything is computed.
    """
    for index, row in enumerate(rows):
        _check_row(model, index, row)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].token_ids))
    # The last batch is as large as the others: filling it up is cheaper than compiling once more.
    layout = model.composition.base.layout
    ways = 1 if layout is None else batch_ways(layout.mesh)
    batch = -(-min(batch_size, bucket(len(rows), smallest=1)) // ways) * ways
    mapped = bool(model.composition.mapped)
    waiting: tuple[list[int], Any] | None = None
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # The device works on this batch while the host takes the one before it apart.
        scored = _dispatch(model, [rows[index] for index in chosen], batch, with_base)
        if waiting is not None:
            yield from _apart(rows, *waiting, mapped=mapped)
        waiting = chosen, scored
    if waiting is not None:
        yield from _apart(rows, *waiting, mapped=mapped)


def score_tokens(
    composition: Composition,
    params: ComposedParams,
    tokens: Int[Array, "B T"],
    *,
    lengths: Int[Array, " B"],
    candidates: Int[Array, "B C"],
    strengths: Float[Array, "B M"],
    max_logits: int,
    with_base: bool,
    prefixes: tuple[PrefixReading, ...] = (),
) -> tuple[TokenScores, TokenScores, BaseScores | None]:
    """Read rows and score each next token; pure.

    Args:
        composition: the static half of the model.
        params: its arrays.
        tokens: [B T] right-padded with any id: a padded token is never seen by a real one.
        lengths: [B] real tokens of each row.
        candidates: [B C] ids for the token after a row's last.
        strengths: [B M], α of each value network.
        max_logits: composed logits that may exist at once; the head runs over parts of T.
        with_base: also compare with the base alone.
        prefixes: what each value network with its own vocabulary reads, in their order.

    Returns:
        Scores [B T] of the token after each (the last real one's is the first candidate's); scores
        [B C] of the candidates; the comparison [B T], or None.
    """
    hidden = _read(composition, params, tokens, prefixes)
    rows, length = tokens.shape
    at_end = lengths[:, None] - 1
    following = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    is_end = jnp.arange(length, dtype=jnp.int32)[None, :] == at_end
    targets = jnp.where(is_end, candidates[:, :1], following)

    last = jax.tree.map(lambda h: jnp.take_along_axis(h, at_end[:, :, None], axis=1), hidden)
    composed, _, _ = _logits(composition, params, last, strengths)
    choices = jax.vmap(_scores, in_axes=(None, 1), out_axes=1)(composed[:, 0], candidates)

    def one_part(part: Any) -> tuple[TokenScores, BaseScores | None]:
        hidden, targets = part
        composed, base, magnitude = _logits(composition, params, hidden, strengths)
        scores = _scores(composed, targets)
        if not with_base:
            return scores, None
        alone = _scores(base, targets)
        kept = jax.nn.log_softmax(composed)
        # 0 · (−inf − −inf) at padding columns counts as 0.
        gap = jnp.where(jnp.isfinite(kept), kept - jax.nn.log_softmax(base), 0.0)
        divergence = jnp.sum(jnp.exp(kept) * gap, axis=-1)
        return scores, BaseScores(alone.log_prob, alone.largest, divergence, magnitude)

    parts = _count_parts(rows * composition.base.arch.vocab_size, length, max_logits)
    scored = jax.lax.map(one_part, _split((hidden, targets), parts))
    scores, base = jax.tree.map(lambda array: _joined(array, length), scored)
    return scores, choices, base


@functools.cache
def _program(composition: Composition) -> Callable[..., Any]:
    """`score_tokens` of one composition, compiled once a shape: the one place where it is."""

    def program(
        params: Any, tokens: Any, *, max_logits: int, with_base: bool, **arrays: Any
    ) -> Any:
        return score_tokens(
            composition, params, tokens, max_logits=max_logits, with_base=with_base, **arrays
        )

    return jax.jit(program, static_argnames=("max_logits", "with_base"))


def _dispatch(model: ComposedModel, rows: Sequence[Row], batch: int, with_base: bool) -> Any:
    """Lay rows out in a batch of bucketed shape and start scoring them."""
    lengths = [len(row.token_ids) - 1 for row in rows]
    length = bucket(max(lengths), smallest=_SMALLEST_LENGTH, largest=model.context)
    tokens = np.zeros((batch, length), np.int32)
    width = bucket(max(len(row.other_last) for row in rows) + 1, smallest=1)
    candidates = np.zeros((batch, width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : lengths[index]] = row.token_ids[:-1]
        candidates[index, : len(row.other_last) + 1] = [row.token_ids[-1], *row.other_last]
    return _program(model.composition)(
        model.params,
        tokens,
        lengths=np.asarray(lengths + [1] * (batch - len(rows)), np.int32),
        candidates=candidates,
        strengths=np.tile(np.asarray(model.strengths, np.float32), (batch, 1)),
        max_logits=_MAX_LOGITS.get(jax.default_backend(), _MAX_LOGITS_ACCELERATOR),
        with_base=with_base,
        prefixes=tuple(
            _prefixes([_own_text(model, row, index) for row in rows], rows, tokens.shape)
            for index in range(len(model.composition.mapped))
        ),
    )


def _first_scored(row: Row) -> int:
    """The first position whose prediction counts: the prompt's last token."""
    return 0 if row.prompt is None else len(row.prompt.token_ids) - 1


def _own_text(model: ComposedModel, row: Row, index: int) -> RetokenizedText:
    """A row up to the first position that counts, as a network with its own vocabulary reads it."""
    if row.prompt is not None:
        return row.prompt.own_texts[index]
    own = [own for own in model.own_vocabularies if own][index]
    return own.retokenizer.begin(row.token_ids[:1])


def _prefixes(
    beginnings: Sequence[RetokenizedText], rows: Sequence[Row], shape: tuple[int, ...]
) -> PrefixReading:
    starts = [_first_scored(row) for row in rows]
    following = [row.token_ids[at + 1 : -1] for at, row in zip(starts, rows, strict=True)]
    batch, length = shape
    return lay_out_prefixes(beginnings, following, starts=starts, batch=batch, length=length)


def _apart(
    rows: Sequence[Row], chosen: Sequence[int], scored: Any, *, mapped: bool
) -> Iterator[tuple[int, RowScores]]:
    """A batch's scores, row by row."""
    tokens, choices, base = jax.device_get(scored)
    for place, index in enumerate(chosen):
        row = rows[index]
        targets = len(row.token_ids) - 1
        own_choices = _cut(choices, place, len(row.other_last) + 1)
        own_tokens, own_base = _cut(tokens, place, targets), _cut(base, place, targets)
        if mapped:
            _blank((own_tokens, own_base), _first_scored(row))
        yield index, RowScores(own_tokens, own_choices, own_base)


def _cut(scores: Any, place: int, length: int) -> Any:
    """One row's part; a copy, for a view would keep its whole batch in memory."""
    return jax.tree.map(lambda array: array[place, :length].copy(), scores)


def _blank(scores: Any, until: int) -> None:
    """Let what was said of a prompt be NaN, or False."""
    for array in jax.tree.leaves(scores):
        array[:until] = False if array.dtype == bool else np.nan


def _check_row(model: ComposedModel, index: int, row: Row) -> None:
    length, known = len(row.token_ids), model.composition.base.vocab_size
    if length < 2:
        raise ValueError(f"row {index}: expected at least 2 tokens to score, got {length}")
    if length > model.context + 1:
        raise ValueError(
            f"row {index}: {length} tokens are {length - model.context - 1} more than the context "
            f"of {model.context} tokens (that of {model.context_of}) and one to predict"
        )
    for number, own in enumerate(filter(None, model.own_vocabularies)):
        text = _own_text(model, row, number).fork()
        text.push(row.token_ids[_first_scored(row) + 1 : -1])
        if len(text.tokens) > own.context:
            raise ValueError(
                f"row {index}: {len(text.tokens)} tokens are {len(text.tokens) - own.context} more "
                f"than the context of {own.context} tokens of {own.name}, in its own vocabulary"
            )
    strange = [i for i in (*row.token_ids, *row.other_last) if not 0 <= i < known]
    if strange:
        raise ValueError(f"row {index}: token ids outside [0, {known}): {strange[:5]}")


def _read(
    composition: Composition,
    params: ComposedParams,
    tokens: Int[Array, "B T"],
    prefixes: tuple[PrefixReading, ...],
) -> tuple[Array, tuple[Array, ...]]:
    """Final hidden states [B T D] of the base and of each value network."""
    base = composition.base
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    base_hidden, _ = hidden_states(
        base.graphdef, params.base, tokens, positions=positions, constrain=constraint_of(base)
    )
    base_logits = None
    if any(network.connection != "residual" for network in composition.values):
        base_logits = logits_from_hidden(base.graphdef, params.base, base_hidden)
    found, own = [], iter(prefixes)
    for index, network in enumerate(composition.values):
        if network.mapped:
            found.append(read_prefixes(network, params.values[index], next(own)))
            continue
        assert network.connection is not None
        hidden, _ = value_hidden(
            network.connection,
            network.graphdef,
            params.values[index],
            known_tokens(network, tokens, params.unknown_ids[index]),
            base_logits=base_logits,
            vocab_size=base.vocab_size,
            positions=positions,
            constrain=constraint_of(network),
        )
        found.append(hidden)
    return base_hidden, tuple(found)


def _logits(
    composition: Composition,
    params: ComposedParams,
    hidden: tuple[Array, tuple[Array, ...]],
    strengths: Float[Array, "B M"],
) -> tuple[Float32[Array, "B T V"], Float32[Array, "B T V"], Float32[Array, "B T M"]]:
    """Composed logits, the base's alone, and mean |z_value| of each value network."""
    base = composition.base
    base_logits = logits_from_hidden(base.graphdef, params.base, hidden[0])
    terms, magnitudes, maps = [], [], iter(params.vocabulary_maps)
    for index, network in enumerate(composition.values):
        logits = logits_from_hidden(network.graphdef, params.values[index], hidden[1][index])
        terms.append(
            ValueTerm(
                logits,
                strengths[:, index],
                network.vocab_size,
                None if network.mapped else params.unknown_ids[index],
                next(maps) if network.mapped else None,
                network.centred,
            )
        )
        real = jnp.arange(logits.shape[-1]) < network.vocab_size
        total = jnp.sum(jnp.where(real[None, None, :], jnp.abs(logits), 0.0), axis=-1)
        magnitudes.append(total / network.vocab_size)
    empty = jnp.zeros((*base_logits.shape[:2], 0), jnp.float32)
    return (
        compose_logits(base_logits, terms, vocab_size=base.vocab_size),
        compose_logits(base_logits, (), vocab_size=base.vocab_size),
        jnp.stack(magnitudes, axis=-1) if magnitudes else empty,
    )


def _scores(logits: Float32[Array, "*B V"], targets: Int[Array, "*B"]) -> TokenScores:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_prob = chosen - jax.nn.logsumexp(logits, axis=-1)
    return TokenScores(log_prob, chosen >= jnp.max(logits, axis=-1))


def _count_parts(logits_a_position: int, length: int, max_logits: int) -> int:
    return -(-length // max(1, max_logits // logits_a_position))


def _split(tree: Any, parts: int) -> Any:
    """[B T …] to [parts B t …]; T is padded with zeros to a multiple."""

    def one(array: Array) -> Array:
        rows, length = array.shape[:2]
        size = -(-length // parts)
        padding = [(0, 0), (0, parts * size - length), *[(0, 0)] * (array.ndim - 2)]
        padded = jnp.pad(array, padding)
        return jnp.moveaxis(padded.reshape(rows, parts, size, *array.shape[2:]), 1, 0)

    return jax.tree.map(one, tree)


def _joined(array: Array, length: int) -> Array:
    """[parts B t …] back to [B T …]."""
    together = jnp.moveaxis(array, 0, 1)
    rows, parts, size, *rest = together.shape
    return together.reshape(rows, parts * size, *rest)[:, :length]
