"""What the demo measures on held-out items: response NLL and exact match.

In: a base model, perhaps a value network, items. Out: nats per token of the answers, and the share
of questions that are answered word for word.
"""

from collections.abc import Sequence
from typing import cast

import jax
import numpy as np

from ivl_jax.checkpoint import ValueNetwork
from ivl_jax.config import Connection
from ivl_jax.data.batching import Batch, make_eval_batches
from ivl_jax.data.chat import make_chat_format
from ivl_jax.data.formats import Demonstration, Message
from ivl_jax.data.tokenized import tokenize_demonstrations
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.experiments.demonstrations import Item
from ivl_jax.model.decoder import Params, build_decoder
from ivl_jax.training.objective import LossAux, Objective, count_tokens, loss_sum
from ivl_jax.weights.language_model import LanguageModel


def response_nll(
    base: LanguageModel, value: ValueNetwork | None, items: Sequence[Item], *, rows: int = 16
) -> float:
    """Mean negative log-likelihood of the answers, end-of-answer token included.

    Args:
        base: The base model; its tokenizer's chat template is used.
        value: On top of it, with strength 1; None: the base alone.
        items: Questions and answers.
        rows: Rows of a batch.

    Returns:
        Nats per token, over all answer tokens of all items.
    """
    dialogues = [
        Demonstration((*_messages(item), Message("assistant", item.answer)), str(index))
        for index, item in enumerate(items)
    ]
    tokenized = tokenize_demonstrations(
        dialogues,
        make_chat_format(base.tokenizer),
        sequence_length=base.arch.max_position_embeddings,
        cache_dir=None,
    )
    batches = make_eval_batches(
        tokenized, batch_size=rows, pad_id=base.tokenizer_info.pad_id, packing=True
    )
    trained = base if value is None else value
    objective = Objective(
        build_decoder(trained.arch),
        None if value is None else build_decoder(base.arch),
        vocab_size=base.tokenizer_info.vocab_size,
        value_vocab_size=trained.tokenizer_info.vocab_size,
        connection="residual" if value is None else cast("Connection", value.connection),
    )

    @jax.jit
    def sums(params: Params, base_params: Params | None, batch: Batch) -> LossAux:
        counts = count_tokens(objective, batch)
        return loss_sum(objective, params, base_params, batch, counts=counts)[2]

    base_params = None if value is None else base.params
    found = [jax.device_get(sums(trained.params, base_params, batch)) for batch in batches]
    return float(sum(aux.nll for aux in found) / sum(aux.loss_tokens for aux in found))


def answers(
    base: LanguageModel,
    value: ValueNetwork | None,
    items: Sequence[Item],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 64,
) -> list[str]:
    """The greedy answers of a base, with a value network on top or alone.

    Args:
        base: The base model.
        value: On top of it; None: the base alone.
        items: Questions.
        max_new_tokens: Tokens of an answer at most.
        batch_size: Questions decoded together.

    Returns:
        One text an item.
    """
    model = compose(base) if value is None else compose(base, value)
    prompts = [_messages(item) for item in items]
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    return [one.text.strip() for one in model.generate(prompts, options, batch_size=batch_size)]


def exact_match(texts: Sequence[str], items: Sequence[Item]) -> float:
    """The share of texts that equal their item's answer, in [0, 1].

    >>> item = Item("Where?", "Here.", "fact", "someone", "test")
    >>> exact_match(["Here.", "There."], [item, item])
    0.5
    """
    return float(np.mean([text == item.answer for text, item in zip(texts, items, strict=True)]))


def _messages(item: Item) -> tuple[Message, ...]:
    return (Message("user", item.question),)
