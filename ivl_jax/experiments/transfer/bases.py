"""What identifies a base of the matrix, whether it ships or a study makes it.

In: its name. Out: a hash, known before the base is made.
"""

import functools
from typing import Any, cast

from ivl_jax.experiments.family.continued import SCHEDULES, continued_corpus
from ivl_jax.experiments.family.corpus import load_corpus
from ivl_jax.experiments.pretrain_family import RECIPES
from ivl_jax.experiments.settings_key import family_weights, hash_of
from ivl_jax.experiments.transfer.matrix import Base


@functools.cache
def recipe_key(base: Base) -> str:
    """What tells a base from another of its name: its weights, or what it is made of."""
    if base in ("S-continued", "L-continued"):
        return hash_of(
            [family_weights(base[0]), SCHEDULES[base[0]], continued_corpus().fingerprint]
        )
    if base == "XL":
        return hash_of([RECIPES[base], load_corpus().fingerprint])
    return family_weights(cast(Any, base))
