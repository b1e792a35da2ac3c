"""Hugging Face's config.json, both ways: current and older field names ↔ our fields.

In: a parsed `config.json`. Out: keyword arguments of `ArchConfig`; and back. One table lists where
a family differs from Llama. Does not need transformers.
"""

from collections.abc import Mapping
from typing import Any

from ivl_jax.model.hf_families import FAMILIES, MULTIMODAL, Family
from ivl_jax.model.hf_reader import Reader
from ivl_jax.model.hf_rope import read_ropes, write_ropes
from ivl_jax.text_files import shortened

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# What only value networks have, in no published file → its value where it is absent.
_OURS = {"base_hidden_size": 0, "head_depths": 1}


def read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `ArchConfig`; rotary parameters are still mappings.

    Args:
        config: A parsed `config.json`.

    Returns:
        Fields of `ArchConfig`; absent ones have its defaults.

    Raises:
        ValueError: See `ArchConfig.from_hf`.
    """
    model_type = config.get("model_type")
    if model_type == "gemma3":
        config = _text_config(config)
        model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type: models of the family {shortened(model_type)} are not "
            f"supported; supported families: {', '.join([*FAMILIES, 'gemma3'])}"
        )
    family = FAMILIES[model_type]
    reader = Reader(config, f"model_type {model_type!r}")
    reader.take("model_type", None)
    fields: dict[str, Any] = {"model_type": model_type, **family.fixed}
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
    for name, absent in _OURS.items():
        if reader.left.get(name, absent) != absent:
            fields[name] = reader.size(name, absent)
        reader.take(name, absent)
    for name, default in (("rms_norm_eps", family.rms_norm_eps), ("initializer_range", 0.02)):
        fields[name] = float(reader.take(name, default, kinds=(int, float)))
    fields["tie_word_embeddings"] = reader.take(
        "tie_word_embeddings", family.tie_word_embeddings, kinds=(bool,)
    )
    fields["hidden_act"] = reader.take(family.activation_field, family.hidden_act, kinds=(str,))
    if family.activation_field != "hidden_act":
        reader.take("hidden_act", None)  # In older Gemma files; transformers never reads it.
    fields |= _read_biases(reader, family)
    fields |= _read_spans(reader, family, fields["num_hidden_layers"])
    fields |= read_ropes(reader, family, fields)
    for name, default in family.optional.items():
        value = reader.take(name, default, kinds=(int, float, type(None)))
        fields[name] = None if value is None else float(value)
    if fields.get("query_pre_attn_scalar") is None:
        fields["query_pre_attn_scalar"] = float(fields["head_dim"])
    reader.finish()
    return fields


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model of a multimodal file, with the head's tying, which is stored outside it."""
    reader = Reader(config, "model_type 'gemma3'")
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


def _read_biases(reader: Reader, family: Family) -> dict[str, bool]:
    if family.attention_bias is not None:
        return {"attention_bias": family.attention_bias, "attention_output_bias": False}
    bias = reader.take("attention_bias", False, kinds=(bool,))
    return {"attention_bias": bias, "attention_output_bias": bias}


def _read_spans(reader: Reader, family: Family, layers: int) -> dict[str, Any]:
    """Each layer's type, the window if any layer slides, and which layers rotate."""
    full, sliding = "full_attention", "sliding_attention"
    window, rotary = None, [True] * layers
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
            reader.take("_sliding_window_pattern", None)  # Saved with layer_types, never read.
        elif (size := reader.take("sliding_window_size", None)) not in (None, window):
            reader.complain("sliding_window_size", size, f"the same as sliding_window, {window}")
        implied = [sliding if (index + 1) % pattern else full for index in range(layers)]
    elif family.span == "smollm3":
        used = reader.take("use_sliding_window", False, kinds=(bool,))
        window = window if used else None
        rotary = _read_rotary_layers(reader, layers)
        if window is not None:
            implied = [full if rotates else sliding for rotates in rotary]
    types = reader.take("layer_types", None, kinds=(list, tuple, type(None)))
    if types is None:
        types = implied
    elif family.span in ("full", "mistral") and list(types) != implied:
        reader.complain("layer_types", types, f"{implied[0]!r} for each of {layers} layers")
        types = implied
    elif not all(isinstance(kind, str) for kind in types):
        reader.complain("layer_types", types, "names")
        types = implied
    return {
        "layer_types": tuple(types),
        "sliding_window": window if sliding in types else None,
        "rotary_layers": () if all(rotary) else tuple(rotary),
    }


def _read_rotary_layers(reader: Reader, layers: int) -> list[bool]:
    """SmolLM3's `no_rope_layers`, in which 1 marks a layer that does rotate."""
    interval = reader.size("no_rope_layer_interval", 4)
    given = reader.take("no_rope_layers", None, kinds=(list, tuple, type(None)))
    if given is None:
        return [(index + 1) % interval != 0 for index in range(layers)]
    if len(given) < layers or not all(type(one) in (int, bool) and one in (0, 1) for one in given):
        reader.complain("no_rope_layers", given, f"0 or 1 for each of {layers} layers")
        return [True] * layers
    return [one == 1 for one in given[:layers]]


def write_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` for the fields of an `ArchConfig`, in the form transformers now writes.

    Args:
        fields: `dataclasses.asdict` of an `ArchConfig`.

    Returns:
        A JSON-compatible dict; the caller checks whether the family can express the fields.

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
    config |= {name: fields[name] for name, absent in _OURS.items() if fields[name] != absent}
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
    elif family.span == "smollm3":
        rotary = [int(rotates) for rotates in fields["rotary_layers"] or [True] * len(types)]
        config |= {"use_sliding_window": window is not None, "layer_types": types}
        config["no_rope_layers"] = rotary
    if family.span in ("mistral", "qwen", "smollm3") or window is not None:
        config["sliding_window"] = window

    config["rope_parameters"] = write_ropes(fields, family)
    return config
