"""Teacher forcing: scores given texts token by token under a composition, in bucketed batches.

In: a composed model and rows of token ids. Out: for each token after a row's first, its
log-probability and whether it is the arg-max; on request, the same for the base alone, the
divergence between the two, and the size of the value logits.

A value network with its own vocabulary is conditioned on each prefix as in decoding: re-tokenised
(`ivl_jax.composed.own_prefixes`).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from ivl_jax.buckets import bucket
from ivl_jax.composed.forward import compose, network_logits, pick, run_networks
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.composed.own_prefixes import OwnPrefixes, plan_prefixes
from ivl_jax.composed.strength_policies import RowPolicies, rows_of
from ivl_jax.composed.token_scores import (
    at_temperature,
    candidate_scores,
    choose_chunk_length,
    join_positions,
    score_positions,
    split_positions,
)
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.requests import EncodedPrompt
from ivl_jax.sharding import batch_ways
from ivl_jax.vocabulary.retokenize import RetokenizedText

_SMALLEST_LENGTH = 16
# Composed logits that exist at once: 32 MB in float32 nearly fits a CPU's caches, 512 MB is enough
# to fill an accelerator's matmuls.
_MAX_LOGITS = {"cpu": 1 << 23}
_MAX_LOGITS_ACCELERATOR = 1 << 27
_TOKEN_NAMES = ("log_prob", "top1")
_NAMES = {
    False: _TOKEN_NAMES,
    True: (*_TOKEN_NAMES, "base_log_prob", "base_top1", "base_kl", "value_l1", "base_entropy"),
}


class NonFiniteScoresError(ArithmeticError):
    """A composition whose log-probabilities are not finite numbers."""


class TokenScores(NamedTuple):
    """A composition's scores of given tokens; NumPy [N] per row on the host."""

    log_prob: Float[Array | np.ndarray, "*T"]  # log p(token | those before it), nats
    largest: Bool[Array | np.ndarray, "*T"]  # the token has the largest logit, ties included


class BaseScores(NamedTuple):
    """How the composition differs from its base, token by token."""

    log_prob: Float[Array | np.ndarray, "*T"]  # of the base alone, nats
    largest: Bool[Array | np.ndarray, "*T"]  # of the base alone
    divergence: Float[Array | np.ndarray, "*T"]  # KL(composed ‖ base) of the next token, nats
    magnitude: Float[Array | np.ndarray, "*T M"]  # mean over V of |z_value|, per value network
    entropy: Float[Array | np.ndarray, "*T"]  # of the base alone, nats


class RowScores(NamedTuple):
    """The scores of a row of n tokens; entry t is for token t + 1."""

    tokens: TokenScores  # [n − 1]
    choices: TokenScores  # [c], candidates for the last token: the row's own, then the others
    base: BaseScores | None  # [n − 1]; None unless requested


class Row(NamedTuple):
    """Token ids to score, at least two."""

    token_ids: Sequence[int]
    other_last: Sequence[int] = ()  # other candidates for the last token
    prompt: EncodedPrompt | None = None
    """The beginning of `token_ids`, from `ComposedModel.prepare`: value networks with their own
    vocabulary then read it as in decoding (a dialogue in their own template). With such networks,
    scores of the prompt itself are NaN, because they do not predict it."""
    name: str = ""
    """What messages call it, such as "few.jsonl:3"; empty: "row 2", its index."""


def score_rows(
    model: ComposedModel,
    rows: Sequence[Row],
    *,
    batch_size: int,
    with_base: bool = False,
    temperature: float = 1.0,
) -> Iterator[tuple[int, RowScores]]:
    """Score rows, longest first, so that running out of memory happens at once.

    Shapes come from a few buckets (2ᵏ and 3·2ᵏ⁻¹ tokens), so that few programs are compiled.

    Args:
        model: the model that scores them, with its own strengths.
        rows: at most the model's context plus one tokens each, as the last one is only predicted.
        batch_size: rows scored together.
        with_base: also compare with the base alone.
        temperature: what composed logits are divided by, and the base's.

    Yields:
        Index of a row and its scores, in the order of computation.

    Raises:
        ValueError: a row has fewer than two tokens, is too long, or has ids outside the vocabulary;
            raised before anything is computed.
        NonFiniteScoresError: the composed logits of a row are not finite numbers.
    """
    for index, row in enumerate(rows):
        _check_row(model, index, row)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].token_ids))
    # The last batch is padded to the size of the others, which is cheaper than compiling again.
    batch = padded_rows(model, min(batch_size, bucket(len(rows), smallest=1)))
    mapped = bool(model.composition.mapped)
    waiting: tuple[list[int], Any] | None = None
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # The device computes this batch while the host splits up the previous one.
        arrays = batch_arrays(model, [rows[index] for index in chosen], batch)
        if temperature != 1:
            arrays["temperature"] = np.float32(temperature)
        scored = _program(model.composition)(model.params, with_base=with_base, **arrays)
        if waiting is not None:
            yield from _by_row(rows, *waiting, mapped=mapped)
        waiting = chosen, scored
    if waiting is not None:
        yield from _by_row(rows, *waiting, mapped=mapped)


