"""Fused attention compared with the plain form: errors against float32, and time.

In: a shape. Out: rows; only of the plain form if the device has no fused one.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from benchmarks.report import Peer, Row, Target
from benchmarks.timing import Figures, time_in_turn
from benchmarks.training_steps import Sizes
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.attention.entry import attend_to_own
from ivl_jax.model.attention.form import PLAIN, AttentionForm, choose_form

Attention = Callable[[Array, Array, Array], Array]
_ERROR = 2e-2  # of bfloat16 against float32, ‖found − expected‖ / ‖expected‖


def attention_rows(
    arch: ArchConfig, sizes: Sizes, *, dtype: DTypeLike, repeats: int
) -> Iterator[Row]:
    """Compare both forms and time them, forward and backward.

    Args:
        arch: has the numbers of heads and their width.
        sizes: rows and tokens.
        dtype: of queries, keys and values.
        repeats: timed calls of each.

    Yields:
        Errors and times of both forms; one row says whether there is a fused form.
    """
    heads = (arch.num_attention_heads, arch.num_key_value_heads, arch.num_key_value_heads)
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [
        jax.random.normal(key, (*sizes, count, arch.head_dim), jnp.float32).astype(dtype)
        for key, count in zip(keys, heads, strict=True)
    ]
    # Two segments per row: the mask of packed demonstrations.
    segments = jnp.arange(sizes.length) >= sizes.length // 3
    plain = _with_gradients(_attention(PLAIN, arch, segments))
    form = choose_form("auto", arch, dtype=dtype, devices=jax.devices())
    fused = None
    if form.at_length(sizes.length) in ("splash", "cudnn"):
        fused = _with_gradients(_attention(form, arch, segments))
    yield Row("fused attention on this device", Figures(float(fused is not None), 0.0), "of 1")
    forms = {"fused": fused, "plain": plain} if fused is not None else {"plain": plain}
    # Only one row of the batch, since float32 takes twice the memory.
    first = [each[:1] for each in inputs]
    expected = plain(*(each.astype(jnp.float32) for each in first))
    for name, form in forms.items():
        for what, error in _errors(form(*first), expected).items():
            yield Row(
                f"attention, {name}: error of {what}",
                Figures(error, 0.0),
                "of 1",
                target=Target("median", _ERROR),
            )
    works = {name: (lambda form=form: form(*inputs)) for name, form in forms.items()}
    timings = time_in_turn(works, repeats=repeats)
    for name, timing in timings.items():
        figures = timing.figures
        peer = Peer("plain", 1e3 * timings["plain"].figures.median) if name == "fused" else None
        yield Row(
            f"attention, {name}: forward and backward",
            Figures(1e3 * figures.median, 1e3 * figures.spread),
            "ms",
            peer=peer,
        )


def _attention(form: AttentionForm, arch: ArchConfig, segments: Bool[Array, " T"]) -> Attention:
    """The model's own attention in one form, for keys and values as [B T K H]."""

    def attend(
        query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]
    ) -> Float[Array, "B T N H"]:
        return attend_to_own(
            query,
            key.swapaxes(1, 2),
            value.swapaxes(1, 2),
            form=form,
            segment_ids=jnp.tile(segments.astype(jnp.int32), (query.shape[0], 1)),
            window=None,
            scale=1 / math.sqrt(arch.head_dim),
            softcap=None,
        )

    return attend


def _with_gradients(attention: Attention) -> Callable[..., Any]:
    """(query, key, value) → the output, and the gradients of half its square."""

    def half_square(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        mixed = attention(query, key, value)
        return jnp.sum(jnp.square(mixed.astype(jnp.float32))) / 2, mixed

    return jax.jit(jax.grad(half_square, argnums=(0, 1, 2), has_aux=True))


def _errors(found: Any, expected: Any) -> dict[str, float]:
    """‖found − expected‖ / ‖expected‖ of the values and of the worst gradient."""

    def error(one: Array, other: Array) -> float:
        difference = jnp.linalg.norm(one.astype(jnp.float32) - other)
        return float(difference / jnp.linalg.norm(other))

    gradients = [error(*pair) for pair in zip(found[0], expected[0], strict=True)]
    return {"values": error(found[1], expected[1]), "gradients": max(gradients)}
