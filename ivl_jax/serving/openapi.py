"""The server's description of itself, in OpenAPI 3.1.

In: the tables of fields that the parser reads bodies with, and the server's limits. Out: the JSON
of `/openapi.json`. A field is declared once, in `bodies`; here are only the paths and the answers.
"""

from collections.abc import Sequence
from typing import Any

from ivl_jax.config import MODEL_NAME, ServeConfig
from ivl_jax.serving.bodies import CHAT, COMPLETION, IGNORED, NEUTRAL, VALUE
from ivl_jax.serving.fields import Schema, Table, body_schema
from ivl_jax.version import __version__

_WHY = {
    400: "A field that cannot be used.",
    401: "The key is missing or wrong.",
    403: "A path outside --values-dir, or the server was started without it.",
    404: "No such model, value network or file.",
    408: "The body took too long.",
    409: "The name is taken, the value network is in use, or another one is being loaded.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many choices run or wait.",
    500: "Decoding or unloading failed.",
    503: "It took too long, or the engine has ended.",
    507: "There is no room for another value network.",
}
_BODY = (400, 401, 408, 413, 415)
_DECODING = (*_BODY, 404, 429, 500, 503)

_NULLABLE_TEXT: Schema = {"type": ["string", "null"]}
_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE_TEXT,
                "code": _NULLABLE_TEXT,
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_STRENGTHS: Schema = {"type": "object", "additionalProperties": {"type": "number"}}
_MODEL: Schema = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "max_model_len": {"type": "integer"},
        "strengths": _STRENGTHS,
    },
    "required": ["id", "object", "created", "owned_by", "max_model_len", "strengths"],
}
# One server-sent event: its data is the JSON of a chunk or of an error, or [DONE].
_EVENT: Schema = {
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_USAGE: Schema = {
    "type": "object",
    "properties": {
        name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    },
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
}


def describe_api(config: ServeConfig) -> dict[str, Any]:
    """Describe the paths of a server.

    Args:
        config: its limits.

    Returns:
        An OpenAPI document.
    """
    chat = _limited(CHAT, config)
    chat["properties"]["messages"]["maxItems"] = config.max_messages
    model, models = _shown("Model"), {"data": {"type": "array", "items": _ref("Model")}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ivl-serve", "version": __version__},
        "paths": {
            "/health": {"get": _operation("Whether requests can be answered.", _any(), (503,))},
            "/metrics": {"get": _operation("Figures for Prometheus.", _plain(), (401,))},
            "/v1/models": {
                "get": _operation("The names that requests may use.", _listed(models), (401,))
            },
            "/v1/models/{name}": {
                "parameters": [_NAME],
                "get": _operation("One of them.", model, (401, 404)),
            },
            "/v1/chat/completions": {
                "post": _operation("Continue a dialogue.", _answer(), _DECODING, body=chat)
            },
            "/v1/completions": {
                "post": _operation(
                    "Continue texts.", _answer(), _DECODING, body=_limited(COMPLETION, config)
                )
            },
            "/v1/values": {
                "post": _operation(
                    "Load a value network.",
                    model,
                    (*_BODY, 403, 404, 409, 503, 507),
                    body=body_schema(VALUE),
                    status=201,
                )
            },
            "/v1/values/{name}": {
                "parameters": [_NAME],
                "delete": _operation(
                    "Unload a value network that no request uses.",
                    _any(),
                    (401, 403, 404, 409, 500, 503),
                ),
            },
        },
        "components": {
            "schemas": {"Error": _ERROR, "Model": _MODEL},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


_NAME: dict[str, Any] = {
    "name": "name",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": f"^{MODEL_NAME}(\\+{MODEL_NAME})?$"},
}


def _limited(table: Table, config: ServeConfig) -> Schema:
    """The schema of a body, with the limits that the server was started with."""
    schema = body_schema(table, ignored=IGNORED, neutral=NEUTRAL)
    properties = schema["properties"]
    # Objects of the tables are shared: they are replaced, not changed.
    number, *others = properties["n"]["anyOf"]
    number = {**number, "maximum": config.most_choices}
    properties["n"] = {**properties["n"], "anyOf": [number, *others]}
    return schema


def _operation(
    summary: str,
    content: dict[str, Any],
    errors: Sequence[int],
    *,
    body: Schema | None = None,
    status: int = 200,
) -> dict[str, Any]:
    responses = {str(status): {"description": summary, "content": content}}
    for error in errors:
        shown = {"application/json": {"schema": _ref("Error")}}
        responses[str(error)] = {"description": _WHY[error], "content": shown}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if body is not None:
        content = {"application/json": {"schema": body}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _shown(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(name)}}


def _listed(properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"application/json": {"schema": schema}}


def _any() -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object"}}}


def _plain() -> dict[str, Any]:
    return {"text/plain": {"schema": {"type": "string"}}}


def _answer() -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "object": {"type": "string"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "system_fingerprint": {"type": "string"},
            "strengths": _STRENGTHS,
            "choices": {"type": "array", "items": {"type": "object"}},
            "usage": _USAGE,
        },
        "required": ["id", "object", "created", "model", "strengths", "choices", "usage"],
    }
    return {
        "application/json": {"schema": schema},
        "text/event-stream": {"schema": _EVENT},
    }
