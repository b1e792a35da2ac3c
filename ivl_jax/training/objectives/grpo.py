"""Group-relative policy optimisation: of several answers to a prompt, the better become likelier.

    A       = r − mean of the prompt's rewards, divided by their standard deviation + 1e-4 or not
    ρ       = p(token) / p(token) when it was sampled
    loss    = mean over tokens of −min(ρ A, clip(ρ, 1 − ε, 1 + ε') A) + β KL(composed ‖ base)

With one update per batch of samples ρ is 1, and the loss has the gradient of −A log p(token), which
is reported. The KL divergence is exact, over the whole vocabulary. All probabilities are those at
the temperature of sampling: logits, the base's too, are divided by it. The mean is over each
answer's tokens and then over answers; over all tokens; or over answers, of sums over their tokens
divided by the most tokens that an answer may have.

In: batches of sampled answers with their advantages, or of demonstrations, which are only
evaluated. Out: the objective; the rollouts come from above, since training does not decode.

Source:
    GRPO: arXiv 2402.03300, equation 3; without the standard deviation, and with a constant in place
    of the answer's length: Dr. GRPO, arXiv 2503.20783; mean over all tokens, ε and ε' that differ:
    DAPO, arXiv 2503.14476. The 1e-4, and the division of logits by the temperature: TRL's
    `GRPOTrainer`.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from ivl_jax.config import GrpoConfig
from ivl_jax.data.batching import Batch
from ivl_jax.training.masked_sum import masked_sum
from ivl_jax.training.objectives.objective import Objective, Sampling, Scores, Weights
from ivl_jax.training.objectives.segments import is_last, segment_totals

# Rewards that differ by no more than rounding must not become advantages of ±1; TRL's.
_SPREAD_EPSILON = 1e-4


def advantages(rewards: np.ndarray, *, standardised: bool) -> np.ndarray:
    """Compare the rewards of answers to the same prompt.

    Args:
        rewards: [P G] of the G answers to each of P prompts.
        standardised: divide by the group's standard deviation (of the group itself, not an estimate
            for more answers), to which 1e-4 is added.

    Returns:
        [P G] float32; 0 where all rewards of a group are equal.

    Example:
        >>> advantages(np.array([[1.0, 0.0], [0.5, 0.5]]), standardised=True).round(3).tolist()
        [[1.0, -1.0], [0.0, 0.0]]
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    # Equal rewards may differ from their mean by rounding.
    centred = np.where(np.ptp(rewards, axis=1, keepdims=True) == 0, 0.0, centred)
    if standardised:
        centred = centred / (rewards.std(axis=1, keepdims=True) + _SPREAD_EPSILON)
    return centred.astype(np.float32)


def make_grpo(options: GrpoConfig) -> Objective:
    """Make the objective.

    Args:
        options: β, ε and ε', what the mean is over, updates per batch.

    Returns:
        The objective.
    """
    average, clips = options.average, options.updates > 1

    def share(batch: Batch) -> Float32[Array, "*A B T"]:
        """What each token counts: 1, or 1 / length of its answer."""
        counted = jnp.asarray(batch.loss_mask, jnp.float32)
        if average != "answers":
            return counted
        return counted / jnp.maximum(segment_totals(counted, jnp.asarray(batch.segment_ids)), 1.0)

    def advantages_of(batch: Batch) -> Array:
        """A; 0 for demonstrations, which are only evaluated."""
        if batch.advantages is None:
            return jnp.zeros(batch.tokens.shape, jnp.float32)
        return jnp.asarray(batch.advantages)

    def ratios(batch: Batch, scores: Scores) -> tuple[Array, Array]:
        """ρ, and whether it is outside of where an advantage of its sign still pulls."""
        if batch.sampled_log_probs is None:
            ones = jnp.ones(batch.tokens.shape, jnp.float32)
            return ones, jnp.zeros_like(ones, bool)
        ratio = jnp.exp(scores["log_prob"] - jnp.asarray(batch.sampled_log_probs))
        above, below = ratio > 1 + options.clip_high, ratio < 1 - options.clip_low
        advantage = advantages_of(batch)
        return ratio, ((advantage > 0) & above) | ((advantage < 0) & below)

    def weigh(batch: Batch, first: Scores) -> Weights:
        each, advantage = share(batch), advantages_of(batch)
        if clips:
            # d ρ / d log p = ρ, and a clipped ρ is a constant.
            ratio, clipped = ratios(batch, first)
            advantage = jnp.where(clipped, 0.0, ratio * advantage)
        return {"log_prob": -advantage * each, "base_kl": options.kl_weight * each}

    def loss(batch: Batch, scores: Scores) -> Float32[Array, ""]:
        ratio, _ = ratios(batch, scores)
        kept = jnp.clip(ratio, 1 - options.clip_low, 1 + options.clip_high)
        advantage = advantages_of(batch)
        surrogate = jnp.minimum(ratio * advantage, kept * advantage)
        terms = options.kl_weight * scores["base_kl"] - surrogate
        return masked_sum(batch.loss_mask, terms * share(batch))

    def count(batch: Batch) -> Float32[Array, ""]:
        counted, ids = jnp.asarray(batch.loss_mask, jnp.float32), jnp.asarray(batch.segment_ids)
        if average == "tokens":
            return jnp.sum(counted)
        if average == "constant":
            # Truncated answers are among them: the divisor depends on nothing that was sampled.
            ends = is_last(ids) & (ids > 0)
            return options.max_new_tokens * jnp.sum(ends, dtype=jnp.float32)
        ends = is_last(ids) & (segment_totals(counted, ids) > 0)
        return jnp.sum(ends, dtype=jnp.float32)

    def sums(batch: Batch, scores: Scores) -> Mapping[str, Float32[Array, ""]]:
        answers = batch.loss_mask
        clipped = {"clipped": masked_sum(answers, ratios(batch, scores)[1])} if clips else {}
        return {
            "nll": masked_sum(answers, -scores["log_prob"]),
            "base_kl": masked_sum(answers, scores["base_kl"]),
            "entropy": masked_sum(answers, scores["entropy"]),
            **clipped,
        }

    return Objective(
        name="grpo",
        scores=("log_prob", "base_kl"),
        weigh=weigh,
        first_pass=("log_prob",) if clips else (),
        loss=loss if clips else None,
        count=count,
        sums=sums,
        figures={
            "nll": ("nll", "loss_tokens"),
            "kl": ("base_kl", "loss_tokens"),
            "entropy": ("entropy", "loss_tokens"),
            "clipped": ("clipped", "loss_tokens"),
        },
        monitored=("entropy",),
        needs_reference=True,
        temperature=options.temperature,
        sampling=Sampling(
            "grpo",
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            group_size=options.group_size,
            updates=options.updates,
            rewarded=True,
            mask_truncated=options.mask_truncated,
        ),
        best_by="reward",
        best_is="highest",
        shown=("reward", "kl", "entropy"),
        configure=lambda config: make_grpo(config.grpo),
    )


GRPO = make_grpo(GrpoConfig())
