"""Hugging Face's config.json, both ways: its fields of today and of older releases ↔ our fields.

In: a parsed `config.json`. Out: keyword arguments of `ArchConfig`; and back. One table says where a
family departs from the Llama line. transformers itself is not needed.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from ivl_jax.model.hf_families import FAMILIES, HARMLESS, MULTIMODAL, ON, Family

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


class _Reader:
    """Takes fields out of a config, keeps every complaint, and knows what was never asked for."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.left = dict(config)
        self.where = where
        self.known: set[str] = set()
        self.problems: list[str] = []

    def take(self, name: str, default: Any, *, kinds: tuple[type, ...] = ()) -> Any:
        """The field's value, or the default; a value of another kind is a problem."""
        self.known.add(name)
        value = self.left.pop(name, default)
        # JSON's true is no number, though Python's bool is an int.
        wrong = bool(kinds) and (not isinstance(value, kinds) or isinstance(value, bool))
        if kinds == (bool,):
            wrong = not isinstance(value, bool)
        if wrong and value is not default:
            self.complain(name, value, " or ".join(kind.__name__ for kind in kinds))
            return default
        return value

    def size(self, name: str, default: int | None) -> int:
        """A positive integer; null counts as absent."""
        if self.left.get(name) is None:
            self.left.pop(name, None)
        value = self.take(name, default, kinds=(int,))
        if value is None:
            self.complain(name, "nothing", "a positive integer")
        elif value < 1:
            self.complain(name, value, "a positive integer")
        return value if value is not None and value > 0 else 1

    def complain(self, name: str, value: Any, supported: str) -> None:
        shown = value if value == "nothing" else repr(value)
        self.problems.append(f"{name}: got {shown}, supported: {supported}")

    def finish(self) -> None:
        """Raises all complaints, those about fields nobody took included."""
        for name, value in self.left.items():
            ids = name.endswith(("_token_id", "_token_ids", "_token_index"))
            off = value is None or (value is False and name not in ON)
            if off or (value is True and name in ON) or name in HARMLESS or ids:
                continue
            near = difflib.get_close_matches(name, self.known, n=1, cutoff=0.85)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.complain(name, value, ("true" if name in ON else "absent, null or false") + hint)
        if self.problems:
            raise ValueError(
                f"{self.where}: fields this decoder cannot honour:\n  "
                + "\n  ".join(self.problems[:20])
                + "\nRemove a field only if the model's outputs do not depend on it."
            )


def read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `ArchConfig`; rotary parameters are still mappings.

    Args:
        config: A parsed `config.json`.

    Returns:
        One entry for every field of `ArchConfig`.

    Raises:
        ValueError: See `ArchConfig.from_hf`.
    """
    model_type = config.get("model_type")
    if model_type == "gemma3":
        config = _text_config(config)
        model_type = config.get("model_type")
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        supported = ", ".join([*FAMILIES, "gemma3"])
        raise ValueError(
            f"config.json: model_type: got {model_type!r}, supported: {supported}{hint}"
        )
    family = FAMILIES[model_type]
    reader = _Reader(config, f"config.json of model_type {model_type!r}")
    reader.take("model_type", None)
    fields: dict[str, Any] = {"model_type": model_type}
    for name in _SIZES:
        fields[name] = reader.size(name, family.sizes.get(name))
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = reader.size(
        "num_key_value_heads", family.num_key_value_heads or heads
    )
    fields["head_dim"] = reader.size(
        "head_dim", family.head_dim or max(1, fields["hidden_size"] // heads)
    )
    fields["max_position_embeddings"] = reader.size(
        "max_position_embeddings", family.max_position_embeddings
    )
    fields["base_hidden_size"] = reader.take("base_hidden_size", 0, kinds=(int,))
    for name, default in (("rms_norm_eps", 1e-6), ("initializer_range", 0.02)):
        fields[name] = float(reader.take(name, default, kinds=(int, float)))
    fields["tie_word_embeddings"] = reader.take(
        "tie_word_embeddings", family.tie_word_embeddings, kinds=(bool,)
    )
    fields["hidden_act"] = reader.take(family.activation_field, family.hidden_act, kinds=(str,))
    if family.activation_field != "hidden_act":
        reader.take("hidden_act", None)  # Older Gemma files carry it; transformers never reads it.
    fields |= _read_biases(reader, family)
    fields |= _read_spans(reader, family, fields["num_hidden_layers"])
    fields |= _read_ropes(reader, family, fields)
    fields |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    for name, default in family.optional.items():
        value = reader.take(name, default, kinds=(int, float, type(None)))
        fields[name] = None if value is None else float(value)
    if fields.get("query_pre_attn_scalar") is None:
        fields["query_pre_attn_scalar"] = float(fields["head_dim"])
    switches = ("qk_norm", "sandwich_norms", "unit_offset_norms", "scale_embeddings")
    fields |= {name: family.fixed.get(name, False) for name in switches}
    if dropout := reader.take("attention_dropout", 0.0):
        reader.complain("attention_dropout", dropout, "0.0")
    reader.finish()
    return fields


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model of a multimodal file, with the head's tying, which is said outside it."""
    reader = _Reader(config, "config.json of model_type 'gemma3'")
    text = reader.take("text_config", None, kinds=(dict,))
    if text is None:
        reader.complain("text_config", "nothing", "the text model's fields")
        text = {}
    text = {"model_type": "gemma3_text"} | text
    for name in ("model_type", "initializer_range", *MULTIMODAL):
        reader.take(name, None)
    tie = reader.take("tie_word_embeddings", None)
    if tie is not None and text.setdefault("tie_word_embeddings", tie) != tie:
        reader.complain("tie_word_embeddings", tie, "the same as in text_config")
    reader.finish()
    return text


