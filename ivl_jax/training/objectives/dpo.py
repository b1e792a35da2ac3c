"""Direct preference optimisation: the chosen answer of a pair becomes likelier than the rejected.

The base alone is the reference, so no second model is needed: with h the difference, chosen minus
rejected, of log p(answer) − log p_base(answer),

    sigmoid   loss = −(1 − ε) log σ(β h) − ε log σ(−β h)          mean over pairs
    ipo       loss = (h' − 1 / (2 β))²,  h' of means per token    mean over pairs
    kto       loss = 1 − σ(β (r − k)) + 1 − σ(β (k − r'))         mean over pairs

where r and r' are the two log-ratios that h is the difference of, and k, the reference point, is
the KL divergence from the base, exact at each token, summed along the two given answers and
averaged over them; a constant of the gradient;

plus `sft_weight` times the cross-entropy of the chosen answers, each pair's mean per token.

In: batches whose segments come in pairs, 1 and 2, 3 and 4, …: the chosen answer and the rejected
one; the loss mask marks the answers. Out: the objective.

Source:
    DPO: arXiv 2305.18290, equation 7; label smoothing: conservative DPO (E. Mitchell's note on
    noisy preferences, 2023), as arXiv 2403.00409 describes it; IPO: arXiv 2310.12036, equation 17,
    with log-ratios averaged over tokens as in TRL; KTO: arXiv 2402.01306, equation 8, on pairs,
    whose reference point is estimated there from mismatched answers; the SFT term: arXiv
    2404.19733.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from ivl_jax.config import PreferenceConfig
from ivl_jax.data.batching import Batch
from ivl_jax.training.masked_sum import masked_sum
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
        def of_log_prob(log_prob: Array) -> Array:
            return loss(batch, {**first, "log_prob": log_prob})

        return {"log_prob": jax.grad(of_log_prob)(first["log_prob"])}

    def loss(batch: Batch, scores: Scores) -> Float32[Array, ""]:
        pairs = _Pairs(batch)
        preference = masked_sum(pairs.ends, _pair_loss(options, pairs, scores))
        nll = masked_sum(pairs.chosen, -scores["log_prob"] / pairs.length)
        return preference + options.sft_weight * nll

    def sums(batch: Batch, scores: Scores) -> Mapping[str, Float32[Array, ""]]:
        pairs = _Pairs(batch)
        log_prob, base = scores["log_prob"], scores["base_log_prob"]
        ratio = options.beta * (log_prob - base)
        margin = pairs.total(jnp.where(pairs.counted, pairs.sign * ratio, 0.0))
        return {
            "preference": masked_sum(pairs.ends, _pair_loss(options, pairs, scores)),
            "margin": masked_sum(pairs.ends, margin),
            "preferred": masked_sum(pairs.ends, margin > 0),
            "chosen_reward": masked_sum(pairs.chosen, ratio),
            "rejected_reward": masked_sum(pairs.rejected, ratio),
            "chosen_log_prob": masked_sum(pairs.chosen, log_prob),
            "rejected_log_prob": masked_sum(pairs.rejected, log_prob),
            "chosen_nll": masked_sum(pairs.chosen, -log_prob),
            "chosen_tokens": jnp.sum(pairs.chosen, dtype=jnp.float32),
            "base_kl": masked_sum(pairs.counted, scores["base_kl"]),
            "pairs": jnp.sum(pairs.ends, dtype=jnp.float32),
        }

    return Objective(
        name="dpo",
        dialogues=2,
        needs_reference=True,
        best_by="preference_loss",
        shown=("reward_accuracy", "reward_margin", "kl"),
        configure=lambda config: make_dpo(config.preference),
        scores=("log_prob",),
        first_pass=(
            *("log_prob", "base_log_prob"),
            *(("base_kl",) if options.loss == "kto" else ()),
        ),
        monitored=("base_log_prob", "base_kl"),
        weigh=weigh,
        loss=loss,
        count=lambda batch: jnp.sum(_Pairs(batch).ends, dtype=jnp.float32),
        sums=sums,
        figures={
            "preference_loss": ("preference", "pairs"),
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


def _pair_loss(options: PreferenceConfig, pairs: _Pairs, scores: Scores) -> Array:
    """The loss of each position's pair, [*A B T]."""
    ratio = jnp.where(pairs.counted, scores["log_prob"] - scores["base_log_prob"], 0.0)
    beta, smoothing = options.beta, options.label_smoothing
    if options.loss == "ipo":
        gap = pairs.total(pairs.sign * ratio / pairs.length)
        return jnp.square(gap - 1 / (2 * beta))
    if options.loss == "kto":
        divergence = pairs.total(jnp.where(pairs.counted, scores["base_kl"], 0.0)) / 2
        point = jax.lax.stop_gradient(divergence)
        chosen = pairs.total(jnp.where(pairs.chosen, ratio, 0.0)) - point
        rejected = pairs.total(jnp.where(pairs.rejected, ratio, 0.0)) - point
        return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)
    logit = beta * pairs.total(pairs.sign * ratio)
    return -(1 - smoothing) * jax.nn.log_sigmoid(logit) - smoothing * jax.nn.log_sigmoid(-logit)


DPO = make_dpo(PreferenceConfig())
