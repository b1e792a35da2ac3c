"""Whatever JSON a client sends is either understood or refused with a sentence."""

import pytest

pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_jax.config import GenerationOptions, ServeConfig
from ivl_jax.serving.bodies import (
    Asked,
    AskedValue,
    read_chat,
    read_completion,
    read_value_request,
)
from ivl_jax.serving.errors import NO_RETRY, ApiError
from ivl_jax.serving.openapi import describe_api

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
_FIELDS = [
    "model",
    "messages",
    "prompt",
    "strengths",
    "strength_policy",
    "n",
    "stream",
    "stream_options",
    "stop",
    "max_tokens",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "logprobs",
    "top_logprobs",
    "max_completion_tokens",
    "logit_bias",
    "tools",
    "response_format",
    "user",
]
_FITTING = st.fixed_dictionaries(
    {"model": st.just("m"), "messages": st.just([{"role": "user", "content": "Hi"}])},
    optional={
        "strength_policy": st.fixed_dictionaries(
            {}, optional={"name": st.sampled_from(["kl", "entropy", ""]), "scale": st.floats()}
        ),
        "strengths": st.dictionaries(st.text(max_size=3), st.integers() | st.floats(), max_size=2),
        "temperature": st.integers() | st.floats(),
        "top_p": st.floats(0, 1),
        "n": st.integers(-1, 9),
        "max_tokens": st.integers(-1, 2**40),
        "seed": st.integers(),
        "stop": st.text(max_size=2) | st.lists(st.text(max_size=2), max_size=2),
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(-1, 30),
        "logit_bias": st.dictionaries(
            st.integers(-1, 2**40).map(str) | st.text(max_size=2),
            st.integers(-120, 120) | st.floats(),
            max_size=2,
        ),
    },
)
_BODIES = _JSON | st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=6) | _FITTING


_CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def _read(read, body):
    """What a reader returns, or the refusal."""
    try:
        return read(body, ServeConfig())
    except ApiError as error:
        return error


@settings(max_examples=400, deadline=None)
@given(_BODIES)
def test_any_body_is_read_or_refused_with_a_sentence(body):
    for read in (read_chat, read_completion):
        found = _read(read, body)
        if isinstance(found, Asked):
            assert found.choices * len(found.prompts) <= ServeConfig().max_choices
        else:
            assert found.status == 400
            assert 10 < len(found.message) < 400
            assert set(found.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"prompt": ["A"] * 9}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"min_p": 1}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options"),
        ({"stream_options": {"usage": True}, "stream": True}, "stream_options"),
        ({"prediction": {"type": "content", "content": "A"}}, "prediction"),
        ({"messages": [{"role": "user", "content": "A"}] * 300}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [], "max_completion_tokens": 0}, "messages"),
        (_CHAT | {"max_completion_tokens": 0}, "max_completion_tokens"),
        (_CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (_CHAT | {"top_logprobs": 1}, "top_logprobs"),
    ],
)
def test_an_error_names_the_field_that_is_wrong(body, param):
    read = read_chat if "messages" in body else read_completion
    refused = _read(read, {"model": "m", **body})
    assert isinstance(refused, ApiError)
    assert (refused.status, refused.param) == (400, param)


def test_more_choices_than_can_ever_run_or_wait_are_no_valid_request():
    few = ServeConfig(max_rows=1, max_waiting=1)
    body = {"model": "m", "prompt": ["A", "B"]}
    assert isinstance(_read(lambda given, _: read_completion(given, few), body), Asked)
    refused = _read(lambda given, _: read_completion(given, few), {**body, "n": 2})
    assert refused.status == 400
    assert "expected 1 to 2 choices in total" in refused.message
    schema = describe_api(few)["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    (body_schema,) = [one["schema"] for one in schema.values()]
    assert body_schema["properties"]["n"]["anyOf"][0]["maximum"] == 2


@pytest.mark.parametrize(
    ("error", "may_help"),
    [
        (ApiError(400, "a field that cannot be used"), False),
        (ApiError(403, "loading is disabled"), False),
        (ApiError(409, "the name is taken"), False),
        (ApiError(409, "in use", headers={"Retry-After": "1"}), True),
        (ApiError(408, "a slow body"), True),
        (ApiError(429, "too many"), True),
        (ApiError(500, "a lost step"), True),
        (ApiError(503, "too long", headers=NO_RETRY), False),
        (ApiError(503, "a long queue", headers={"Retry-After": "5"}), True),
        (ApiError(507, "no room"), False),
    ],
    ids=lambda given: f"{given.status}-{given}" if isinstance(given, ApiError) else str(given),
)
def test_an_error_says_where_repeating_the_request_cannot_help(error, may_help):
    assert error.headers.get("x-should-retry") == (None if may_help else "false")


_VALUE = st.fixed_dictionaries(
    {"name": st.text(max_size=4) | _JSON, "folder": st.text(max_size=4) | _JSON},
    optional={"map": st.text(max_size=4) | _JSON, "strength": st.integers() | st.floats()},
)


@settings(max_examples=200, deadline=None)
@given(_JSON | _VALUE)
def test_any_body_names_a_value_or_is_refused_with_a_sentence(body):
    found = _read(lambda given, _: read_value_request(given), body)
    if isinstance(found, AskedValue):
        assert found.folder
        assert abs(found.strength) <= 10_000
    else:
        assert found.status == 400
        assert 10 < len(found.message) < 400


def test_a_body_that_says_little_gets_openais_defaults():
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    asked = read_chat(body, ServeConfig())
    seed = asked.options.seed
    assert asked.options == GenerationOptions(max_new_tokens=256, temperature=1.0, seed=seed)
    assert (asked.choices, asked.stream, asked.strengths) == (1, False, {})
    assert read_chat(body, ServeConfig()).options.seed != seed
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    message = {"role": "developer", "content": parts, "name": "me"}
    body = {"model": "m", "messages": [message, message], "tools": None, "seed": 3, "n": None}
    asked = read_chat(body | {"logit_bias": {"12": 1, "7": -100}}, ServeConfig())
    assert asked.options.logit_bias == ((7, -100.0), (12, 1.0))
    assert asked.prompts == [[("system", "Hi there"), ("system", "Hi there")]]
    assert asked.options.seed == 3