def score_tokens(
    composition: Composition,
    params: ComposedParams,
    tokens: Int[Array, "B T"],
    *,
    lengths: Int[Array, " B"],
    candidates: Int[Array, "B C"],
    strengths: Float[Array, "B M"],
    policies: RowPolicies | None = None,
    max_logits: int,
    with_base: bool,
    prefixes: tuple[OwnPrefixes, ...] = (),
    temperature: float | Float32[Array, ""] = 1.0,
) -> tuple[TokenScores, TokenScores, BaseScores | None]:
    """Score each next token of rows; pure.

    Args:
        composition: the static half of the model.
        params: its arrays.
        tokens: [B T] right-padded with any id: real tokens never see padding.
        lengths: [B] real tokens per row.
        candidates: [B C] ids for the token after a row's last.
        strengths: [B M], α of each value network.
        policies: strength policies by name; None: constant strengths.
        max_logits: composed logits that may exist at once; the head runs over chunks of T.
        with_base: also compare with the base alone.
        prefixes: what each value network with its own vocabulary reads, in their order.
        temperature: what composed logits are divided by, and the base's.

    Returns:
        Scores [B T] of the token after each position (after the last real one, the first
        candidate); scores [B C] of the candidates; the comparison [B T], or None.
    """
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    hidden, _ = run_networks(composition, params, tokens, positions=positions, own_texts=prefixes)
    at_end = lengths[:, None] - 1
    following = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    is_end = jnp.arange(length, dtype=jnp.int32)[None, :] == at_end
    targets = jnp.where(is_end, candidates[:, :1], following)

    last = network_logits(composition, params, pick(composition, hidden, at_end))
    composed = compose(composition, params.values, last, strengths=strengths, policies=policies)
    composed = at_temperature(composed[:, 0], temperature)
    choices = TokenScores(*candidate_scores(composed, candidates))

    def one_chunk(chunk: Any) -> dict[str, Array]:
        return score_positions(
            composition,
            params,
            *chunk,
            strengths=strengths,
            policies=policies,
            names=_NAMES[with_base],
            temperature=temperature,
        )

    size = choose_chunk_length(
        rows, length, composition.base.arch.vocab_size, max_logits=max_logits
    )
    scored = jax.lax.map(one_chunk, split_positions(size, (hidden, targets)))
    found = join_positions(length, scored)
    base = None
    if with_base:
        base = BaseScores(
            found["base_log_prob"],
            found["base_top1"],
            found["base_kl"],
            found["value_l1"],
            found["base_entropy"],
        )
    return TokenScores(found["log_prob"], found["top1"]), choices, base


@functools.cache
def _program(composition: Composition) -> Callable[..., Any]:
    """`score_tokens` of one composition, jitted only here and compiled once per shape."""

    def program(params: Any, *, max_logits: int, with_base: bool, **arrays: Any) -> Any:
        return score_tokens(
            composition, params, max_logits=max_logits, with_base=with_base, **arrays
        )

    return jax.jit(program, static_argnames=("max_logits", "with_base"))


