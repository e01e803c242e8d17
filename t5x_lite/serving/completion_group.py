# SPDX-License-Identifier: Apache-2.0
"""The completions of one request: texts of an engine, whose chunks arrive on the event loop."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request

from t5x_lite.serving.completion import (
    Completion,
    CompletionChunk,
    EngineClosedError,
    QueueFullError,
    TextRequest,
)
from t5x_lite.serving.engine import Engine
from t5x_lite.serving.errors import ApiError, InvalidField, busy_error
from t5x_lite.serving.fields import refuse_decode

ValueT = TypeVar("ValueT")
# Seconds beyond the deadline until a request is given up whose engine is compiling.
GRACE = 2.0


class Disconnected(Exception):
    """The client has gone."""


class NumberedChunk(NamedTuple):
    """Part of one of the texts.

    Attributes:
      number: number of the text.
      chunk: the part.
    """

    number: int
    chunk: CompletionChunk


class CompletionGroup:
    """The completions that an engine writes for one request; cancelled with it.

    Attributes:
      engine: the engine.
      requests: a request for each text.
      completions: those that the engine has taken.
      arrived: chunks that are not sent yet.
      cancelled: nobody waits for the texts any more.
    """

    def __init__(self, engine: Engine, requests: Sequence[TextRequest]):
        self.engine, self.requests = engine, requests
        self.completions: list[Completion] = []
        self.arrived: asyncio.Queue[NumberedChunk] = asyncio.Queue()
        self.cancelled = False

    async def start(self) -> None:
        """Submits the texts: all of them or none.

        Raises:
          ApiError: the model cannot read an input, the queue is full, or the server is stopping.
        """
        loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self.submit_all, loop)
        except QueueFullError:
            seconds = retry_seconds(self.engine)
            raise busy_error("Too many texts are waiting: try again later", seconds) from None
        except EngineClosedError:
            raise ApiError(503, "The server is stopping", headers={"Retry-After": "5"}) from None
        except ValueError as error:
            raise refuse_input(error) from None

    def submit_all(self, loop: asyncio.AbstractEventLoop) -> None:
        """Submits the texts from another thread: tokenizers and schemas take time."""
        try:
            for number, request in enumerate(self.requests):
                if self.cancelled:
                    break
                self.completions.append(self.engine.submit(request, self.sender(number, loop)))
        except BaseException:
            self.cancelled = True
            raise
        finally:
            if self.cancelled:
                self.cancel()

    def sender(self, number: int, loop: asyncio.AbstractEventLoop) -> Any:
        """Returns what passes the chunks of a text to the event loop."""

        def send(chunk: CompletionChunk) -> None:
            # The loop is closed if the server was stopped at once.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self.arrived.put_nowait, NumberedChunk(number, chunk))

        return send

    def cancel(self) -> None:
        """Ends the texts at their next block."""
        self.cancelled = True
        for completion in self.completions:
            completion.cancel()

    async def chunks(self) -> AsyncIterator[NumberedChunk]:
        """Yields the chunks of all texts as they arrive.

        Raises:
          ApiError: a text failed, or was not finished in time.
        """
        left = len(self.requests)
        deadline = self.requests[0].deadline
        while left:
            wait = None if deadline is None else max(deadline + GRACE - time.monotonic(), 0)
            try:
                arrived = await asyncio.wait_for(self.arrived.get(), wait)
            except TimeoutError:
                raise timeout_error() from None
            reason = arrived.chunk.finish_reason
            if reason in ("expired", "cancelled", "error"):
                raise failure(self.completions[arrived.number], reason)
            left -= reason is not None
            yield arrived


def failure(completion: Completion, reason: str) -> ApiError:
    """The error of a text that was not finished."""
    if reason == "expired":
        return timeout_error()
    if reason == "cancelled":
        return ApiError(503, "The server is stopping", headers={"Retry-After": "5"})
    if isinstance(completion.error, ValueError):
        return refuse_input(completion.error)
    return ApiError(500, "The text could not be written: see the server's log")


def timeout_error() -> ApiError:
    """Status 504: the text was not finished in time."""
    return ApiError(
        504, "The text was not finished in time: lower max_tokens, or try again", code="timeout"
    )


def refuse_input(error: ValueError) -> InvalidField:
    """The error of an input that a model cannot read, or of a setting that it does not follow."""
    refused = refuse_decode(error)
    if "limit" in refused.message and "input" in refused.message:
        refused.code = "context_length_exceeded"
    return refused


def retry_seconds(engine: Engine) -> int:
    """Seconds until a place in a full queue is likely to be free."""
    gauges = engine.gauges()
    return max(1, min(60, gauges.queued // max(gauges.rows, 1)))


async def or_disconnect(request: Request, work: Awaitable[ValueT]) -> ValueT:
    """Waits for work, and cancels it if the client goes.

    Args:
      request: the request, whose body has been read.
      work: the work.

    Raises:
      Disconnected: the client has gone.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def wait() -> ValueT:
        return await work

    working, watching = asyncio.create_task(wait()), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Disconnected
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
