"""The description at /openapi.json is that of the parser, and no generated request breaks it."""

import dataclasses
import itertools
import json
import shutil

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from ivl_jax.config import ServeConfig
from ivl_jax.serving.bodies import CHAT, COMPLETION, IGNORED, NEUTRAL, VALUE
from ivl_jax.serving.openapi import describe_api
from tests.serving.conftest import running


def body_of(document, path):
    content = document["paths"][path]["post"]["requestBody"]["content"]
    return content["application/json"]["schema"]


def test_every_field_that_the_parser_knows_is_described_and_no_other():
    document = describe_api(ServeConfig(max_choices=5, max_messages=7))
    known = {*IGNORED, *NEUTRAL}
    for path, table, more in [
        ("/v1/chat/completions", CHAT, known),
        ("/v1/completions", COMPLETION, known),
        ("/v1/values", VALUE, set()),
    ]:
        schema = body_of(document, path)
        assert set(schema["properties"]) == set(table) | more
        assert schema["additionalProperties"] is False
    chat = body_of(document, "/v1/chat/completions")
    assert chat["required"] == ["messages", "model"]
    assert chat["properties"]["n"]["anyOf"][0]["maximum"] == 5
    assert chat["properties"]["messages"]["maxItems"] == 7
    # The limits of one server are not those of the next.
    assert "maxItems" not in CHAT["messages"].schema


def test_every_path_that_answers_json_is_described(client):
    status, document = client.send("GET", "/openapi.json")
    assert status == 200
    routes = {route.path for route in client.prepared.app.routes}
    page = {"/", "/page.js", "/page.css", "/openapi.json"}
    assert set(document["paths"]) == routes - page


def narrowed(document):
    """The description of a server, with the names and tokens that it has, and short answers.

    Bodies that are generated from it are decoded with; those that are to break it go beyond it.
    """
    few = {"type": "integer", "minimum": 1, "maximum": 3}
    for path in ("/v1/chat/completions", "/v1/completions"):
        schema = body_of(document, path)
        properties = schema["properties"]
        # One set of value networks beside the base alone: each compiles its own programs.
        properties["model"] = {"enum": ["stories", "mine", "stories+mine"]}
        properties["strengths"]["anyOf"][0]["propertyNames"] = {"enum": ["mine"]}
        properties["max_tokens"] = few
        properties["n"]["anyOf"][0]["maximum"] = 2
        schema["required"] += ["max_tokens", "strengths"]
    body_of(document, "/v1/chat/completions")["properties"]["max_completion_tokens"] = few
    prompts = body_of(document, "/v1/completions")["properties"]["prompt"]["anyOf"][0]["anyOf"]
    for tokens in (prompts[2], prompts[3]["items"]):
        tokens["items"]["maximum"] = 511
    value = body_of(document, "/v1/values")["properties"]
    value["folder"] = {"enum": _FOLDERS}
    value["name"] = {"enum": ["one", "two", "mine", "base"]}
    named = document["paths"]["/v1/values/{name}"]["parameters"]
    named[0]["schema"] = {"enum": ["one", "two", "absent"]}
    return document


@pytest.fixture(params=["fixed", "values_dir"])
def fuzzed(request, serve_config, folders, tmp_path):
    """A server whose clients may load nothing, and one that has a folder for them."""
    if request.param == "fixed":
        with running(serve_config) as client:
            yield client
        return
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    shutil.copytree(folders[1], shelf / "good")
    (shelf / "linked").symlink_to(shelf / "good")
    (tmp_path / "secret").mkdir()
    (shelf / "out").symlink_to(tmp_path / "secret")
    (shelf / "empty").mkdir()
    config = dataclasses.replace(serve_config, values_dir=str(shelf), max_values=4)
    with running(config) as client:
        yield client


_FOLDERS = ["good", "linked", "out", "empty", "absent", "../secret", "/etc", "good/../..", "a\0b"]


def test_generated_requests_neither_crash_nor_hang_the_server(fuzzed):
    client = fuzzed
    schemathesis = pytest.importorskip(
        "schemathesis", reason="the extra `interop` is not installed"
    )
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    document = narrowed(client.send("GET", "/openapi.json")[1])
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=f"http://127.0.0.1:{client.port}")
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    tried, bodies, loaded = set(), [], set()
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation, mode in itertools.product(operations, modes):
        if mode == modes[1] and operation.method != "post" and "{name}" not in operation.path:
            continue  # without parameters nothing can be wrong

        @settings(
            max_examples=12,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(mode))
        def send(case):
            response = case.call_and_validate(checks=checks, timeout=60)
            if response.status_code == 200 and "completions" in case.operation.path:
                bodies.append(case.body)
            if response.status_code == 201:
                loaded.add(case.body["folder"])

        send()
        tried.add((operation.method.upper(), operation.path))
    assert ("POST", "/v1/chat/completions") in tried
    assert ("DELETE", "/v1/values/{name}") in tried
    # The bodies that were decoded differ in what the fields say and in which there are; how many
    # of the generated ones can be decoded is a matter of hypothesis's version.
    for name in ("model", "strengths", "max_tokens"):
        assert len({json.dumps(body[name]) for body in bodies}) > 1, name
    assert len({frozenset(body) for body in bodies}) > 1
    allowed = {"good", "linked"} if client.prepared.config.values_dir else set()
    assert loaded == allowed
    assert client.send("GET", "/health") == (200, {"status": "ok", "in_flight": 0})
