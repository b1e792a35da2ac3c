"""Weights with a known greedy text, for any shape and at full cost.

In: a shape, and the token that should follow each token. Out: parameters. The outputs of attention
and MLP are multiplied by zero kernels, so the last hidden state is the token's own embedding, and
the head has that embedding in the column of the token that follows.
"""

import functools

import jax.numpy as jnp
import numpy as np

from benchmarks.composed import Weights
from benchmarks.shapes import draw_params
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params, abstract_params

# The logit of the token that follows; the others are within ±8 at a width of 192 or more.
_LOGIT = 20.0
# Proposals agree in exactly the requested share within each stretch of this many tokens.
_STRETCH = 20


def cycle(vocab_size: int, *, seed: int = 0) -> np.ndarray:
    """All tokens in the order in which they follow one another, [V]; the first follows the last."""
    return np.random.default_rng(seed).permutation(vocab_size)


def followers(order: np.ndarray, *, agreement: float = 1.0, seed: int = 1) -> np.ndarray:
    """The token that follows each token.

    Args:
        order: from `cycle`.
        agreement: share of tokens followed by their successor in the cycle; the others are followed
            by another token.
        seed: determines which.

    Returns:
        [V], by token.
    """
    rng, count = np.random.default_rng(seed), len(order)
    after = np.roll(order, -1)
    wrong = round((1 - agreement) * _STRETCH)
    starts = np.arange(0, count, _STRETCH)
    places = np.concatenate([start + rng.permutation(_STRETCH)[:wrong] for start in starts])
    places = places[places < count]
    after[places] = np.roll(after[places], 1)
    following = np.empty_like(order)
    following[order] = after
    return following


def chain_weights(
    arch: ArchConfig, following: np.ndarray, *, seed: int, dtype: str = "float32"
) -> Weights:
    """Weights of this shape that predict the given successor of each token.

    Args:
        arch: the shape, with an untied head.
        following: from `followers`.
        seed: of everything else.
        dtype: of the weights.

    Returns:
        The weights; greedy decoding continues token t with following[t].
    """
    rows = np.random.default_rng(seed).standard_normal(
        (arch.vocab_size, arch.hidden_size), np.float32
    )
    head = np.empty_like(rows)
    head[following] = rows * (_LOGIT / arch.hidden_size)
    ends = {
        "embed_tokens": {"embedding": jnp.asarray(rows, dtype)},
        "lm_head": {"kernel": jnp.asarray(head.T, dtype)},
    }
    return Weights(arch, _silent_layers(arch, seed, dtype) | ends)


@functools.lru_cache(maxsize=1)
def _silent_layers(arch: ArchConfig, seed: int, dtype: str) -> Params:
    """Random weights whose layers add nothing; cached, since drafts differ only in their heads."""
    params = draw_params(abstract_params(arch, param_dtype=dtype), seed)
    for layer in params["layers"].values():
        for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            kernel = layer[part][name]["kernel"]
            layer[part][name] = {"kernel": jnp.zeros_like(kernel)}
    return params
