"""Request bodies: what a client asks for, checked field by field.

In: the JSON of `/v1/chat/completions` or `/v1/completions`, or of `/v1/values`. Out: an `Asked`, or
an `AskedValue`. The tables of fields are those that `/openapi.json` describes. A field of OpenAI's
API that this server cannot honour is refused unless it has its neutral value; a field that does not
exist is refused too, since it is most likely misspelt.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ivl_jax.composed.strength_policies import check_policy
from ivl_jax.config import (
    LARGEST_STRENGTH,
    MODEL_NAME,
    ConfigError,
    GenerationOptions,
    ServeConfig,
    StrengthPolicy,
    is_model_name,
    logit_bias_problem,
    strength_problem,
)
from ivl_jax.data.formats import Message
from ivl_jax.decoding.given_prompts import Prompt
from ivl_jax.json_files import json_kind
from ivl_jax.serving.errors import invalid
from ivl_jax.serving.fields import (
    BOOLEAN,
    COUNT,
    LOGIT_BIAS,
    POSITIVE,
    PROMPT,
    SEED,
    STOP,
    STREAM_OPTIONS,
    STRENGTH_POLICY,
    STRENGTHS,
    BodyReader,
    Field,
    Table,
    as_float,
    is_text,
    is_token_list,
    items,
    number,
    text,
)

_MOST_TOP_LOG_PROBS = 20
_MOST_STOP_STRINGS = 16
# Beyond it nothing changes any more, and what float32 cannot hold would fail a whole batch.
_MOST_TEMPERATURE = 1000.0
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# Fields that change nothing here.
IGNORED = (
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "service_tier",
)
# Fields that cannot be honoured, and what they must be if they are given at all.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
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
    "verbosity": ("medium",),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
}

_TOP = {"maximum": _MOST_TOP_LOG_PROBS}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": list(_ROLES)},
        "content": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        },
        "name": {"description": "Ignored: chat templates have no place for it."},
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}

_COMMON: Table = {
    "model": Field(text("the name of a model"), required=True, about="One of `/v1/models`."),
    "strengths": Field(STRENGTHS, {}, about="α of value networks, by name."),
    "strength_policy": Field(
        STRENGTH_POLICY,
        about="How much of the strengths applies at each position: `constant`, `entropy` or `kl`, "
        "and the entropy or divergence (nats) at which half of them does.",
    ),
    "n": Field(POSITIVE, 1, about="Samples of each prompt."),
    "stream": Field(BOOLEAN, False, about="Whether the answer comes as server-sent events."),
    "stream_options": Field(STREAM_OPTIONS, about="Only with `stream`."),
    "stop": Field(STOP, [], about="Texts that end an answer."),
    "max_tokens": Field(POSITIVE),
    "seed": Field(SEED),
    "temperature": Field(
        number("a number ≥ 0"), 1.0, limits={"minimum": 0, "maximum": _MOST_TEMPERATURE}
    ),
    "top_p": Field(number("a number in (0, 1]"), 1.0, limits={"exclusiveMinimum": 0, "maximum": 1}),
    "min_p": Field(number("a number in [0, 1)"), 0.0, limits={"minimum": 0, "exclusiveMaximum": 1}),
    "top_k": Field(COUNT, 0),
    "logit_bias": Field(
        LOGIT_BIAS, {}, about="Added to the composed logits of these token ids of the base."
    ),
}
CHAT: Table = {
    "messages": Field(items("a list of messages", _MESSAGE), required=True, limits={"minItems": 1}),
    "logprobs": Field(BOOLEAN, False),
    "top_logprobs": Field(COUNT, limits=_TOP),
    "max_completion_tokens": Field(POSITIVE),
    **_COMMON,
}
COMPLETION: Table = {
    "prompt": Field(PROMPT, ""),
    "logprobs": Field(COUNT, limits=_TOP),
    **_COMMON,
}
VALUE: Table = {
    "name": Field(
        text("a name for requests"),
        required=True,
        about="What requests will call it.",
        limits={"pattern": f"^{MODEL_NAME}$"},
    ),
    "folder": Field(
        text("a path below --values-dir"),
        required=True,
        about="A value folder, relative to the folder that the server was given.",
        limits={"minLength": 1},
    ),
    "map": Field(
        text("a path below --values-dir"),
        about="The vocabulary map, for a value network of another vocabulary.",
        limits={"minLength": 1},
    ),
    "strength": Field(
        number("a number"),
        1.0,
        about="α where a request names none.",
        limits={"minimum": -LARGEST_STRENGTH, "maximum": LARGEST_STRENGTH},
    ),
}


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        model: The model's name.
        prompts: What is continued: one dialogue, or one or several texts or lists of token ids.
        prompt_field: What the body calls it.
        strengths: α by name of a value network, where the request gives one.
        options: How each prompt is continued.
        choices: Samples of each prompt.
        stream: Whether the answer comes in pieces.
        include_usage: Whether a stream ends with the number of tokens.
        top_log_probs: Likeliest tokens to show for each token; None: no log-probabilities.
    """

    model: str
    prompts: list[Prompt]
    prompt_field: Literal["messages", "prompt"]
    strengths: dict[str, float]
    options: GenerationOptions
    choices: int
    stream: bool
    include_usage: bool
    top_log_probs: int | None


@dataclass(frozen=True)
class AskedValue:
    """A value network that a request loads.

    Attributes:
        name: What requests will call it.
        folder: Its folder, as the request writes it.
        map_file: Its vocabulary map, likewise; None: it shares the base's vocabulary.
        strength: α where a request names none.
    """

    name: str
    folder: str
    map_file: str | None
    strength: float


