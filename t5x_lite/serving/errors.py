# SPDX-License-Identifier: Apache-2.0
"""Refusals in the shape of OpenAI's errors, whatever refuses."""

from typing import Any

from starlette.responses import JSONResponse

# Types of errors by status, as OpenAI's clients know them.
TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that is refused.

    Attributes:
      status: HTTP status.
      message: the reason and the remedy.
      param: field of the request that is wrong; None where it is none.
      code: name of the error, for programs.
      headers: headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        # Names in a request may have halves of surrogate pairs, which no answer can have.
        return {"error": {name: text and whole_text(text) for name, text in error.items()}}

    def response(self) -> JSONResponse:
        """The error as a response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


class InvalidField(ApiError):
    """A field of a request that is missing, of another type, out of range, or contradictory."""

    def __init__(self, param: str | None, message: str, code: str = "invalid_value"):
        super().__init__(400, message, param=param, code=code)


def busy_error(message: str, seconds: int) -> ApiError:
    """Status 429: the request may be sent again after so many seconds."""
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})


def whole_text(text: str) -> str:
    """A text with "?" for halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()
