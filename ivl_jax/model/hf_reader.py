"""Reads the fields of a config.json one by one and reports all problems at the end.

In: the parsed file. Out: values of the right type; one error that names every field that is
malformed, unknown, or would change the outputs in a way that is not implemented.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from ivl_jax.model.hf_families import HARMLESS, ON
from ivl_jax.text_files import shortened

_COMPARED = 60  # characters of a name; those of an altered file can be long
_LARGEST_SIZE = 2**31 - 1
_MOST_LAYERS = 1_000  # each becomes a module; the deepest published models have 126


class Reader:
    """Takes fields out of a config, and collects problems, also about fields never taken."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.left = dict(config)
        self.where = where
        self.known: set[str] = set()
        self.problems: list[str] = []

    def take(self, name: str, default: Any, *, kinds: tuple[type, ...] = ()) -> Any:
        """The field's value, or the default; a value of another type is a problem."""
        self.known.add(name)
        value = self.left.pop(name, default)
        if not kinds or value is default or self.fits(value, kinds):
            return value
        names = ["null" if kind is type(None) else kind.__name__ for kind in kinds]
        self.complain(name, value, " or ".join(names))
        return default

    @staticmethod
    def fits(value: Any, kinds: tuple[type, ...]) -> bool:
        """Whether a value has one of these types and, if a number, is finite.

        JSON's true is not a number, although Python's bool is an int.
        """
        if isinstance(value, bool) is not (kinds == (bool,)) or not isinstance(value, kinds):
            return False
        try:
            return not isinstance(value, int | float) or math.isfinite(value)
        except OverflowError:  # an integer too large for a float
            return False

    def size(self, name: str, default: int | None) -> int:
        """A positive integer; null counts as absent."""
        if self.left.get(name) is None:
            self.left.pop(name, None)
        value = self.take(name, default, kinds=(int,))
        largest = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST_SIZE
        if value is None:
            self.complain(name, "nothing", "a positive integer")
        elif not 1 <= value <= largest:
            self.complain(name, value, f"a positive integer of at most {largest}")
        else:
            return value
        return 1

    def complain(self, name: str, value: Any, supported: str) -> None:
        """Add a problem; it is raised by `finish`."""
        shown = value if value == "nothing" else shortened(value)
        self.problems.append(f"{name}: got {shown}, supported: {supported}")

    def finish(self) -> None:
        """Raise an error with all problems, including fields that were never taken.

        Raises:
            ValueError: There are problems.
        """
        for name, value in self.left.items():
            if _changes_nothing(name, value):
                continue
            if name in ("quantization_config", "compression_config"):
                method = value.get("quant_method") if isinstance(value, dict) else None
                self.problems.append(
                    f"{name}: quantised weights ({method or 'unknown method'}) are not supported; "
                    "use the original, unquantised model"
                )
                continue
            near = difflib.get_close_matches(name[:_COMPARED], self.known, n=1, cutoff=0.85)
            hint = f"; did you mean {near[0]}?" if near else ""
            expected = (
                "true" if name in ON else "0" if is_dropout(name) else "absent, null or false"
            )
            self.complain(shortened(name)[1:-1], value, expected + hint)
        if self.problems:
            raise ValueError(
                f"{self.where}: fields that this decoder does not support:\n  "
                + "\n  ".join(self.problems[:20])
                + "\nRemove a field only if the model's outputs do not depend on it."
            )


def is_dropout(name: str) -> bool:
    """Whether a field is a dropout probability, which must be 0."""
    return name.endswith(("dropout", "_pdrop", "dropout_prob", "dropout_rate"))


def _changes_nothing(name: str, value: Any) -> bool:
    """Whether a field that was never taken does not affect the outputs."""
    ids = name.endswith(("_token_id", "_token_ids", "_token_index"))
    off = value is None or (value is False and name not in ON)
    on = value is True and name in ON
    no_dropout = is_dropout(name) and value == 0
    return off or on or no_dropout or ids or name in HARMLESS
