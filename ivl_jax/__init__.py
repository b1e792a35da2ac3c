"""Inverse value learning in JAX: fine-tune once, small; use it again and again.

The public names, loaded on first use (importing them all takes seconds):

    import ivl_jax

    base = ivl_jax.load_model("ivl_jax/assets/family/L")
    value = ivl_jax.load_value("runs/demo/training/value")
    model = ivl_jax.compose(base, value)
    print(model.generate(["Question: …"])[0].text)

Stages: `load_model`, `save_model`, `load_config`, `train`, `load_value`, `save_value`, `compose`,
`push_to_hub`.
Records: `GenerationOptions`, `StrengthPolicy`, `Message`, `Generation`; `EngineLimits` for
`model.engine`.
Mathematics, pure: `compose_logits`, `value_forward`, `value_penalty`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ivl_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from ivl_jax.checkpoint import ValueNetwork, load_value, push_to_hub, save_value
    from ivl_jax.composition import compose_logits, value_forward, value_penalty
    from ivl_jax.config import GenerationOptions, StrengthPolicy, TrainConfig, load_config
    from ivl_jax.data.formats import Message
    from ivl_jax.decoding.capacity import EngineLimits
    from ivl_jax.decoding.compose import compose
    from ivl_jax.decoding.generation import Generation
    from ivl_jax.post_training import run as train
    from ivl_jax.weights.language_model import LanguageModel
    from ivl_jax.weights.language_model import load_language_model as load_model
    from ivl_jax.weights.language_model import save_language_model as save_model

__all__ = [
    "EngineLimits",
    "Generation",
    "GenerationOptions",
    "LanguageModel",
    "Message",
    "StrengthPolicy",
    "TrainConfig",
    "ValueNetwork",
    "compose",
    "compose_logits",
    "load_config",
    "load_model",
    "load_value",
    "push_to_hub",
    "save_model",
    "save_value",
    "train",
    "value_forward",
    "value_penalty",
]

_HOMES = {
    "EngineLimits": "ivl_jax.decoding.capacity:EngineLimits",
    "Generation": "ivl_jax.decoding.generation:Generation",
    "GenerationOptions": "ivl_jax.config:GenerationOptions",
    "Message": "ivl_jax.data.formats:Message",
    "LanguageModel": "ivl_jax.weights.language_model:LanguageModel",
    "StrengthPolicy": "ivl_jax.config:StrengthPolicy",
    "TrainConfig": "ivl_jax.config:TrainConfig",
    "ValueNetwork": "ivl_jax.checkpoint:ValueNetwork",
    "compose": "ivl_jax.decoding.compose:compose",
    "compose_logits": "ivl_jax.composition:compose_logits",
    "load_config": "ivl_jax.config:load_config",
    "load_model": "ivl_jax.weights.language_model:load_language_model",
    "load_value": "ivl_jax.checkpoint:load_value",
    "push_to_hub": "ivl_jax.checkpoint:push_to_hub",
    "save_model": "ivl_jax.weights.language_model:save_language_model",
    "save_value": "ivl_jax.checkpoint:save_value",
    "train": "ivl_jax.post_training:run",
    "value_forward": "ivl_jax.composition:value_forward",
    "value_penalty": "ivl_jax.composition:value_penalty",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ivl_jax' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
