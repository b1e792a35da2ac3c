"""Takes fields out of a config.json one by one and complains, at the end, about all of them.

In: the parsed file. Out: values of the right kind; one error that names every field that is
malformed, unknown, or would change the outputs in a way that is not implemented.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from ivl_jax.model.hf_families import HARMLESS, ON

_SHOWN = 60  # characters of a value
_LARGEST_SIZE = 2**31 - 1
_MOST_LAYERS = 10_000  # a module is made for each; the deepest published models have 126


class Reader:
    """Takes fields out of a config, keeps every complaint, and knows what was never asked for."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.left = dict(config)
        self.where = where
        self.known: set[str] = set()
        self.problems: list[str] = []

    def take(self, name: str, default: Any, *, kinds: tuple[type, ...] = ()) -> Any:
        """The field's value, or the default; a value that does not fit the kinds is a problem."""
        self.known.add(name)
        value = self.left.pop(name, default)
        if not kinds or value is default or self.fits(value, kinds):
            return value
        names = ["null" if kind is type(None) else kind.__name__ for kind in kinds]
        self.complain(name, value, " or ".join(names))
        return default

    @staticmethod
    def fits(value: Any, kinds: tuple[type, ...]) -> bool:
        """Whether a value is of one of these kinds and, as a number, finite.

        JSON's true is not a number, though Python's bool is an int.
        """
        if isinstance(value, bool) is not (kinds == (bool,)) or not isinstance(value, kinds):
            return False
        try:
            return not isinstance(value, int | float) or math.isfinite(value)
        except OverflowError:  # an integer beyond every float
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
        """Raise all complaints, those about fields nobody took included.

        Raises:
            ValueError: There are some.
        """
        for name, value in self.left.items():
            if _changes_nothing(name, value):
                continue
            if name in ("quantization_config", "compression_config"):
                method = value.get("quant_method") if isinstance(value, dict) else None
                self.problems.append(
                    f"{name}: quantised weights ({method or 'of some kind'}) are not supported; "
                    "use the unquantised model that they were made from"
                )
                continue
            near = difflib.get_close_matches(name[:_SHOWN], self.known, n=1, cutoff=0.85)
            hint = f"; did you mean {near[0]}?" if near else ""
            expected = (
                "true" if name in ON else "0" if is_dropout(name) else "absent, null or false"
            )
            self.complain(shortened(name)[1:-1], value, expected + hint)
        if self.problems:
            raise ValueError(
                f"{self.where}: fields this decoder cannot honour:\n  "
                + "\n  ".join(self.problems[:20])
                + "\nRemove a field only if the model's outputs do not depend on it."
            )


def shortened(value: Any) -> str:
    """A value as an error shows it: its beginning, where it is long."""
    try:
        shown = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return "a number of thousands of digits"
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"


def is_dropout(name: str) -> bool:
    """Whether a field is a probability of dropout; only 0 is what we compute."""
    return name.endswith(("dropout", "_pdrop", "dropout_prob", "dropout_rate"))


def _changes_nothing(name: str, value: Any) -> bool:
    """Whether a field that no reader asked for leaves the outputs as they are."""
    ids = name.endswith(("_token_id", "_token_ids", "_token_index"))
    off = value is None or (value is False and name not in ON)
    on = value is True and name in ON
    no_dropout = is_dropout(name) and value == 0
    return off or on or no_dropout or ids or name in HARMLESS
