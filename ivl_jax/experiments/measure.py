"""Measures response NLL and exact match of any composition on held-out items.

In: a composed model, items. Out: nats per token of the answers, and the share of questions answered
word for word. Also builds the vocabulary map between two models of the family.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ivl_jax.checkpoint import ValueNetwork
from ivl_jax.data.formats import Message
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.experiments.answer_scores import answer_rows, score_given
from ivl_jax.experiments.demonstrations import Item, select
from ivl_jax.vocabulary.alignment import Method, build_vocabulary_map, named_tokenizer
from ivl_jax.vocabulary.mapping import save_vocabulary_map
from ivl_jax.weights.language_model import LanguageModel

FACT_TOKENS = 24
"""More than an answer about a fact has in any tokenizer of the family."""


def response_nll(
    model: ComposedModel,
    items: Sequence[Item],
    *,
    rows: int = 64,
    temperature: float = 1.0,
    advance: Callable[[], object] = lambda: None,
) -> float:
    """Mean negative log-likelihood of the answers, including the end-of-answer token.

    Args:
        model: The composition; the base's tokenizer counts the tokens.
        items: Questions and answers.
        rows: Rows per batch.
        temperature: What composed logits are divided by.
        advance: Called after each item.

    Returns:
        Nats per token, over all answer tokens of all items.
    """
    whole, masks = answer_rows(model, [item.given for item in items])
    return score_given(
        model, whole, masks, batch_size=rows, temperature=temperature, advance=advance
    ).nll


def answers(
    model: ComposedModel,
    items: Sequence[Item],
    *,
    max_new_tokens: int = FACT_TOKENS,
    batch_size: int = 64,
    advance: Callable[[], object] = lambda: None,
) -> list[str]:
    """The greedy answers of a composition.

    Args:
        model: The composition.
        items: Questions.
        max_new_tokens: The most tokens per answer.
        batch_size: Questions decoded together.
        advance: Called after each answer.

    Returns:
        One text per item.

    Raises:
        GenerationError: an answer ended with an error.
    """
    prompts = [_messages(item) for item in items]
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    generations = model.generate_prepared(model.prepare(prompts, options), batch_size=batch_size)
    texts = []
    for generation, item in zip(generations, items, strict=True):
        texts.append(generation.text_of(item.question).strip())
        advance()
    return texts


def share_answered(model: ComposedModel, facts: Sequence[Item]) -> float:
    """The share of questions on facts that a composition answers greedily word for word, in [0, 1].

    Args:
        model: The composition.
        facts: Questions with their answers.
    """
    return exact_match(answers(model, facts), facts)


def exact_match(texts: Sequence[str], items: Sequence[Item]) -> float:
    """The share of texts that equal their item's answer, in [0, 1].

    >>> item = Item("Where?", "Here.", "fact", "someone", "test")
    >>> exact_match(["Here.", "There."], [item, item])
    0.5
    """
    return float(np.mean([text == item.answer for text, item in zip(texts, items, strict=True)]))


def running_texts(items: Sequence[Item]) -> list[str]:
    """The texts that the family's vocabulary map is built from: the training items."""
    return [f"{item.question}\n{item.answer}" for item in select(list(items), "train")]


def family_map(
    base: LanguageModel,
    value: LanguageModel | ValueNetwork,
    texts: Sequence[str],
    *,
    path: Path,
    method: Method = "bytes",
    centred: bool = False,
) -> Path | None:
    """Builds the map from a value network's vocabulary to a base's, and writes it to a file.

    Args:
        base: The base.
        value: The value network.
        texts: Running text of the kind that both will read.
        path: The file; its folder is made.
        method: How token sequences are aligned.
        centred: Whether value logits are centred before they are mapped.

    Returns:
        The file; None, and nothing is written, if both have one vocabulary.
    """
    to = named_tokenizer(_family_name(base), base.tokenizer, str(base.path))
    of = named_tokenizer(_family_name(value), value.tokenizer, str(value.path))
    if to.info.fingerprint == of.info.fingerprint:
        return None
    built = build_vocabulary_map(to, of, texts, method=method, centred=centred)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_vocabulary_map(path, built.vocabulary_map, built.metadata)
    return path


def _family_name(model: LanguageModel | ValueNetwork) -> str:
    """A model's name in the map's file: its folder, or that of a value's training base."""
    if isinstance(model, LanguageModel):
        return Path(model.path).name
    return f"value trained on {Path(model.metadata.training_base['name']).name}"


def _messages(item: Item) -> tuple[Message, ...]:
    return (Message("user", item.question),)
