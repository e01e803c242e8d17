# SPDX-License-Identifier: Apache-2.0
"""Connections of a server: the port, allowed hosts, limits and time-outs, a clean end."""

import asyncio
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Collection
from typing import Any

import h11
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from t5x_lite.serving.errors import ApiError

# Seconds that a client may take to send a request, or to read what is sent; and until the next one.
SLOWEST, IDLE = 15, 5
# Seconds for the errors of requests that are cut off.
LAST_ANSWERS = 2


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that hangs up on clients who take longer than SLOWEST, and has few connections.

    Attributes:
      seconds: how long they may take.
      most: most connections; requests of others get status 503.
      timer: hangs up when it runs out; None while nothing is waited for.
    """

    seconds: float = SLOWEST
    most: int = 64
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Expects the first request."""
        super().connection_made(transport)
        if len(self.connections) > 2 * self.most:
            transport.abort()
        elif len(self.connections) > self.most:
            # Its request is read before the answer: what is unread would reset the connection.
            self.app = refuse_connection
        self.expect()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is not HTTP, as JSON; hangs up where an answer has begun."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = ApiError(400, msg, code="invalid_http").response()
        headers = [*body.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(body.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

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


async def refuse_connection(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request of a connection that is one too many.

    Args:
      scope: the request's headers and address, as ASGI has them.
      receive: returns the next part of the request.
      send: sends a part of the answer.
    """
    headers = {"Retry-After": "1", "Connection": "close"}
    error = ApiError(503, "Too many connections", code="too_many_connections", headers=headers)
    await error.response()(scope, receive, send)


class StoppableServer(uvicorn.Server):
    """Server that ends with a signal, after what it has begun or soon after.

    Attributes:
      stop: called at the first signal.
      cut_off: called at the second one, or when the time is over: ends running answers with an
        error; None where `stop` ends them.
      last_seconds: seconds that running answers have to end after a signal.
      received: the signal; None before.

    Args:
      app: the application.
      stop: see above.
      connections: most connections at a time; others get status 503.
      last_seconds: see above.
      cut_off: see above.
    """

    def __init__(
        self,
        app: ASGIApp,
        stop: Callable[[], None],
        connections: int,
        last_seconds: float,
        cut_off: Callable[[], None] | None = None,
    ):
        class LimitedProtocol(TimedProtocol):
            most = connections

        super().__init__(
            uvicorn.Config(
                app,
                http=LimitedProtocol,
                ws="none",
                log_level="error",
                server_header=False,
                timeout_keep_alive=IDLE,
                timeout_graceful_shutdown=math.ceil(last_seconds) + LAST_ANSWERS,
            )
        )
        self.stop, self.cut_off, self.last_seconds = stop, cut_off, last_seconds
        self.received: int | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Closes the port and lets the running answers end; at a second signal cuts them off.

        uvicorn's own method would raise the signal again at the end, which ends the process before
        it has cleaned up.
        """
        if self.received is not None and self.loop is not None:
            self.loop.call_soon_threadsafe(self.end_answers)
        self.should_exit, self.received = True, sig
        self.stop()
        # What is cancelled afterwards is no error of the server.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for the running answers, as long as they may take."""
        self.loop = asyncio.get_running_loop()
        limit = self.loop.call_later(self.last_seconds, self.end_answers)
        if self.received is not None:
            count = len(self.server_state.tasks)
            print(
                f"stopping: {count} running requests have {self.last_seconds:g} seconds "
                "(a second signal ends them)",
                file=sys.stderr,
                flush=True,
            )
        await super().shutdown(sockets)
        limit.cancel()

    def end_answers(self) -> None:
        """Ends running answers with an error, and then the connections that do not read it."""
        if self.cut_off is None or self.loop is None:
            self.force_exit = True
        else:
            self.cut_off()
            self.loop.call_later(LAST_ANSWERS, setattr, self, "force_exit", True)

    def serve_until_stopped(self, bound: socket.socket, is_busy: Callable[[], bool]) -> int:
        """Serves on a bound socket, and returns the exit status.

        Args:
          bound: the socket.
          is_busy: true while a model computes; a compilation cannot be interrupted, and the process
            ends without waiting for it.
        """
        self.run(sockets=[bound])
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
      refuse: returns the answer to a request for another host.
    """

    def __init__(
        self,
        app: ASGIApp,
        names: Collection[str],
        addresses: bool,
        refuse: Callable[[str], Response],
    ):
        self.app, self.names, self.addresses, self.refuse = app, set(names), addresses, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it.

        Args:
          scope: the request's headers and address, as ASGI has them.
          receive: returns the next part of the request.
          send: sends a part of the answer.
        """
        if scope["type"] == "http" and not self.allows(host_of(scope)):
            await self.refuse(host_of(scope)[:100])(scope, receive, send)
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
    """Names by which a server that listens on `host` may be asked for."""
    names = ["localhost", "127.0.0.1", "::1"]
    if not is_loopback(host):
        names += [socket.gethostname().lower(), socket.getfqdn().lower()]
    return names


def bind_socket(host: str, port: int) -> socket.socket:
    """Binds the port, before minutes are spent on loading.

    Raises:
      ValueError: the port is taken, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ValueError(f"{host}:{port}: {error.strerror}. Choose another --port, or 0") from error
    return bound