def padded_rows(model: ComposedModel, count: int) -> int:
    """The least number of rows, at least `count`, that divides evenly over a model's devices."""
    layout = model.composition.base.layout
    ways = 1 if layout is None else batch_ways(layout.mesh)
    return -(-count // ways) * ways


def batch_arrays(model: ComposedModel, rows: Sequence[Row], batch: int) -> dict[str, Any]:
    """Collect rows in a batch of bucketed shape.

    Args:
        model: the model that scores them.
        rows: at most `batch`.
        batch: rows of the arrays, B.

    Returns:
        What `score_tokens` takes of them, with the model's own strengths.
    """
    lengths = [len(row.token_ids) - 1 for row in rows]
    length = bucket(max(lengths), smallest=_SMALLEST_LENGTH, largest=model.context)
    tokens = np.zeros((batch, length), np.int32)
    width = bucket(max(len(row.other_last) for row in rows) + 1, smallest=1)
    candidates = np.zeros((batch, width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : lengths[index]] = row.token_ids[:-1]
        candidates[index, : len(row.other_last) + 1] = [row.token_ids[-1], *row.other_last]
    return {
        "tokens": tokens,
        "lengths": np.asarray(lengths + [1] * (batch - len(rows)), np.int32),
        "candidates": candidates,
        "strengths": np.tile(np.asarray(model.strengths, np.float32), (batch, 1)),
        "policies": rows_of(model.policy) or None,
        "max_logits": _MAX_LOGITS.get(jax.default_backend(), _MAX_LOGITS_ACCELERATOR),
        "prefixes": tuple(
            _prefixes([_own_text(model, row, index) for row in rows], rows, tokens.shape)
            for index in range(len(model.composition.mapped))
        ),
    }


def _first_scored(row: Row) -> int:
    """The first position whose prediction is scored: the prompt's last token."""
    return 0 if row.prompt is None else len(row.prompt.token_ids) - 1


def _own_text(model: ComposedModel, row: Row, index: int) -> RetokenizedText:
    """A row up to the first scored position, as a network with its own vocabulary reads it."""
    if row.prompt is not None:
        text = row.prompt.own_texts[index]
        assert isinstance(text, RetokenizedText), "every network reads these"
        return text
    own = [own for own in model.own_vocabularies if own][index]
    return own.retokenizer.begin(row.token_ids[:1])


def _prefixes(
    beginnings: Sequence[RetokenizedText], rows: Sequence[Row], shape: tuple[int, ...]
) -> OwnPrefixes:
    starts = [_first_scored(row) for row in rows]
    following = [row.token_ids[at + 1 : -1] for at, row in zip(starts, rows, strict=True)]
    batch, length = shape
    return plan_prefixes(beginnings, following, starts=starts, batch=batch, length=length)


def _by_row(
    rows: Sequence[Row], chosen: Sequence[int], scored: Any, *, mapped: bool
) -> Iterator[tuple[int, RowScores]]:
    """A batch's scores, row by row."""
    tokens, choices, base = jax.device_get(scored)
    for place, index in enumerate(chosen):
        row = rows[index]
        targets = len(row.token_ids) - 1
        own_choices = _cut(choices, place, len(row.other_last) + 1)
        own_tokens, own_base = _cut(tokens, place, targets), _cut(base, place, targets)
        first = _first_scored(row) if mapped else 0
        _check_finite(_called(index, row), own_tokens.log_prob[first:], own_choices.log_prob)
        if mapped:
            _blank((own_tokens, own_base), first)
        yield index, RowScores(own_tokens, own_choices, own_base)


def _called(index: int, row: Row) -> str:
    return row.name or f"row {index}"


def _check_finite(name: str, *log_probs: np.ndarray) -> None:
    """A figure that counts such a row would be NaN, or count it as wrong in silence."""
    if not all(np.isfinite(each).all() for each in log_probs):
        raise NonFiniteScoresError(
            f"{name}: log-probabilities that are not finite (NaN or infinite): the weights of "
            "a network hold such numbers, its logits overflow in this dtype, or a strength is too "
            "large; check the weights, score in float32, or use a smaller strength"
        )


def _cut(scores: Any, place: int, length: int) -> Any:
    """One row's part; copied, since a view would keep the whole batch in memory."""
    return jax.tree.map(lambda array: array[place, :length].copy(), scores)


def _blank(scores: Any, until: int) -> None:
    """Replace the scores of a prompt by NaN, or False."""
    for array in jax.tree.leaves(scores):
        array[:until] = False if array.dtype == bool else np.nan


def _check_row(model: ComposedModel, index: int, row: Row) -> None:
    length, known = len(row.token_ids), model.composition.base.vocab_size
    name = _called(index, row)
    if length < 2:
        raise ValueError(f"{name}: expected at least 2 tokens to score, got {length}")
    if length > model.context + 1:
        raise ValueError(
            f"{name}: {length} tokens are {length - model.context - 1} more than the context "
            f"of {model.context} tokens (that of {model.context_of}) and one to predict"
        )
    for number, own in enumerate(filter(None, model.own_vocabularies)):
        text = _own_text(model, row, number).fork()
        text.push(row.token_ids[_first_scored(row) + 1 : -1])
        if len(text.tokens) > own.context:
            raise ValueError(
                f"{name}: {len(text.tokens)} tokens are {len(text.tokens) - own.context} more "
                f"than the context of {own.context} tokens of {own.name}, in its own vocabulary"
            )
    invalid = [i for i in (*row.token_ids, *row.other_last) if not 0 <= i < known]
    if invalid:
        raise ValueError(f"{name}: token ids outside [0, {known}): {invalid[:5]}")