def read_chat(body: Any, config: ServeConfig) -> Asked:
    """Read the body of `/v1/chat/completions`.

    Args:
        body: of the request, parsed.
        config: its limits.

    Raises:
        ApiError: with status 400; it names the field.
    """
    fields = BodyReader(body, CHAT)
    dialogue = _read_messages(fields.take("messages"), config)
    wanted, top = fields.take("logprobs"), fields.take("top_logprobs")
    if top is not None and not wanted:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    max_completion_tokens = fields.take("max_completion_tokens")
    shown = (top or 0) if wanted else None
    if shown is not None:
        _check_top_log_probs(shown, "top_logprobs")
    return _read_rest(fields, config, [dialogue], "messages", shown, max_completion_tokens)


def read_completion(body: Any, config: ServeConfig) -> Asked:
    """Read the body of `/v1/completions`; as `read_chat`."""
    fields = BodyReader(body, COMPLETION)
    given = fields.take("prompt")
    prompts = [given] if isinstance(given, str) or is_token_list(given) else list(given)
    if (shown := fields.take("logprobs")) is not None:
        _check_top_log_probs(shown, "logprobs")
    return _read_rest(fields, config, prompts, "prompt", shown, None)


def read_value_request(body: Any) -> AskedValue:
    """Read the body of `POST /v1/values`.

    Args:
        body: of the request, parsed.

    Raises:
        ApiError: with status 400; it names the field.
    """
    fields = BodyReader(body, VALUE)
    name, folder, map_file = (fields.take(each) for each in ("name", "folder", "map"))
    strength = as_float(fields.take("strength"))
    fields.refuse_others()
    if not is_model_name(name):
        raise invalid(
            f"name: {name!r:.100} cannot be a model's name (letters, digits, '.', '_' and '-')",
            "name",
        )
    for field, path in (("folder", folder), ("map", map_file)):
        if path == "":
            raise invalid(f"{field} is empty: expected a path below --values-dir", field)
    if problem := strength_problem(strength):
        raise invalid(f"strength {problem}", "strength")
    return AskedValue(name, folder, map_file, strength)


def _read_rest(
    fields: BodyReader,
    config: ServeConfig,
    prompts: list[Prompt],
    prompt_field: Literal["messages", "prompt"],
    top_log_probs: int | None,
    max_completion_tokens: int | None,
) -> Asked:
    """Read what both kinds of requests have in common."""
    model = fields.take("model")
    strengths = {name: as_float(alpha) for name, alpha in fields.take("strengths").items()}
    choices, stream = fields.take("n"), fields.take("stream")
    extra, stop = fields.take("stream_options"), fields.take("stop")
    max_tokens, seed = fields.take("max_tokens"), fields.take("seed")
    numbers = {name: as_float(fields.take(name)) for name in ("temperature", "top_p", "min_p")}
    policy = _read_policy(fields.take("strength_policy"))
    top_k, given_bias = fields.take("top_k"), fields.take("logit_bias")
    fields.refuse_others(ignored=IGNORED, neutral=NEUTRAL)
    if extra is not None and not stream:
        raise invalid("stream_options is only allowed with stream: true", "stream_options")
    if choices * len(prompts) > config.most_choices:
        raise invalid(
            f"n = {choices} for {len(prompts)} prompt(s): expected 1 to {config.most_choices} "
            "choices in total",
            "n" if choices > 1 else prompt_field,
        )
    if _MOST_TEMPERATURE < numbers["temperature"] < math.inf:
        raise invalid(
            f"temperature: at most {_MOST_TEMPERATURE:g}, got {numbers['temperature']:g}",
            "temperature",
        )
    bias = {int(token_id): as_float(number) for token_id, number in given_bias.items()}
    if problem := logit_bias_problem(bias):
        raise invalid(f"logit_bias {problem}", "logit_bias")
    stops = [stop] if isinstance(stop, str) else list(stop)
    if len(stops) > _MOST_STOP_STRINGS:
        raise invalid(f"stop: at most {_MOST_STOP_STRINGS} texts, got {len(stops)}", "stop")
    new_tokens = max_tokens if max_completion_tokens is None else max_completion_tokens
    try:
        options = GenerationOptions(
            max_new_tokens=config.default_max_tokens if new_tokens is None else new_tokens,
            seed=secrets.randbelow(2**32) if seed is None else seed,
            stop=tuple(stops),
            log_probs=top_log_probs,
            logit_bias=bias,
            policy=policy,
            top_k=top_k,
            temperature=numbers["temperature"],
            top_p=numbers["top_p"],
            min_p=numbers["min_p"],
        )
    except ConfigError as error:
        problems = str(error).removeprefix("generation options: ")
        raise invalid(problems, problems.split()[0]) from error  # each begins with its field
    usage = bool(extra and extra.get("include_usage"))
    return Asked(
        model, prompts, prompt_field, strengths, options, choices, stream, usage, top_log_probs
    )


def _check_top_log_probs(number: int, field: str) -> None:
    if number > _MOST_TOP_LOG_PROBS:
        raise invalid(
            f"log-probabilities of at most {_MOST_TOP_LOG_PROBS} likeliest tokens can be shown, "
            f"got {number}",
            field,
        )


def _read_policy(given: Any) -> StrengthPolicy | None:
    if given is None:
        return None
    try:
        policy = StrengthPolicy(given["name"], as_float(given.get("scale", 1.0)))
        check_policy(policy, where="strength_policy")
    except ValueError as error:
        raise invalid(str(error), "strength_policy") from error
    return policy


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


def _is_text_part(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("type") == "text" and is_text(value.get("text"))
