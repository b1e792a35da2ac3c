"""Rotary parameters of a config.json, both ways: `rope_parameters` and its older spellings.

In: a reader of the file. Out: keyword arguments of `RopeParameters`; and back.
"""

import math
from collections.abc import Mapping
from typing import Any

from ivl_jax.model.hf_families import Family
from ivl_jax.model.hf_reader import Reader
from ivl_jax.model.rope_parameters import ROPE_KEYS

_LOCAL_THETA = 10_000.0  # of Gemma 3's sliding layers
_OPTIONAL_DICT = (dict, type(None))
_OPTIONAL_NUMBER = (int, float, type(None))
# The context before scaling in yarn and llama3, an integer; the other keys are floats.
_CONTEXT = "original_max_position_embeddings"
_BY_LENGTH = ("dynamic", "longrope", "su")
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def read_ropes(
    reader: Reader, family: Family, fields: Mapping[str, Any]
) -> dict[str, dict[str, Any] | None]:
    """Read `rope_parameters`, or the older `rope_theta` with `rope_scaling`.

    Args:
        reader: Of the file; collects the problems.
        family: What its code supports.
        fields: The fields of `ArchConfig` that have been read.

    Returns:
        Keyword arguments for `rope_parameters` and `sliding_rope_parameters` (None: the same).
    """
    now = reader.take("rope_parameters", None, kinds=_OPTIONAL_DICT)
    scaling = reader.take("rope_scaling", None, kinds=_OPTIONAL_DICT)
    outside = {
        "rope_theta": reader.take("rope_theta", None, kinds=_OPTIONAL_NUMBER),
        "partial_rotary_factor": reader.take("partial_rotary_factor", None, kinds=_OPTIONAL_NUMBER),
        _CONTEXT: reader.take(_CONTEXT, None, kinds=(int, type(None))),
    }
    one = _OneRope(reader, family, outside, fields["max_position_embeddings"])
    if family.span != "gemma3":
        rope = one.read("rope_parameters", now or scaling or {}, family.rope_theta)
        if now and scaling and one.read("rope_scaling", scaling, rope["rope_theta"]) != rope:
            reader.complain("rope_scaling", scaling, "the same as rope_parameters, or null")
        return {"rope_parameters": rope, "sliding_rope_parameters": None}
    local_theta = reader.take("rope_local_base_freq", None, kinds=_OPTIONAL_NUMBER)
    nested = dict(now or {"full_attention": scaling})
    far, near = nested.pop("full_attention", None), nested.pop("sliding_attention", None)
    if nested or not all(isinstance(rope, _OPTIONAL_DICT) for rope in (far, near)):
        reader.complain("rope_parameters", now, "full_attention and sliding_attention")
        far = near = None
    full = one.read("rope_parameters.full_attention", far or {}, family.rope_theta)
    if now and scaling and one.read("rope_scaling", scaling, full["rope_theta"]) != full:
        reader.complain("rope_scaling", scaling, "the same as full_attention's, or null")
    local = _OneRope(reader, family, outside | {"rope_theta": local_theta}, one.context)
    sliding = local.read("rope_parameters.sliding_attention", near or {}, _LOCAL_THETA)
    slides = fields["sliding_window"] is not None
    return {"rope_parameters": full, "sliding_rope_parameters": sliding if slides else None}


