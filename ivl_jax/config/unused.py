"""Options of a training config that were changed and have no effect on the run.

In: a config. Out: one sentence per reason. They are warnings, not errors: a config may serve
several objectives, and a run that was started with such an option can be resumed.
"""

import dataclasses
from typing import Any

from ivl_jax.config.train import TrainConfig

# Table → the objective that reads it.
_TABLES = {"preference": "dpo", "distil": "distil", "grpo": "grpo"}


def unused_options(config: TrainConfig) -> list[str]:
    """Name the options that differ from their defaults and have no effect.

    An objective of the user's own may read any table.

    Args:
        config: of a run.

    Returns:
        What to warn of.

    Example:
        >>> from ivl_jax.config import GrpoConfig
        >>> unused_options(TrainConfig(objective="grpo", grpo=GrpoConfig(clip_high=0.28)))
        ['grpo.clip_high = 0.28 has no effect with grpo.updates = 1: every step samples anew']
    """
    found = []
    if ":" not in config.objective:
        for table, objective in _TABLES.items():
            changed = _changed(table, getattr(config, table))
            if changed and config.objective != objective:
                found.append(_sentence(changed, f'objective = "{config.objective}"'))
    if config.objective == "grpo" and config.grpo.updates == 1:
        changed = _changed("grpo", config.grpo, "clip_low", "clip_high")
        if changed:
            found.append(_sentence(changed, "grpo.updates = 1: every step samples anew"))
    if config.objective == "distil" and config.distil.answers == "given":
        changed = _changed("distil", config.distil, "max_new_tokens", "temperature")
        if changed:
            found.append(_sentence(changed, 'distil.answers = "given": nothing is sampled'))
    if config.value.depths == 1:
        changed = _changed("value", config.value, "depths_distillation")
        if changed:
            found.append(_sentence(changed, "value.depths = 1: there is one depth"))
    penalty = config.penalty
    if config.method == "value" and (penalty.kind == "none" or not penalty.weight):
        changed = _changed("penalty", penalty, "schedule")
        if changed:
            found.append(_sentence(changed, "no penalty on value logits"))
    if config.method == "sft" and penalty.kind != "none" and penalty.weight > 0:
        changed = _changed("penalty", penalty)
        if changed:
            reason = 'method = "sft": a model trained by itself has no value logits'
            found.append(_sentence(changed, reason))
    return found


def _changed(table: str, options: Any, *names: str) -> list[str]:
    """The options, or those of them that are named, that differ from their defaults."""
    default = type(options)()
    return [
        f"{table}.{field.name} = {_shown(getattr(options, field.name))}"
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != getattr(default, field.name)
        and (not names or field.name in names)
    ]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _sentence(changed: list[str], reason: str) -> str:
    verb = "has" if len(changed) == 1 else "have"
    return f"{', '.join(changed)} {verb} no effect with {reason}"
