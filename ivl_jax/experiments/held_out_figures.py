"""Every figure of a composition on the test items: one place, so that all studies' are comparable.

In: a composed model, the test items. Out: NLL by kind of question, the facts answered and recalled,
the NLL of source text that no training has seen, and sums by person and module, from which
intervals are drawn.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int

from ivl_jax.decoding.model import ComposedModel
from ivl_jax.evaluation.scoring import Row, score_rows
from ivl_jax.experiments.answer_scores import ItemScores, answer_rows, score_given
from ivl_jax.experiments.demonstrations import Item
from ivl_jax.experiments.family.corpus import Corpus, held_out_windows, load_corpus
from ivl_jax.experiments.family.facts import Fact, build_facts, split_of_person
from ivl_jax.experiments.family.recall import recalled
from ivl_jax.experiments.family.tokenizers import CONTEXT
from ivl_jax.experiments.measure import answers

# Of held-out source text; half the context, as another vocabulary may have more tokens for it.
_WINDOWS, _WINDOW_TOKENS = 128, CONTEXT // 2
_ROWS = 64  # scored together


class GroupSums(NamedTuple):
    """Sums by person and module: the items of one of them are not independent."""

    nats: Float64[np.ndarray, " G"]
    """−log p of the group's answers."""
    tokens: Float64[np.ndarray, " G"]
    right: Float64[np.ndarray, " G"]
    """Questions on facts answered word for word."""
    asked: Float64[np.ndarray, " G"]
    """Questions on facts."""

    def as_text(self) -> str:
        """Compact, for a record; see `group_sums_from`."""
        return " ".join(
            f"{nats:.3f}/{tokens:.0f}/{right:.0f}/{asked:.0f}"
            for nats, tokens, right, asked in zip(*self, strict=True)
        )


def group_sums_from(text: str) -> GroupSums:
    """Read what `GroupSums.as_text` wrote.

    >>> sums = group_sums_from("3.250/10/1/4 2.000/8/0/0")
    >>> sums.nats.tolist(), sums.asked.tolist(), sums.as_text()
    ([3.25, 2.0], [4.0, 0.0], '3.250/10/1/4 2.000/8/0/0')
    """
    parts = [[float(number) for number in group.split("/")] for group in text.split()]
    return GroupSums(*np.asarray(parts, np.float64).T)


def facts_of_test() -> list[Fact]:
    """The facts that the test items ask for, in their order."""
    return [fact for fact in build_facts() if split_of_person(fact.person) == "test"]


def figures_on(
    model: ComposedModel, items: Sequence[Item], right: Bool[np.ndarray, " N"]
) -> dict[str, Any]:
    """Measure a composition on the test items.

    Args:
        model: The composition.
        items: Of the test split, of both kinds.
        right: From `answered`.

    Returns:
        `nll`, `fact_nll` and `docstring_nll`, nats per answer token, ends included; `exact_match`,
        the share of questions on facts that greedy decoding answers word for word; `recall`, the
        share of the same facts whose statement it completes; `source_nll`, nats per token of source
        files outside all training text; `groups`, sums as text.
    """
    scores = score_given(model, *answer_rows(model, [item.given for item in items]))
    return {
        **nll_by_kind(items, scores),
        "exact_match": float(right[is_fact(items)].mean()),
        "recall": float(recalled(model, facts_of_test()).mean()),
        "source_nll": source_nll(model),
        "groups": group_sums(items, scores, right).as_text(),
    }


def nll_by_kind(items: Sequence[Item], scores: ItemScores) -> dict[str, float | None]:
    """Nats per answer token of all items and of each kind; None for a kind that no item has.

    Args:
        items: Of any kinds.
        scores: Theirs.

    Returns:
        `nll`, `fact_nll`, `docstring_nll`.
    """
    facts = is_fact(items)

    def mean(chosen: Bool[np.ndarray, " N"]) -> float | None:
        if not chosen.any():
            return None
        return float(scores.nats[chosen].sum() / scores.tokens[chosen].sum())

    everything = np.ones(len(items), bool)
    return {"nll": mean(everything), "fact_nll": mean(facts), "docstring_nll": mean(~facts)}


def scored_figures(items: Sequence[Item], scores: ItemScores) -> dict[str, float | None]:
    """What scores of given answers tell, without decoding.

    Args:
        items: Of any kinds.
        scores: Theirs.

    Returns:
        As `nll_by_kind`; `exact_match`, the share of facts of whose answer every token is the
        likeliest one after those before it: what greedy decoding answers word for word, but for
        ties. None for a kind that no item has.
    """
    facts = is_fact(items)
    right = float(scores.likeliest[facts].mean()) if facts.any() else None
    return {**nll_by_kind(items, scores), "exact_match": right}


def answered(model: ComposedModel, items: Sequence[Item]) -> Bool[np.ndarray, " N"]:
    """Which items are questions on facts that a composition answers greedily word for word."""
    asked = [item for item in items if item.kind == "fact"]
    texts = iter(answers(model, asked))
    return np.asarray([item.kind == "fact" and next(texts) == item.answer for item in items])


def group_sums(
    items: Sequence[Item], scores: ItemScores, right: Bool[np.ndarray, " N"]
) -> GroupSums:
    """Sum scores by person and module, in the order of their names.

    Args:
        items: Of both kinds.
        scores: Theirs.
        right: Which of them were answered.
    """
    names, at = np.unique([f"{item.kind} {item.group}" for item in items], return_inverse=True)

    def total(values: Float64[np.ndarray, " N"] | Int[np.ndarray, " N"] | Bool[np.ndarray, " N"]):
        return np.bincount(at, weights=values, minlength=len(names))

    return GroupSums(*map(total, (scores.nats, scores.tokens, right, is_fact(items))))


def source_nll(model: ComposedModel) -> float:
    """Nats per token of source files of this Python that are in no training text."""
    return score_windows(model, _source_windows(model))


def score_windows(model: ComposedModel, windows: Int[np.ndarray, "R T"]) -> float:
    """Nats per token of running text.

    Args:
        model: The composition.
        windows: Token ids; the first of each row is not scored.
    """
    rows = [Row(window.tolist()) for window in windows]
    scored = score_rows(model, rows, batch_size=_ROWS)
    nats = [-scores.tokens.log_prob.mean(dtype=np.float64) for _, scores in scored]
    return float(np.mean(nats))


def is_fact(items: Sequence[Item]) -> Bool[np.ndarray, " N"]:
    """Which items ask for a fact."""
    return np.asarray([item.kind == "fact" for item in items], bool)


def _source_windows(model: ComposedModel) -> Int[np.ndarray, "R T"]:
    tokenizer: Any = model.tokenizer
    return held_out_windows(_corpus(), tokenizer, length=_WINDOW_TOKENS - 1, rows=_WINDOWS)


@functools.cache
def _corpus() -> Corpus:
    return load_corpus()
