"""Drafting with n-grams of the text (`--draft ngram`), beside the same model without a draft.

How much is accepted depends on what a model writes, so that the base is a real one,
SmolLM2-135M-Instruct. Its value network is made of a few of its own layers and is not trained: it
costs what a trained one would, and steers so weakly that the text stays the base's. Out: a row for
word problems and for edits of code, with and without the value network, of one prompt at a time and
of eight together. Greedy texts must be the same with and without a draft.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.chat_prompts import CODE_EDITS, find_word_problems
from benchmarks.report import Options, Peer, Report, Row
from benchmarks.shapes import parameter_count
from benchmarks.smollm2 import NO_FOLDER, find_folder
from benchmarks.timing import time_in_turn
from ivl_jax.data.formats import Message
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.generation import Generation
from ivl_jax.decoding.given_prompts import PlainPrompt
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.experiments.real.layer_sibling import kept_layers, sibling_arch, sibling_params
from ivl_jax.weights.language_model import LanguageModel, load_language_model

ABOUT = "speed with n-grams of the text as the draft, on word problems and edits of code"

_PLAIN, _DRAFTED = "without a draft", "with n-grams"
_FIRST, _LAST = 2, 1  # of the base's layers, for the value network
_STRENGTH = 0.05
_NEAR_TIE = 1e-3  # nats between two tokens either of which may win by rounding


class Plan(NamedTuple):
    """How much is measured."""

    prompts: int
    """Of each kind."""
    new_tokens: int
    """Of an answer, at most."""
    batches: tuple[int, ...]
    """Prompts decoded together."""
    repeats: int


_FULL = Plan(8, 128, (1, 8), 5)
_QUICK = Plan(2, 32, (1,), 1)


class Models(NamedTuple):
    """One composition."""

    name: str
    plain: ComposedModel
    drafted: ComposedModel


def run(options: Options) -> Report:
    """Answer with and without n-grams in turn.

    Args:
        options: quick: two prompts of each kind, 32 new tokens, one at a time, one repeat.

    Returns:
        The report; without rows where the real model is missing.
    """
    folder = find_folder()
    if folder is None:
        return Report([], dtype="float32", shapes={}, skipped={"everything": NO_FOLDER})
    plan = _QUICK if options.quick else _FULL
    problems = find_word_problems(plan.prompts)
    texts = {problems.source: problems.texts, "edits of code": CODE_EDITS[: plan.prompts]}
    prompts = {
        kind: [[Message("user", text)] for text in of_kind] for kind, of_kind in texts.items()
    }
    base, with_value = models = make_models(folder)
    rows = [
        row
        for kind, of_kind in prompts.items()
        for composition in models
        for batch in plan.batches
        for row in rows_of(composition, kind, of_kind, batch, plan)
    ]
    (value,) = with_value.plain.values
    assert isinstance(value, LanguageModel)
    lengths = {
        f"tokens of a prompt, {kind}": _range(len(base.plain.encode(one)) for one in of_kind)
        for kind, of_kind in prompts.items()
    }
    shapes = {
        "base": f"SmolLM2-135M-Instruct, {parameter_count(base.plain.base.arch)}",
        "value": f"{parameter_count(value.arch)}, untrained: {_FIRST + _LAST} of the base's layers",
        "strength": _STRENGTH,
        "prompts of each kind": plan.prompts,
        **lengths,
        "new tokens, at most": plan.new_tokens,
    }
    return Report(rows, dtype="float32", shapes=shapes)


def make_models(folder: Path) -> tuple[Models, Models]:
    """The base alone, and with a value network made of its own layers; its weights are held once.

    Args:
        folder: of the base.

    Returns:
        Both, each without a draft and with n-grams.
    """
    as_trained = load_language_model(folder)
    kept = kept_layers(_FIRST, _LAST, layers=as_trained.arch.num_hidden_layers)
    sibling = dataclasses.replace(
        as_trained,
        path="a few layers of the base",
        arch=sibling_arch(as_trained.arch, kept),
        params=sibling_params(as_trained.params, kept),
    )
    alone = compose(as_trained)
    composed, drafted = (
        compose(alone.base, sibling, strengths=_STRENGTH, draft=draft) for draft in (None, "ngram")
    )
    return (
        Models("the base alone", alone, compose(alone.base, draft="ngram")),
        Models("base and value network", composed, drafted),
    )


def rows_of(
    models: Models, kind: str, prompts: Sequence[PlainPrompt], batch: int, plan: Plan
) -> Iterator[Row]:
    """One row: tokens per second with n-grams, beside those without.

    Args:
        models: the composition.
        kind: what to call the prompts.
        prompts: answered in each timed call.
        batch: prompts decoded together.
        plan: how long and how often.

    Raises:
        RuntimeError: the texts differ by more than a near-tie.
    """
    options = GenerationOptions(max_new_tokens=plan.new_tokens)
    contenders = {_PLAIN: models.plain, _DRAFTED: models.drafted}
    found: dict[str, list[Generation]] = {}

    def answer(name: str) -> None:
        found[name] = contenders[name].generate(prompts, options, batch_size=batch)

    works = {name: functools.partial(answer, name) for name in contenders}
    timings = time_in_turn(works, repeats=plan.repeats)
    same = count_same(models.plain, prompts, found)
    rates = {
        name: timings[name].rate(sum(len(one.token_ids) for one in found[name])) for name in works
    }
    drafted = found[_DRAFTED]
    accepted = sum(one.accepted_tokens for one in drafted)
    proposed = sum(one.proposed_tokens for one in drafted)
    differing = "" if same == len(prompts) else f"; {same} of {len(prompts)} texts the same"
    yield Row(
        f"{kind}, {models.name}, batch {batch}: {accepted} of {proposed} accepted, "
        f"{tokens_per_step(drafted):.2f} tokens per step{differing}",
        rates[_DRAFTED],
        "tokens/s",
        "higher",
        peer=Peer(_PLAIN, rates[_PLAIN].median),
    )


def tokens_per_step(generations: Sequence[Generation]) -> float:
    """Tokens that a row gains, on average, each time the base reads for it; 1 without a draft."""
    tokens = sum(len(one.token_ids) for one in generations)
    return tokens / (tokens - sum(one.accepted_tokens for one in generations))


def count_same(
    model: ComposedModel,
    prompts: Sequence[PlainPrompt],
    found: Mapping[str, Sequence[Generation]],
) -> int:
    """Count the prompts whose texts are the same with and without a draft.

    A base that reads several tokens at once sums in another order. Where two tokens are equally
    likely but for that rounding, either may be chosen, and the texts differ from there on.

    Args:
        model: without a draft.
        prompts: the prompts.
        found: the generations without a draft and with one.

    Returns:
        How many are the same.

    Raises:
        RuntimeError: texts differ first at a token that is no near-tie.
    """
    same = 0
    for prompt, (plain, drafted) in zip(prompts, zip(*found.values(), strict=True), strict=True):
        if plain == drafted:
            same += 1
        elif not _is_near_tie(model, model.encode(prompt), plain, drafted):
            raise RuntimeError(
                f"the text with n-grams differs from the one without: {drafted.text!r:.200} "
                f"instead of {plain.text!r:.200}"
            )
    return same


def _is_near_tie(
    model: ComposedModel, prompt: list[int], one: Generation, other: Generation
) -> bool:
    """Whether the first two tokens that differ are equally likely but for rounding."""
    pairs = enumerate(zip(one.token_ids, other.token_ids, strict=False))
    at = next((index for index, (token, another) in pairs if token != another), None)
    if at is None:
        return False
    before = [*prompt, *one.token_ids[:at]]
    (next_token,) = model.generate([before], max_new_tokens=1, log_probs=2)
    assert next_token.log_probs is not None
    likeliest = dict(next_token.log_probs[0].top)
    high, low = sorted(likeliest.values(), reverse=True)
    return set(likeliest) == {one.token_ids[at], other.token_ids[at]} and high - low < _NEAR_TIE


def _range(lengths: Iterator[int]) -> str:
    each = list(lengths)
    return f"{min(each)} to {max(each)}"
