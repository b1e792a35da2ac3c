"""What a client is told when its request cannot be answered, in the form of OpenAI's errors.

In: a status and one sentence. Out: a response body `{"error": {message, type, param, code}}`.
"""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_NO_ROOM = 507
NO_RETRY = {"x-should-retry": "false"}
"""A header: repeating the request cannot help."""
# The same request may succeed later: its body was slow, or the server was busy.
_TEMPORARY = (408, 429)


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: the HTTP status.
        message: one sentence: what, where, expected, found, remedy.
        param: the field of the body that is wrong, if one is.
        code: a word that programs can compare.
        headers: of the response, such as `Retry-After`.

    Attributes:
        headers: With `x-should-retry: false` where repeating the request cannot help: OpenAI's
            client repeats requests after 409 and 5xx unless it is told not to.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = _encodable(message)
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param = None if param is None else _encodable(param)
        self.headers = dict(headers or {})
        lasts = status == _NO_ROOM or (status < 500 and status not in _TEMPORARY)
        if lasts and "Retry-After" not in self.headers:
            self.headers |= NO_RETRY

    def body(self) -> dict[str, Any]:
        """The response's body.

        Example:
            >>> ApiError(404, "no model b", param="model", code="model_not_found").body()["error"]
            {'message': 'no model b', 'type': 'invalid_request_error', 'param': 'model',
            'code': 'model_not_found'}
        """
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _KINDS.get(self.status, usual),
                "param": self.param,
                "code": self.code,
            }
        }


def _encodable(text: str) -> str:
    """A text without lone surrogates, which JSON bodies may hold and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode()


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that asks for something impossible (status 400)."""
    return ApiError(400, message, param=param, code=code)


def stopping() -> ApiError:
    """A request that the server has cancelled: it stops, and cannot wait any longer."""
    return ApiError(
        503,
        "the server is stopping, and this request has not ended in the time that it had: try again "
        "later",
        code="unavailable",
        headers={"Retry-After": "5"},
    )


def error_response(error: ApiError) -> JSONResponse:
    """The answer that says an error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)
