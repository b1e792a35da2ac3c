"""What a client is told when its request cannot be answered, in the form of OpenAI's errors.

In: a status and one sentence. Out: a response body `{"error": {message, type, param, code}}`.
"""

from collections.abc import Mapping
from typing import Any

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: the HTTP status.
        message: one sentence: what, where, expected, found, remedy.
        param: the field of the body that is wrong, if one is.
        code: a word that programs can compare.
        headers: of the response, such as `Retry-After`.
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
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

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


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that asks for something impossible (status 400)."""
    return ApiError(400, message, param=param, code=code)
