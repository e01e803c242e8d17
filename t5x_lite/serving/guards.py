# SPDX-License-Identifier: Apache-2.0
"""Guards of a server: API keys, and what of a request is read before it is understood."""

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from t5x_lite.serving.errors import ApiError
from t5x_lite.serving.server_limits import ServerLimits

# Where the number of a request's API key is in its scope.
KEY_NUMBER = "t5x_lite.key"
# Routes that show nothing but that the server lives, for balancers without a key.
OPEN_PATHS = ("/health", "/ready")


class KeyGuard:
    """Refuses requests without one of the API keys, in a time that does not depend on the key.

    Attributes:
      app: the application.
      digests: SHA-256 of the keys; the keys themselves are not kept.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self.app = app
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it with status 401.

        Args:
          scope: the request's headers and address, as ASGI has them.
          receive: returns the next part of the request.
          send: sends a part of the answer.
        """
        number = self.find_key(scope) if scope["type"] == "http" else None
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and number is None:
            error = ApiError(
                401,
                "Send an API key of this server, as the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
        else:
            await self.app({**scope, KEY_NUMBER: number}, receive, send)

    def find_key(self, scope: Scope) -> int | None:
        """The number of the key of a request with one Authorization header; None without one."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        equal = [hmac.compare_digest(digest, each) for each in self.digests]
        return equal.index(True) if scheme.lower() == b"bearer" and any(equal) else None


async def read_body(request: Request, limits: ServerLimits) -> bytes:
    """Reads the body of a request; stops as soon as it is too long or too late.

    Args:
      request: the request.
      limits: limits of the server.

    Raises:
      ApiError: it is not JSON by its Content-Type (which keeps pages of other sites from sending
        one without asking), is encoded, too long or too slow, or does not arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "A request is JSON: send it with Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "A request is plain JSON: leave out Content-Encoding")
    # A refused body is not read to its end: the connection cannot serve another request.
    too_long = ApiError(
        413,
        f"The request is longer than {limits.body_bytes} bytes",
        code="request_too_large",
        headers={"Connection": "close"},
    )
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limits.body_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_long
    except TimeoutError:
        raise ApiError(
            408,
            f"The request did not arrive within {limits.body_seconds:g} seconds",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "The request did not arrive completely") from None
    return bytes(body)
