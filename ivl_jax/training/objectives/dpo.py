"""Direct preference optimisation: the chosen answer of a pair becomes likelier than the rejected.

The base alone is the reference, so no second model is needed: with h the difference, chosen minus
rejected, of log p(answer) − log p_base(answer),

    sigmoid   loss = −(1 − ε) log σ(β h) − ε log σ(−β h)          mean over pairs
    ipo       loss = (h' − 1 / (2 β))²,  h' of means per token    mean over pairs

plus `sft_weight` times the cross-entropy of the chosen answers, each pair's mean per token.

In: batches whose segments come in pairs, 1 and 2, 3 and 4, …: the chosen answer and the rejected
one; the loss mask marks the answers. Out: the objective.

Source:
    DPO: arXiv 2305.18290, equation 7; label smoothing: arXiv 2306.02896's conservative form; IPO:
    arXiv 2310.12036, equation 17, with log-ratios averaged over tokens as in TRL; the SFT term:
    arXiv 2404.19733.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from ivl_jax.config import PreferenceConfig
from ivl_jax.data.batching import Batch
from ivl_jax.training.objectives.objective import Objective, Scores, Weights
from ivl_jax.training.objectives.segments import is_last, segment_totals


def make_dpo(options: PreferenceConfig) -> Objective:
    """Make the objective.

    Args:
        options: β, the form of the loss, label smoothing, the SFT term.

    Returns:
        The objective; its batches hold pairs.
    """

    def weigh(batch: Batch, first: Scores) -> Weights:
        pairs = _Pairs(batch)
        slope = jax.grad(lambda gap: jnp.sum(_pair_loss(options, gap)))(_gap(options, pairs, first))
        weight = slope * pairs.sign * pairs.per_token(ipo=options.loss == "ipo")
        weight -= jnp.where(pairs.chosen, options.sft_weight / pairs.length, 0.0)
        return {"log_prob": jnp.where(pairs.counted, weight, 0.0)}

    def loss(batch: Batch, scores: Scores) -> Float32[Array, ""]:
        pairs = _Pairs(batch)
        return jnp.sum(
            jnp.where(pairs.ends, _pair_loss(options, _gap(options, pairs, scores)), 0.0)
        ) - options.sft_weight * jnp.sum(
            jnp.where(pairs.chosen, scores["log_prob"] / pairs.length, 0.0)
        )

    def sums(batch: Batch, scores: Scores) -> Mapping[str, Float32[Array, ""]]:
        pairs = _Pairs(batch)

        def over(mask: Array, values: Array) -> Float32[Array, ""]:
            return jnp.sum(jnp.where(mask, values, 0.0))

        log_prob, base = scores["log_prob"], scores["base_log_prob"]
        ratio = options.beta * (log_prob - base)
        margin = pairs.total(jnp.where(pairs.counted, pairs.sign * ratio, 0.0))
        return {
            "margin": over(pairs.ends, margin),
            "preferred": over(pairs.ends, (margin > 0).astype(jnp.float32)),
            "chosen_reward": over(pairs.chosen, ratio),
            "rejected_reward": over(pairs.rejected, ratio),
            "chosen_log_prob": over(pairs.chosen, log_prob),
            "rejected_log_prob": over(pairs.rejected, log_prob),
            "chosen_nll": over(pairs.chosen, -log_prob),
            "chosen_tokens": jnp.sum(pairs.chosen, dtype=jnp.float32),
            "base_kl": over(pairs.counted, scores["base_kl"]),
            "pairs": jnp.sum(pairs.ends, dtype=jnp.float32),
        }

    return Objective(
        name="dpo",
        dialogues=2,
        needs_base=True,
        best_by="preference_loss",
        shown=("reward_accuracy", "reward_margin", "kl"),
        configure=lambda config: make_dpo(config.preference),
        scores=("log_prob",),
        first_pass=("log_prob", "base_log_prob"),
        monitored=("base_log_prob", "base_kl"),
        weigh=weigh,
        loss=loss,
        count=lambda batch: jnp.sum(_Pairs(batch).ends, dtype=jnp.float32),
        sums=sums,
        figures={
            "preference_loss": ("loss", "pairs"),
            "nll": ("chosen_nll", "chosen_tokens"),
            "reward_accuracy": ("preferred", "pairs"),
            "reward_margin": ("margin", "pairs"),
            "chosen_reward": ("chosen_reward", "pairs"),
            "rejected_reward": ("rejected_reward", "pairs"),
            "chosen_log_prob": ("chosen_log_prob", "pairs"),
            "rejected_log_prob": ("rejected_log_prob", "pairs"),
            "kl": ("base_kl", "loss_tokens"),
        },
    )


class _Pairs:
    """Which tokens belong to which side of a pair, arrays [*A B T]."""

    def __init__(self, batch: Batch):
        ids: Int[Array, "*A B T"] = jnp.asarray(batch.segment_ids)
        self.counted: Bool[Array, "*A B T"] = jnp.asarray(batch.loss_mask)
        self.chosen = self.counted & (ids % 2 == 1)
        self.rejected = self.counted & (ids % 2 == 0)
        self.sign = jnp.where(ids % 2 == 1, 1.0, -1.0)
        self._pair = (ids + 1) // 2
        self.ends = is_last(self._pair) & (ids > 0)
        """The last position of each pair."""
        length = segment_totals(self.counted.astype(jnp.float32), ids)
        self.length = jnp.maximum(length, 1.0)
        """Counted tokens of the own segment."""

    def total(self, values: Float32[Array, "*A B T"]) -> Float32[Array, "*A B T"]:
        """Each position's sum over its pair."""
        return segment_totals(values, self._pair)

    def per_token(self, *, ipo: bool) -> Float32[Array, "*A B T"]:
        """How much a token's log-ratio weighs in its answer's: 1, or 1 / length."""
        return 1.0 / self.length if ipo else jnp.ones_like(self.length)


def _gap(options: PreferenceConfig, pairs: _Pairs, scores: Scores) -> Float32[Array, "*A B T"]:
    """H of each position's pair: the log-ratio of chosen minus that of rejected."""
    ratio = scores["log_prob"] - scores["base_log_prob"]
    signed = pairs.sign * ratio * pairs.per_token(ipo=options.loss == "ipo")
    return pairs.total(jnp.where(pairs.counted, signed, 0.0))


def _pair_loss(options: PreferenceConfig, gap: Array) -> Array:
    if options.loss == "ipo":
        return jnp.square(gap - 1 / (2 * options.beta))
    logit, smoothing = options.beta * gap, options.label_smoothing
    return -(1 - smoothing) * jax.nn.log_sigmoid(logit) - smoothing * jax.nn.log_sigmoid(-logit)


DPO = make_dpo(PreferenceConfig())
