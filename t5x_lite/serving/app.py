# SPDX-License-Identifier: Apache-2.0
"""Routes of the server: OpenAI's API, tasks of encoder-decoders, health and metrics."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Literal

from absl import logging
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from t5x_lite.serving import answers
from t5x_lite.serving.completion import EngineClosedError
from t5x_lite.serving.completion_group import (
    GRACE,
    CompletionGroup,
    Disconnected,
    or_disconnect,
    timeout_error,
)
from t5x_lite.serving.connections import HostGuard, own_names
from t5x_lite.serving.errors import ApiError, InvalidField, busy_error
from t5x_lite.serving.fields import check_others, list_prompts, parse_json, read_field
from t5x_lite.serving.guards import KEY_NUMBER, KeyGuard, read_body
from t5x_lite.serving.jobs import READERS, Job, encode_prompts, read_job
from t5x_lite.serving.metrics import Metrics
from t5x_lite.serving.models import ServedModel, ServedModels

Handler = Callable[[Request], Awaitable[Response]]
# What nginx logs for a client that has gone; nobody receives it.
GONE = 499


class Api:
    """Handlers of the routes.

    Attributes:
      models: the models.
      metrics: metrics of the server.
      began: seconds since the epoch when the server began.
      stopping: true after a signal: no balancer is to send more.
    """

    def __init__(self, models: ServedModels):
        self.models, self.metrics = models, Metrics(models.served)
        self.began = int(time.time())
        self.stopping = False

    def stop(self) -> None:
        """Says that the server is stopping."""
        self.stopping = True

    async def send_health(self, request: Request) -> Response:
        """Status 200 while every engine's thread lives."""
        served = self.models.served.items()
        dead = [name for name, each in served if not each.engine.thread.is_alive()]
        if dead:
            raise ApiError(503, f"The engine of {', '.join(dead)} has ended: restart the server")
        return JSONResponse({"status": "ok"})

    async def send_ready(self, request: Request) -> Response:
        """Status 200 while the server takes requests."""
        if self.stopping:
            raise ApiError(503, "The server is stopping")
        return await self.send_health(request)

    async def send_metrics(self, request: Request) -> Response:
        """Metrics for Prometheus."""
        return Response(self.metrics.write(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def send_models(self, request: Request) -> Response:
        """The list of models."""
        shown = [self.show_model(name) for name in self.models.served]
        return JSONResponse({"object": "list", "data": shown})

    async def send_model(self, request: Request) -> Response:
        """One model."""
        return JSONResponse(self.show_model(self.models.get(request.path_params["model"]).name))

    def show_model(self, name: str) -> dict[str, Any]:
        """A model as the API lists it."""
        return {"id": name, "object": "model", "created": self.began, "owned_by": "t5x_lite"}

    async def send_texts(self, route: str, request: Request) -> Response:
        """Texts of a model: completions, chat, tasks; streamed or whole."""
        begun = time.monotonic()
        body = await read_body(request, self.models.limits)
        try:
            async with asyncio.timeout(self.models.limits.timeout + GRACE):
                client = str(request.scope.get(KEY_NUMBER))
                job = await asyncio.to_thread(read_job, self.models, route, body, client)
                return await self.write_texts(request, job, begun, route)
        except TimeoutError:
            raise timeout_error() from None

    async def write_texts(self, request: Request, job: Job, begun: float, route: str) -> Response:
        """Texts of a request, or the beginning of their stream.

        Args:
          request: the request, whose body has been read.
          job: the texts to write.
          begun: time of the request's arrival.
          route: path of its route.
        """
        group = CompletionGroup(job.served.engine, job.requests)
        try:
            await or_disconnect(request, group.start())
            if job.wanted.stream:
                events = self.stream_events(job, group, begun, route)
                # A request that is refused before its first event gets a status of its own.
                first = await or_disconnect(request, anext(events))
                return StreamingResponse(
                    chain_events(first, events),
                    media_type="text/event-stream",
                    # nginx would collect the events.
                    headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
                )
            work = self.collect_choices(job, group, begun)
            choices = await or_disconnect(request, work)
        except BaseException:
            group.cancel()
            raise
        return JSONResponse(job.answer.whole(choices, answers.count_usage(job.prompts, choices)))

    async def collect_choices(
        self, job: Job, group: CompletionGroup, begun: float
    ) -> list[answers.Choice]:
        """Waits for all texts of a request.

        Args:
          job: the request.
          group: its texts.
          begun: time of its arrival.
        """
        choices = [answers.Choice() for _ in job.requests]
        first = True
        async for number, chunk in group.chunks():
            if first:
                self.metrics.first.labels(job.served.name).observe(time.monotonic() - begun)
            first = False
            choices[number].add(chunk)
        return choices

    async def stream_events(
        self, job: Job, group: CompletionGroup, begun: float, route: str
    ) -> AsyncIterator[bytes]:
        """Yields the server-sent events of a request, and cancels its texts when it is closed.

        Args:
          job: the request.
          group: its texts.
          begun: time of its arrival.
          route: path of its route.
        """
        choices, sent = [answers.Choice() for _ in job.requests], False
        try:
            async for number, chunk in group.chunks():
                choices[number].add(chunk)
                if not sent:
                    self.metrics.first.labels(job.served.name).observe(time.monotonic() - begun)
                    parts = job.answer.first_parts(len(choices))
                    yield b"".join(map(answers.event, parts))
                sent = True
                if chunk.text or chunk.scores or chunk.finish_reason:
                    shown = job.answer.show_chunk(number, chunk, choices[number])
                    yield answers.event(job.answer.part([shown]))
            if job.wanted.include_usage:
                usage = answers.count_usage(job.prompts, choices)
                yield answers.event(job.answer.part([], usage=usage))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            if not sent:
                raise
            # The status is sent already: clients know an error by its field.
            yield answers.event(error.body())
        finally:
            group.cancel()
            self.metrics.seconds.labels(route).observe(time.monotonic() - begun)

    async def send_embeddings(self, request: Request) -> Response:
        """Vectors of texts."""
        body = await read_body(request, self.models.limits)
        fields = parse_json(body)
        served = self.models.get(read_field(fields, "model", str, ...))
        texts = read_inputs(served, fields, self.models.limits.texts)
        encoding = read_field(fields, "encoding_format", Literal["float", "base64"], "float")
        prompt = read_field(fields, "prompt", Literal["query", "document"])
        width = read_field(fields, "dimensions", int)
        check_others(fields)
        tokens = await asyncio.to_thread(self.count_tokens, served, texts)
        vectors = await or_disconnect(request, self.embed(served, texts, prompt))
        if width not in (None, vectors.shape[1]):
            raise InvalidField("dimensions", f"{served.name} has vectors of {vectors.shape[1]}")
        return JSONResponse(answers.show_vectors(vectors, encoding, served.name, tokens))

    def count_tokens(self, served: ServedModel, texts: Sequence[str]) -> int:
        """Number of tokens of texts; raises ApiError where one is too long."""
        counts = [len(each) for each in encode_prompts(served.session.predictor, texts, "input")]
        most = self.models.limits.max_input_tokens
        if max(counts) > most:
            raise ApiError(
                400,
                f"The input has {max(counts)} tokens, more than {most}: shorten it",
                param="input",
                code="context_length_exceeded",
            )
        return sum(counts)

    async def embed(self, served: ServedModel, texts: Sequence[str], prompt: str | None) -> Any:
        """Waits for vectors.

        Args:
          served: the model.
          texts: the texts.
          prompt: "query", "document" or None, as `Session.embed` has it.
        """
        limits = self.models.limits
        if served.embedding >= limits.queue:
            raise busy_error("Too many texts are waiting: try again later", 1)
        served.embedding += 1
        try:
            future = served.embed(texts, prompt)
            return await asyncio.wait_for(asyncio.wrap_future(future), limits.timeout)
        except TimeoutError:
            raise ApiError(504, "The vectors were not computed in time", code="timeout") from None
        except EngineClosedError:
            raise ApiError(503, "The server is stopping", headers={"Retry-After": "5"}) from None
        except ValueError as error:
            raise InvalidField("input", str(error)) from None
        finally:
            served.embedding -= 1

    def counted(self, route: str, handler: Handler) -> Handler:
        """Returns the handler of a route, whose failures are answers, and which is counted."""

        async def respond(request: Request) -> Response:
            begun = time.monotonic()
            try:
                response = await handler(request)
            except Disconnected:
                response = Response(status_code=GONE)
            except ApiError as error:
                response = error.response()
            except Exception:
                logging.exception("%s failed", route)
                response = ApiError(500, "The request failed: see the server's log").response()
            self.metrics.requests.labels(route, response.status_code).inc()
            if not isinstance(response, StreamingResponse):
                self.metrics.seconds.labels(route).observe(time.monotonic() - begun)
            return response

        return respond


def read_inputs(served: ServedModel, fields: dict[str, Any], most: int) -> list[str]:
    """Takes the texts to embed out of a request.

    Args:
      served: the model.
      fields: the request.
      most: most texts.

    Raises:
      InvalidField: they are not texts, or too many.
    """
    prompts = list_prompts(read_field(fields, "input", object, ...), "input")
    texts = [each for each in prompts if isinstance(each, str)]
    if len(texts) < len(prompts):
        raise InvalidField("input", f"{served.name} embeds texts: send them, not token ids")
    if len(texts) > most:
        raise InvalidField("input", f"The request has {len(texts)} texts, more than {most}")
    return texts


async def chain_events(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yields the first event, then the others."""
    yield first
    async for each in events:
        yield each


def application(api: Api, host: str, keys: Sequence[str]) -> Starlette:
    """The web application.

    With keys, they guard it. Without, it is for this machine alone, and refuses other host names:
    pages of sites whose names lead here (DNS rebinding).

    Args:
      api: the handlers.
      host: address that the server listens on.
      keys: API keys; none for a server of this machine alone.
    """
    get = {
        "/health": api.send_health,
        "/ready": api.send_ready,
        "/metrics": api.send_metrics,
        "/v1/models": api.send_models,
        "/v1/models/{model:path}": api.send_model,
    }
    post: dict[str, Handler] = {path: functools.partial(api.send_texts, path) for path in READERS}
    post["/v1/embeddings"] = api.send_embeddings
    routes = [Route(path, api.counted(path, handler)) for path, handler in get.items()]
    routes += [
        Route(path, api.counted(path, handler), methods=["POST"]) for path, handler in post.items()
    ]

    def refuse_host(name: str) -> Response:
        return ApiError(421, f"This server does not answer for host {name!r}").response()

    guard = (
        Middleware(KeyGuard, keys=keys)
        if keys
        else Middleware(HostGuard, names=own_names(host), addresses=False, refuse=refuse_host)
    )
    handlers = {HTTPException: refuse_route}
    app = Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


async def refuse_route(request: Request, error: Exception) -> Response:
    """The answer to a path that is none, or a method that it does not have."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    message = f"There is no {request.method[:20]} {request.scope['path'][:100]}"
    return ApiError(status, message, code="unknown_url", headers=headers).response()