def _read_biases(reader: _Reader, family: Family) -> dict[str, bool]:
    if family.attention_bias is not None:
        return {"attention_bias": family.attention_bias, "attention_output_bias": False}
    bias = reader.take("attention_bias", False, kinds=(bool,))
    return {"attention_bias": bias, "attention_output_bias": bias}


def _read_spans(reader: _Reader, family: Family, layers: int) -> dict[str, Any]:
    """Each layer's type, and the window where some layer slides."""
    full, sliding = "full_attention", "sliding_attention"
    window = None
    if family.span != "full":
        window = reader.take("sliding_window", family.sliding_window, kinds=(int, type(None)))
    implied = [full] * layers
    if family.span == "mistral":
        implied = [sliding if window is not None else full] * layers
    elif family.span == "qwen":
        used = reader.take("use_sliding_window", False, kinds=(bool,))
        first = reader.take("max_window_layers", 28, kinds=(int,))
        window = window if used else None
        if window is not None:
            implied = [sliding if index >= first else full for index in range(layers)]
    elif family.span in ("gemma2", "gemma3"):
        pattern = 2
        if family.span == "gemma3":
            pattern = reader.size("sliding_window_pattern", 6)
            reader.take("_sliding_window_pattern", None)  # Saved beside layer_types, never read.
        elif (size := reader.take("sliding_window_size", None)) not in (None, window):
            reader.complain("sliding_window_size", size, f"the same as sliding_window, {window}")
        implied = [sliding if (index + 1) % pattern else full for index in range(layers)]
    types = reader.take("layer_types", None, kinds=(list, tuple, type(None)))
    if types is None:
        types = implied
    elif family.span in ("full", "mistral") and list(types) != implied:
        reader.complain("layer_types", types, f"what this family implies, {implied}")
    return {
        "layer_types": tuple(types),
        "sliding_window": window if sliding in types else None,
    }


def _read_ropes(
    reader: _Reader, family: Family, fields: Mapping[str, Any]
) -> dict[str, dict[str, Any] | None]:
    """Rotary parameters: `rope_parameters`, or the older `rope_theta` beside `rope_scaling`."""
    optional_dict = (dict, type(None))
    now = reader.take("rope_parameters", None, kinds=optional_dict)
    scaling = reader.take("rope_scaling", None, kinds=optional_dict)
    theta = reader.take("rope_theta", None, kinds=(int, float, type(None)))
    if (part := reader.take("partial_rotary_factor", None)) not in (None, 1, 1.0):
        reader.complain("partial_rotary_factor", part, "1.0")
    if now and scaling and now != scaling:
        reader.complain("rope_scaling", scaling, "the same as rope_parameters, or null")
    context = fields["max_position_embeddings"]
    if family.span != "gemma3":
        found = dict(now or scaling or {})
        rope = _read_rope(reader, "rope_parameters", found, theta, 10_000.0, context)
        return {"rope_parameters": rope, "sliding_rope_parameters": None}
    local_theta = reader.take("rope_local_base_freq", None, kinds=(int, float, type(None)))
    found = dict(now or {"full_attention": scaling})
    far, near = found.pop("full_attention", None), found.pop("sliding_attention", None)
    if found:
        reader.complain("rope_parameters", found, "full_attention and sliding_attention")
    name = "rope_parameters.full_attention"
    full = _read_rope(reader, name, dict(far or {}), theta, 1_000_000.0, context)
    name = "rope_parameters.sliding_attention"
    sliding = _read_rope(reader, name, dict(near or {}), local_theta, 10_000.0, context)
    slides = fields["sliding_window"] is not None
    return {"rope_parameters": full, "sliding_rope_parameters": sliding if slides else None}