class _OneRope:
    """Reads the rotary parameters of one layer type, and the related fields outside of them."""

    def __init__(self, reader: Reader, family: Family, outside: Mapping[str, Any], context: int):
        self.reader = reader
        self.family = family
        self.outside = outside
        self.context = context

    def read(self, name: str, given: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
        """Keyword arguments of `RopeParameters`; plain ones if there is a problem."""
        found, complaints = dict(given), len(self.reader.problems)
        legacy_type = found.pop("type", None)
        rope_type = found.pop("rope_type", None) or legacy_type or "default"
        inner, outer = found.pop("rope_theta", None), self.outside["rope_theta"]
        if inner is not None and outer is not None and inner != outer:
            self.reader.complain("rope_theta", outer, f"the same as in {name}, {inner!r}")
        theta = next(value for value in (inner, outer, default_theta) if value is not None)
        rope: dict[str, Any] = {"rope_type": rope_type}
        self._add(rope, name, "rope_theta", theta)
        self._add_part(rope, name, found.pop("partial_rotary_factor", None))
        if not isinstance(rope_type, str) or rope_type not in self.family.rope_types:
            supported = ", ".join(self.family.rope_types)
            if rope_type in _BY_LENGTH:
                supported += " (not frequencies that depend on the text's length)"
            self.reader.complain(f"{name}.rope_type", rope_type, supported)
            return {"rope_theta": 1.0}
        if _CONTEXT in ROPE_KEYS[rope_type]:
            outer = self.outside[_CONTEXT]
            # As in transformers, the outer field takes precedence.
            found[_CONTEXT] = outer if outer is not None else found.get(_CONTEXT, self.context)
        if rope_type == "yarn":
            self._fill_yarn(found, name)
        for key in ROPE_KEYS[rope_type]:
            self._add(rope, name, key, found.pop(key, None))
        for key, value in found.items():
            if value is not None:
                self.reader.complain(f"{name}.{key}", value, f"absent with rope_type {rope_type!r}")
        return rope if len(self.reader.problems) == complaints else {"rope_theta": 1.0}

    def _add(self, rope: dict[str, Any], name: str, key: str, value: Any) -> None:
        """Add a value of the right type."""
        expected, kinds = "a number", (int, float)
        if key == _CONTEXT:
            expected, kinds = "an integer", (int,)
        elif key == "truncate":
            expected, kinds = "true or false", (bool,)
        if not self.reader.fits(value, kinds):
            self.reader.complain(f"{name}.{key}", value, expected)
        else:
            rope[key] = float(value) if expected == "a number" else value

    def _add_part(self, rope: dict[str, Any], name: str, inner: Any) -> None:
        part = inner if inner is not None else self.outside["partial_rotary_factor"]
        if part is None:
            return
        if not self.family.partial_rotary and part != 1:
            where = "" if inner is None else f"{name}."
            self.reader.complain(f"{where}partial_rotary_factor", part, "1.0")
        else:
            self._add(rope, name, "partial_rotary_factor", part)

    def _fill_yarn(self, found: dict[str, Any], name: str) -> None:
        """Fill in what a file omits, as transformers computes it."""
        context = found[_CONTEXT]
        if found.get("factor") is None and self.reader.fits(context, (int,)) and context > 0:
            found["factor"] = self.context / context
        scales = {key: found.pop(key, None) for key in ("mscale", "mscale_all_dim")}
        for key, value in scales.items():
            if value is not None and not self.reader.fits(value, (int, float)):
                self.reader.complain(f"{name}.{key}", value, "a number")
                return
        factor = found.get("factor")
        if found.get("attention_factor") is None and self.reader.fits(factor, (int, float)):
            scale, all_dim = scales.values() if all(scales.values()) else (1.0, 0.0)
            found["attention_factor"] = _magnitude(factor, scale) / _magnitude(factor, all_dim)
        for key, default in _YARN_DEFAULTS.items():
            found[key] = found.get(key) or default
        found.setdefault("truncate", True)


def _magnitude(factor: Any, scale: Any) -> float:
    """Yarn's scale of queries and keys for a context longer by `factor`."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(rope: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """One layer type's `rope_parameters`, in the form transformers now writes."""
    rope_type = rope.get("rope_type", "default")
    written = {"rope_type": rope_type, "rope_theta": rope["rope_theta"]}
    if family.partial_rotary:
        written["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return written | {key: rope[key] for key in ROPE_KEYS[rope_type]}


def write_ropes(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The value of `rope_parameters`."""
    rope = write_rope(fields["rope_parameters"], family)
    if family.span != "gemma3":
        return rope
    local = fields["sliding_rope_parameters"] or {"rope_theta": _LOCAL_THETA}
    return {"full_attention": rope, "sliding_attention": write_rope(local, family)}
