"""What a run that samples answers must satisfy, and which of its prompts leave room for an answer.

In: a config and tokenised demonstrations. Out: the prompts that are answered, or an error before
any weight is read.
"""

import logging

import numpy as np
from jaxtyping import Int64

from ivl_jax.config import ConfigError, TrainConfig
from ivl_jax.data.chat import ChatFormat
from ivl_jax.data.prompt_room import prompts_with_room
from ivl_jax.data.tokenized import TokenizedDemonstrations
from ivl_jax.training.models import Models
from ivl_jax.training.objectives.objective import Sampling

logger = logging.getLogger(__name__)

_NAMED = 3  # prompts left out that the warning names


def check_sampling(config: TrainConfig, sampling: Sampling) -> None:
    """Check what needs no data.

    Args:
        config: of the run.
        sampling: how its objective samples answers.

    Raises:
        ConfigError: options that cannot be combined; all problems are named at once.
    """
    table, rows, group = sampling.table, config.step.batch_size, sampling.group_size
    problems = [
        (
            rows % group,
            f"step.batch_size = {rows} is not a multiple of {table}.group_size = {group}",
        ),
        (
            any(base.cache_states for base in config.all_bases),
            "base.cache_states: the states of sampled answers cannot be stored beforehand",
        ),
        (config.distributed, "distributed = true: answers are sampled in one process"),
        *(
            (
                steps % sampling.updates,
                f"{name} = {steps} is not a multiple of {table}.updates = {sampling.updates}: a "
                "run stops only between batches of answers",
            )
            for name, steps in (
                ("step.max_steps", config.step.max_steps),
                ("logging.checkpoint_every", config.logging.checkpoint_every),
                ("logging.evaluate_every", config.logging.evaluate_every),
            )
        ),
        (
            sampling.max_new_tokens >= config.data.max_length,
            f"{table}.max_new_tokens = {sampling.max_new_tokens} leaves no room for a prompt in "
            f"data.max_length = {config.data.max_length}",
        ),
    ]
    found = [message for wrong, message in problems if wrong]
    if found:
        raise ConfigError(f'objective = "{config.objective}": ' + "; ".join(found))


def choose_prompts(
    config: TrainConfig,
    models: Models,
    sampling: Sampling,
    tokenized: TokenizedDemonstrations,
    chat_format: ChatFormat,
) -> Int64[np.ndarray, "K"]:
    """Choose the prompts that leave room for an answer; the others are left out with a warning.

    Args:
        config: of the run.
        models: whose contexts a prompt and its answer must fit into, too.
        sampling: how answers are sampled.
        tokenized: the demonstrations of a split.
        chat_format: their chat format.

    Returns:
        Indices of the demonstrations whose prompts are answered.

    Raises:
        ConfigError: none leaves room.
    """
    contexts = [models.trained.context, *(base.model.context for base in models.bases)]
    length, answer = min(config.data.max_length, *contexts), sampling.max_new_tokens
    # The last token of an answer is only a target.
    kept, left_out = prompts_with_room(tokenized, chat_format, longest=length + 1 - answer)
    if not left_out:
        return kept
    key = f"{sampling.table}.max_new_tokens"
    named = "; ".join(f"{row}: {reason}" for row, reason in left_out[:_NAMED])
    more = f"; and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
    said = (
        f"leave no room for an answer of {key} = {answer} tokens in data.max_length = "
        f"{config.data.max_length}"
    )
    if not len(kept):
        raise ConfigError(
            f"all {len(tokenized)} prompts {said} ({named}{more}): raise data.max_length, or lower "
            f"{key}"
        )
    logger.warning(
        "%d of %d prompts %s and were left out: %s%s",
        len(left_out),
        len(tokenized),
        said,
        named,
        more,
    )
    return kept
