"""Distillation: the student predicts what a teacher predicts, on given or on its own text.

    forward   loss = KL(teacher ‖ student)                 mean over tokens
    reverse   loss = KL(student ‖ teacher)
    js        loss = ½ KL(teacher ‖ m) + ½ KL(student ‖ m),  m the mean of both

The divergences are exact, over the whole vocabulary. The student is base + value network, or a
model trained alone; the teacher is any model or composition with the same vocabulary. No gradient
goes through the sampling of the student's own answers.

In: batches of demonstrations, or of answers that the student sampled. Out: the objective.

Source:
    arXiv 1503.02531 (forward); arXiv 2306.13649, generalised knowledge distillation, with β = ½ for
    `js`, and its on-policy form for sampled answers.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from ivl_jax.config import DistilConfig
from ivl_jax.data.batching import Batch
from ivl_jax.training.masked_sum import masked_sum
from ivl_jax.training.objectives.objective import Objective, Sampling, Scores, Weights

_SCORES = {"forward": "teacher_kl", "reverse": "teacher_reverse_kl", "js": "teacher_js"}


def make_distil(options: DistilConfig) -> Objective:
    """Make the objective.

    Args:
        options: the divergence, and the tokens that are compared.

    Returns:
        The objective; its loss needs a teacher.
    """
    name = _SCORES[options.divergence]

    def compared(batch: Batch) -> Bool[Array, "*A B T"]:
        return jnp.asarray(batch.token_mask if options.tokens == "all" else batch.loss_mask)

    def weigh(batch: Batch, first: Scores) -> Weights:
        del first
        return {name: compared(batch).astype(jnp.float32)}

    def count(batch: Batch) -> Float32[Array, ""]:
        return jnp.sum(compared(batch), dtype=jnp.float32)

    def sums(batch: Batch, scores: Scores) -> Mapping[str, Float32[Array, ""]]:
        answers = jnp.asarray(batch.loss_mask)
        found = {
            "divergence": masked_sum(compared(batch), scores[name]),
            "compared": count(batch),
            "nll": masked_sum(answers, -scores["log_prob"]),
            "teacher_nll": masked_sum(answers, -scores["teacher_log_prob"]),
        }
        if "base_log_prob" in scores:
            found["base_nll"] = masked_sum(answers, -scores["base_log_prob"])
        return found

    return Objective(
        name="distil",
        scores=(name,),
        weigh=weigh,
        count=count,
        sums=sums,
        figures={
            "divergence": ("divergence", "compared"),
            "nll": ("nll", "loss_tokens"),
            "teacher_nll": ("teacher_nll", "loss_tokens"),
            "base_nll": ("base_nll", "loss_tokens"),
        },
        monitored=("log_prob", "teacher_log_prob"),
        evaluated=("base_log_prob",),
        needs_teacher=True,
        sampling=None
        if options.answers == "given"
        else Sampling(
            "distil", max_new_tokens=options.max_new_tokens, temperature=options.temperature
        ),
        best_by="divergence",
        shown=("divergence", "nll"),
        configure=lambda config: make_distil(config.distil),
    )


DISTIL = make_distil(DistilConfig())
