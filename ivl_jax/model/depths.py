"""What a head reads of several depths: the normed outputs of the last K layers, mixed per token.

    mixed = n_K + Σ_{k<K} w_k · (n_k − n_K)      n_k = norm_k(h_k), the last layer is K
    w     = router(n_K)                           [B T K−1]

The head is linear, so its logits for `mixed` are that mixture of the logits of each depth: K depths
cost one head. (A final soft cap is applied to the mixture.) The router is zero at first, so the
network begins as one whose head reads the last layer alone.

In: outputs of the last layers and the final norm. Out: the head's input; and each depth's.

Source: the Mixture-of-Depths Ensemble, Luo and Specia, arXiv 2410.13077: late layers contribute to
the final logits through learned routing weights, each with a norm of its own under the shared head,
and are distilled from the final prediction (`depth_kl` of `ivl_jax.composed.token_scores`). We know
it from its abstract and a summary (K = 3), not from its equations. So these are choices of ours: a
linear router whose weights sum to 1 but may be negative (a softmax cannot begin as the last layer
alone), which reads the last layer only; norms stored as offsets from the final norm's scale. The
paper tunes one model; here the ensemble is the head of a value network, beside a frozen base.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ivl_jax.model.parameter import declare
from ivl_jax.model.projection import Projection

Norm = Callable[..., Array]
"""(x, offset of the scale or None) → normed x; the final norm."""


class Depths(nnx.Module):
    """The router over depths, and the norms of the layers before the last; all zero at first."""

    def __init__(self, depths: int, size: int):
        # As trained in every form, like all that only value networks have: it is small.
        self.router = Projection(
            ("embed", size), (None, depths - 1), use_bias=True, initial="zeros"
        )
        self.norm_offset = declare(
            (None, depths - 1), (None, size), initial="zeros", hf_suffix="norm_offset"
        )

    def __call__(
        self, last: Float[Array, "B T D"], late: Sequence[Float[Array, "B T D"]], norm: Norm
    ) -> tuple[Float[Array, "B T D"], list[Array]]:
        """Mix the depths.

        Args:
            last: The last layer's output after the final norm, in the compute dtype.
            late: The outputs of the K−1 layers before it, as they are, shallowest first.
            norm: The final norm.

        Returns:
            The head's input, mixed in float32 and cast to the compute dtype; and the normed `late`,
            each of which the head could read by itself.
        """
        offsets = self.norm_offset[...]
        normed = [norm(x, offsets[index]) for index, x in enumerate(late)]
        wide = last.astype(jnp.float32)
        weights, mixed = self.router(wide), wide
        for index, each in enumerate(normed):
            mixed += weights[..., index : index + 1] * (each.astype(jnp.float32) - wide)
        return mixed.astype(last.dtype), normed