def _read_rope(
    reader: _Reader,
    name: str,
    found: dict[str, Any],
    theta: float | None,
    default_theta: float,
    context: int,
) -> dict[str, Any]:
    """One layer type's rotary parameters; `theta` is the one said outside of them."""
    legacy_type = found.pop("type", None)
    rope_type = found.pop("rope_type", None) or legacy_type or "default"
    inner = found.pop("rope_theta", None)
    if inner is not None and theta is not None and inner != theta:
        reader.complain("rope_theta", theta, f"the same as in {name}, {inner}")
    chosen = next(value for value in (inner, theta, default_theta) if value is not None)
    rope: dict[str, Any] = {"rope_theta": float(chosen), "rope_type": rope_type}
    if rope_type not in _ROPE_KEYS:
        reader.complain(f"{name}.rope_type", rope_type, ", ".join(_ROPE_KEYS))
        return {"rope_theta": float(chosen)}
    if rope_type == "llama3":
        found.setdefault("original_max_position_embeddings", context)
    for key in _ROPE_KEYS[rope_type]:
        value = found.pop(key, None)
        if not isinstance(value, int | float):
            reader.complain(f"{name}.{key}", value, "a number")
            return {"rope_theta": float(chosen)}
        rope[key] = value if key == "original_max_position_embeddings" else float(value)
    for key, value in found.items():
        if value is not None and (key, value) != ("partial_rotary_factor", 1.0):
            reader.complain(f"{name}.{key}", value, f"absent with rope_type {rope_type!r}")
    return rope


def write_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` for the fields of an `ArchConfig`, in the form transformers writes today.

    Args:
        fields: `dataclasses.asdict` of an `ArchConfig`.

    Returns:
        A JSON-able dict; whether the family can express the fields is for the caller to check.

    Raises:
        ValueError: The model_type is not a supported family.
    """
    family = FAMILIES.get(fields["model_type"])
    if family is None:
        supported = ", ".join(FAMILIES)
        raise ValueError(f"model_type: got {fields['model_type']!r}, supported: {supported}")
    same = (
        *("model_type", *_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"),
        *("rms_norm_eps", "initializer_range", "tie_word_embeddings"),
    )
    config: dict[str, Any] = {"architectures": [family.architecture]}
    config |= {name: fields[name] for name in same}
    if fields["base_hidden_size"]:
        config["base_hidden_size"] = fields["base_hidden_size"]
    config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config[family.activation_field] = fields["hidden_act"]
    if family.attention_bias is None:
        config["attention_bias"] = fields["attention_bias"]
    config |= {name: fields[name] for name in family.optional}
    if "query_pre_attn_scalar" in config:
        config["query_pre_attn_scalar"] = int(fields["query_pre_attn_scalar"])

    window, types = fields["sliding_window"], list(fields["layer_types"])
    if family.span == "qwen":
        config |= {"use_sliding_window": window is not None, "layer_types": types}
    elif family.span in ("gemma2", "gemma3"):
        config["layer_types"] = types
    if family.span in ("mistral", "qwen") or window is not None:
        config["sliding_window"] = window

    rope = _write_rope(fields["rope_parameters"])
    if family.span == "gemma3":
        local = fields["sliding_rope_parameters"] or {"rope_theta": 10_000.0}
        rope = {"full_attention": rope, "sliding_attention": _write_rope(local)}
    config["rope_parameters"] = rope
    return config


def _write_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    rope_type = rope.get("rope_type", "default")
    written = {"rope_type": rope_type, "rope_theta": rope["rope_theta"]}
    return written | {key: rope[key] for key in _ROPE_KEYS[rope_type]}
