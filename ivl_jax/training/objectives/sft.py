"""Supervised fine-tuning: the cross-entropy of the demonstrations, the paper's objective.

    loss = Σ loss_mask · (−log p(target)) / Σ loss_mask

In: batches whose loss mask marks the assistant's tokens. Out: the objective. The penalty on value
logits is not part of it: `ivl_jax.training.loss` adds it to every objective.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from ivl_jax.data.batching import Batch
from ivl_jax.training.masked_sum import masked_sum
from ivl_jax.training.objectives.objective import Objective, Scores, Weights


def _weigh(batch: Batch, first: Scores) -> Weights:
    del first
    return {"log_prob": -jnp.asarray(batch.loss_mask, jnp.float32)}


def _count(batch: Batch) -> Float32[Array, ""]:
    return jnp.sum(batch.loss_mask, dtype=jnp.float32)


def _sums(batch: Batch, scores: Scores) -> dict[str, Float32[Array, ""]]:
    counted = batch.loss_mask
    sums = {
        "nll": masked_sum(counted, -scores["log_prob"]),
        "correct": masked_sum(counted, scores["top1"]),
    }
    if "base_log_prob" in scores:
        sums["base_nll"] = masked_sum(counted, -scores["base_log_prob"])
        sums["base_correct"] = masked_sum(counted, scores["base_top1"])
    return sums


SFT = Objective(
    name="sft",
    scores=("log_prob",),
    weigh=_weigh,
    count=_count,
    sums=_sums,
    figures={
        "nll": ("nll", "loss_tokens"),
        "accuracy": ("correct", "loss_tokens"),
        "base_nll": ("base_nll", "loss_tokens"),
        "base_accuracy": ("base_correct", "loss_tokens"),
    },
    monitored=("top1",),
    evaluated=("base_log_prob", "base_top1"),
    takes_augmentation=True,
)
