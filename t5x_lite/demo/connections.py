# SPDX-License-Identifier: Apache-2.0
"""Connections of the page: allowed hosts, limits and time-outs, a clean end."""

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Collection
from typing import Any

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

# Seconds that a client may take to send a request, or to read what is sent; and until the next one.
SLOWEST, IDLE = 15, 5
# Most connections at a time; others get status 503.
CONNECTIONS = 64
# Seconds that running answers have to end after Ctrl-C.
LAST_SECONDS = 3


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that hangs up on clients who take longer than SLOWEST.

    Attributes:
      seconds: how long they may take.
      timer: hangs up when it runs out; None while nothing is waited for.
    """

    seconds: float = SLOWEST
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Expects the first request."""
        super().connection_made(transport)
        self.expect()

    def data_received(self, data: bytes) -> None:
        """Expects the rest of a request that has not arrived completely."""
        super().data_received(data)
        # The server answers while a body arrives: its end counts, not the beginning of the answer.
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            if self.timer is None:
                self.expect()
        else:
            self.relax()

    def pause_writing(self) -> None:
        """Expects the client to read."""
        super().pause_writing()
        self.expect()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self.relax()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expects nothing more."""
        self.relax()
        super().connection_lost(exc)

    def expect(self) -> None:
        """Starts the timer."""
        self.relax()
        self.timer = self.loop.call_later(self.seconds, self.transport.abort)

    def relax(self) -> None:
        """Stops the timer."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class PageServer(uvicorn.Server):
    """Server that ends the running answers when it is told to stop.

    Attributes:
      stop: called at the first signal.
      received: the signal; None before.
    """

    def __init__(self, app: ASGIApp, stop: Callable[[], None]):
        super().__init__(
            uvicorn.Config(
                app,
                http=TimedProtocol,
                log_level="warning",
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=IDLE,
                timeout_graceful_shutdown=LAST_SECONDS,
            )
        )
        self.stop = stop
        self.received: int | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stops: answers end at their next piece, and waiting ones at once."""
        self.received = sig
        self.stop()
        # What is cancelled afterwards is no error of the server.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)

    def serve_until_stopped(self, bound: socket.socket, is_busy: Callable[[], bool]) -> int:
        """Serves on a bound socket, and returns the exit status.

        Args:
          bound: the socket.
          is_busy: true while a model computes; a compilation cannot be interrupted, and the process
            ends without waiting for it.
        """
        try:
            self.run(sockets=[bound])
        except KeyboardInterrupt:  # raised again by uvicorn, after it has stopped
            pass
        if self.received is None:
            return 0
        print(f"stopped by {signal.Signals(self.received).name}", file=sys.stderr, flush=True)
        if is_busy():
            os._exit(128 + self.received)
        return 128 + self.received


class HostGuard:
    """Refuses requests for other hosts: pages of sites whose names lead here (DNS rebinding).

    Attributes:
      app: the application.
      names: host names that are answered.
      addresses: also answer requests that name an IP address, to which no DNS name can lead.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], addresses: bool):
        self.app, self.names, self.addresses = app, set(names), addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it with status 400.

        Args:
          scope: the request's headers and address, as ASGI has them.
          receive: returns the next part of the request.
          send: sends a part of the answer.
        """
        if scope["type"] == "http" and not self.allows(host_of(scope)):
            why = f"Unknown host: start the page with --allow_host={host_of(scope)[:100]}"
            await JSONResponse({"error": why}, status_code=400)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def allows(self, host: str) -> bool:
        """True for an allowed name, or an address where these are allowed."""
        return host in self.names or (self.addresses and is_address(host))


def host_of(scope: Scope) -> str:
    """The host of a request's Host header in lower case, without port and brackets."""
    headers = [value for name, value in scope["headers"] if name == b"host"]
    host = headers[0].decode("latin-1").lower() if len(headers) == 1 else ""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_address(host: str) -> bool:
    """True for an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """True if an address is of this machine alone."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def own_names(host: str) -> list[str]:
    """Names by which a page that listens on `host` may be asked for."""
    names = ["localhost", "127.0.0.1", "::1"]
    if not is_loopback(host):
        names += [socket.gethostname().lower(), socket.getfqdn().lower()]
    return names
