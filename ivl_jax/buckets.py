"""Rounds sizes up to a few buckets, so that few programs are compiled.

In: a size. Out: the size of its bucket.
"""


def bucket(size: int, *, smallest: int, largest: int | None = None) -> int:
    """Round a size up to 2ᵏ or 3·2ᵏ⁻¹.

    Args:
        size: what must fit.
        smallest: the smallest bucket, a power of two.
        largest: the largest bucket, at least `size`; None: no limit.

    Returns:
        The smallest bucket that holds `size`.

    Example:
        >>> [bucket(n, smallest=16, largest=500) for n in (1, 16, 17, 25, 33, 400)]
        [16, 16, 24, 32, 48, 500]
    """
    found = smallest
    while found < size:
        # 1 → 2 → 3 → 4 → 6 → 8 → 12 …
        is_power = found & (found - 1) == 0
        found = max(found * 3 // 2, 2) if is_power else found * 4 // 3
    return found if largest is None else min(found, largest)
