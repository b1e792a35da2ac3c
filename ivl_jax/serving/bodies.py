"""Request bodies: what a client asks for, checked field by field.

In: the JSON of `/v1/chat/completions` or `/v1/completions`. Out: an `Asked`. A field of OpenAI's
API that this server cannot honour is refused unless it has its neutral value; a field that does not
exist is refused too, since it is most likely misspelt.
"""

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ivl_jax.config import ConfigError, GenerationOptions, ServeConfig
from ivl_jax.data.formats import Message
from ivl_jax.decoding.given_prompts import Prompt
from ivl_jax.json_files import json_kind
from ivl_jax.serving.errors import invalid

_MOST_TOP_LOG_PROBS = 20
_MOST_STOP_STRINGS = 16
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# Fields that change nothing here.
_IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
# Fields that cannot be honoured, and what they must be if they are given at all.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
}


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        model: The model's name.
        prompts: What is continued: one dialogue, or one or several texts or lists of token ids.
        strengths: α by name of a value network, where the request gives one.
        options: How each prompt is continued.
        choices: Samples of each prompt.
        stream: Whether the answer comes in pieces.
        include_usage: Whether a stream ends with the number of tokens.
        top_log_probs: Likeliest tokens to show for each token; None: no log-probabilities.
    """

    model: str
    prompts: list[Prompt]
    strengths: dict[str, float]
    options: GenerationOptions
    choices: int
    stream: bool
    include_usage: bool
    top_log_probs: int | None


def read_chat(body: Any, config: ServeConfig) -> Asked:
    """Read the body of `/v1/chat/completions`.

    Args:
        body: of the request, parsed.
        config: its limits.

    Raises:
        ApiError: with status 400; it names the field.
    """
    fields = _Fields(body)
    messages = fields.take("messages", _is_list, "a list of messages", required=True)
    dialogue = _read_messages(messages, config)
    wanted = fields.take("logprobs", _is_boolean, "true or false", False)
    top = fields.take("top_logprobs", _is_count, "an integer ≥ 0", None)
    if top is not None and not wanted:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    longer = fields.take("max_completion_tokens", _is_count, "an integer ≥ 1", None)
    return _read_rest(fields, config, [dialogue], (top or 0) if wanted else None, longer)


def read_completion(body: Any, config: ServeConfig) -> Asked:
    """Read the body of `/v1/completions`; as `read_chat`."""
    fields = _Fields(body)
    given = fields.take("prompt", _is_prompt, _PROMPT, "")
    prompts = [given] if isinstance(given, str) or _is_token_list(given) else list(given)
    top = fields.take("logprobs", _is_count, "an integer ≥ 0", None)
    return _read_rest(fields, config, prompts, top, None)


def _read_rest(
    fields: "_Fields",
    config: ServeConfig,
    prompts: list[Prompt],
    top_log_probs: int | None,
    max_tokens: int | None,
) -> Asked:
    """Read what both kinds of requests have in common."""
    model = fields.take("model", _is_text, "the name of a model", required=True)
    given = fields.take("strengths", _are_strengths, _STRENGTHS, {})
    strengths = {name: _float(alpha) for name, alpha in given.items()}
    choices = fields.take("n", _is_count, "an integer ≥ 1", 1)
    stream = fields.take("stream", _is_boolean, "true or false", False)
    extra = fields.take("stream_options", _is_object, "an object", {})
    stop = fields.take("stop", _is_stop, "a text, or a list of texts", [])
    shorter = fields.take("max_tokens", _is_count, "an integer ≥ 1", None)
    seed = fields.take("seed", _is_integer, "an integer in [0, 2³²)", None)
    numbers: dict[str, Any] = {
        "temperature": _float(fields.take("temperature", _is_number, "a number ≥ 0", 1.0)),
        "top_p": _float(fields.take("top_p", _is_number, "a number in (0, 1]", 1.0)),
        "min_p": _float(fields.take("min_p", _is_number, "a number in [0, 1)", 0.0)),
    }
    top_k = fields.take("top_k", _is_count, "an integer ≥ 0", 0)
    fields.refuse_others()
    if top_log_probs is not None and top_log_probs > _MOST_TOP_LOG_PROBS:
        raise invalid(
            f"log-probabilities of at most {_MOST_TOP_LOG_PROBS} likeliest tokens can be shown, "
            f"got {top_log_probs}",
            "top_logprobs",
        )
    if not choices >= 1 or choices * len(prompts) > config.max_choices:
        raise invalid(
            f"n = {choices} for {len(prompts)} prompt(s): expected 1 to {config.max_choices} "
            "choices in total",
            "n",
        )
    stops = [stop] if isinstance(stop, str) else list(stop)
    if len(stops) > _MOST_STOP_STRINGS:
        raise invalid(f"stop: at most {_MOST_STOP_STRINGS} texts, got {len(stops)}", "stop")
    longest = max_tokens if max_tokens is not None else shorter
    try:
        options = GenerationOptions(
            max_new_tokens=config.default_max_tokens if longest is None else longest,
            seed=secrets.randbelow(2**32) if seed is None else seed,
            stop=tuple(stops),
            log_probs=top_log_probs,
            top_k=top_k,
            **numbers,
        )
    except ConfigError as error:
        raise invalid(str(error).removeprefix("generation options: ")) from error
    usage = extra.get("include_usage", False) is True
    return Asked(model, prompts, strengths, options, choices, stream, usage, top_log_probs)


class _Fields:
    """The fields of a body, each taken once."""

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise invalid(f"the body must be a JSON object, got {json_kind(body)}")
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(
        self,
        name: str,
        fits: Callable[[Any], bool],
        expected: str,
        default: Any = None,
        *,
        required: bool = False,
    ) -> Any:
        """Take a field; one that is null counts as not given."""
        if name not in self._left:
            if required:
                raise invalid(f"{name} is missing: expected {expected}", name)
            return default
        value = self._left.pop(name)
        if not fits(value):
            raise invalid(f"{name}: expected {expected}, got {value!r:.100}", name)
        return value

    def refuse_others(self) -> None:
        """Refuse what has not been taken."""
        for name, value in self._left.items():
            if name in _IGNORED or value in _NEUTRAL.get(name, ()):
                continue
            if name in _NEUTRAL:
                raise invalid(
                    f"{name} is not supported by this server: leave it out", name, "unsupported"
                )
            raise invalid(f"unknown field {name!r:.100}", name[:100], "unknown_field")


def _read_messages(given: list[Any], config: ServeConfig) -> list[Message]:
    if not 1 <= len(given) <= config.max_messages:
        raise invalid(
            f"messages: expected 1 to {config.max_messages} messages, got {len(given)}", "messages"
        )
    return [_read_message(each, f"messages[{index}]") for index, each in enumerate(given)]


def _read_message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise invalid(f"{where}: expected an object, got {json_kind(given)}", where)
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise invalid(
            f"{where}.role: expected one of {', '.join(_ROLES)}, got {role!r:.60}", f"{where}.role"
        )
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise invalid(
            f"{where}.content: expected a text, or a list of text parts, got {content!r:.60}",
            f"{where}.content",
        )
    if others := [n for n, v in given.items() if n not in ("role", "content", "name") and v]:
        raise invalid(f"{where}: {others[0]!r:.60} is not supported", where, "unsupported")
    return Message(_ROLES[role], content)


_PROMPT = "a text, a list of texts, a list of token ids, or a list of such lists"
_STRENGTHS = "an object from names of value networks to numbers"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _float(value: float | int) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer that no float holds
        return math.inf if value > 0 else -math.inf


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_stop(value: Any) -> bool:
    return _is_text(value) or (_is_list(value) and all(_is_text(one) for one in value))


def _is_token_list(value: Any) -> bool:
    return _is_list(value) and len(value) > 0 and all(_is_count(one) for one in value)


def _is_prompt(value: Any) -> bool:
    if _is_text(value) or _is_token_list(value):
        return True
    each = value if _is_list(value) else []
    return bool(each) and (all(map(_is_text, each)) or all(map(_is_token_list, each)))


def _is_text_part(value: Any) -> bool:
    return (
        isinstance(value, Mapping) and value.get("type") == "text" and _is_text(value.get("text"))
    )


def _are_strengths(value: Any) -> bool:
    return _is_object(value) and all(_is_number(one) for one in value.values())
