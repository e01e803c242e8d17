# SPDX-License-Identifier: Apache-2.0
"""Server of the page: one thread that computes, one request at a time, with streamed answers."""

import asyncio
import base64
import hashlib
import ipaddress
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from t5x_lite.demo.limits import WIDTH, Limits, Question, parse_question

# Drafters without a number of layers or a file.
DRAFTERS = ("plain", "blockwise", "lookup", "recycling", "trigram", "jacobi", "lookahead")
# Forward passes between two pieces of an answer; the first token is sent at once.
EVERY = 2


class Models:
    """Sessions by name, and the single thread that computes (a mesh belongs to a thread).

    Attributes:
      limits: limits of requests.
      sessions: sessions by name.
      drafters: the allowed drafters by name of the session.
      programs: keys of the programs that are compiled.
      thread: the computing thread.
      turn: lock of the request in progress.
      pending: number of requests in progress or waiting.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.sessions: dict[str, Any] = {}
        self.drafters: dict[str, list[str]] = {}
        self.programs: set[tuple] = set()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.turn = asyncio.Lock()
        self.pending = 0

    def load(self, name: str, path: str) -> None:
        """Loads a checkpoint and decodes once, so that its programs are compiled.

        Raises:
          ValueError: it cannot be loaded, or lacks a decoder.
        """
        from t5x_lite import interactive

        self.add(name, lambda: interactive.load(path))

    def add(self, name: str, make: Any) -> None:
        """Adds the session that make() returns; make runs in the computing thread."""

        def warm_up():
            session = make()
            if session.predictor.cfg.decoder is None:
                raise ValueError(f"{name} is an encoder alone: it writes nothing")
            for _ in session.stream(
                "a", max_new_tokens=min(64, self.limits.tokens), drafter="plain"
            ):
                pass
            return session

        self.sessions[name] = self.thread.submit(warm_up).result()
        self.drafters[name] = supported_drafters(self.sessions[name].predictor)

    def describe(self) -> list[dict[str, Any]]:
        """Descriptions of the models for the page."""
        import jax

        descriptions = []
        for name, session in self.sessions.items():
            cfg = session.predictor.cfg
            leaves = jax.tree.leaves(session.predictor.params)
            descriptions.append(
                {
                    "name": name,
                    "kind": "decoder" if cfg.encoder is None else "encoder-decoder",
                    "parameters": sum(leaf.size for leaf in leaves),
                    "drafters": self.drafters[name],
                    "chats": session.template is not None,
                }
            )
        return descriptions

    def answer(self, question: Question) -> Iterator[dict[str, Any]]:
        """Yields the answer in pieces, and at the end its times; runs in the computing thread.

        "fresh" is true if the times include compilation.
        """
        from t5x_lite.analysis.drawing import token_labels
        from t5x_lite.evaluation import streaming

        session = self.sessions[question.model]
        predictor = session.predictor
        text = session.prompt(question.text) if question.chat else question.text
        program = program_key(predictor, question, text)
        fresh, self.programs = program not in self.programs, self.programs | {program}
        start, first, count = time.perf_counter(), None, 0
        for piece in streaming.stream_text(predictor, text, question.decode, EVERY):
            seconds = time.perf_counter() - start
            first = seconds if first is None else first
            count += len(piece.tokens)
            names = token_labels(predictor.targets, piece.tokens)
            tokens = zip(names, piece.calls, piece.drafted_by, strict=True)
            yield {"text": piece.text, "tokens": list(tokens), "calls": piece.total}
        seconds = time.perf_counter() - start
        times = {"first": first, "seconds": seconds, "count": count, "rate": count / seconds}
        yield {"done": True, "fresh": fresh} | times


def supported_drafters(predictor: Any) -> list[str]:
    """The drafters that a model supports."""
    from t5x_lite import config

    names = []
    for name in DRAFTERS:
        try:
            predictor.drafters.get(config.Decode(drafter=name, draft_length=WIDTH))
        except ValueError:
            continue
        names.append(name)
    return names


def program_key(predictor: Any, question: Question, text: str) -> tuple:
    """Key of the compiled programs of an answer.

    Args:
      predictor: the model.
      question: the request.
      text: the input, with the chat template applied.
    """
    from t5x_lite import decoding

    decode, length = question.decode, len(predictor.encode_inputs([text])[0])
    sizes = decoding.bucket_length(length), decoding.bucket_length(decode.max_new_tokens)
    return question.model, decode.drafter, decode.temperature > 0, *sizes


def application(models: Models, host: str) -> Starlette:
    """The web application: the page, the list of models, and answers.

    A request is JSON, so that a page of another site cannot send one (browsers send a preflight
    request first), and requests with another Host are refused (DNS rebinding).
    """
    page, policy = read_page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }

    async def send_page(request: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    async def send_models(request: Request) -> Response:
        limits = {"characters": models.limits.characters, "tokens": models.limits.tokens}
        return JSONResponse({"models": models.describe(), "limits": limits}, headers=headers)

    async def send_answer(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":
            return refuse("A question is JSON (Content-Type: application/json)", 415)
        try:
            body = await read_body(request, models.limits.bytes)
            question = parse_question(body, models.drafters, models.limits)
        except ValueError as error:
            return refuse(str(error), 400)
        if models.pending > models.limits.waiting:
            return refuse(f"Busy: {models.limits.waiting} texts are waiting already", 503)
        lines = stream_answer(models, question, request)
        # Started here, so that the generator is closed whatever happens to the response.
        first = await anext(lines, b"")
        return StreamingResponse(
            chain_lines(first, lines), media_type="application/x-ndjson", headers=headers
        )

    routes = [
        Route("/", send_page),
        Route("/models", send_models),
        Route("/write", send_answer, methods=["POST"]),
    ]
    allowed = ["localhost", "127.0.0.1", "[::1]"] if is_loopback(host) else ["*"]
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=allowed, www_redirect=False)
    return Starlette(routes=routes, middleware=[guard])


async def read_body(request: Request, most: int) -> bytes:
    """Reads the body of a request; stops as soon as it is too large.

    Raises:
      ValueError: it has more than `most` bytes, or does not arrive.
    """
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ValueError(f"The question is longer than {most} bytes")
    except ClientDisconnect as error:
        raise ValueError("The question did not arrive completely") from error
    return body


async def chain_lines(first: bytes, lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yields the first line, then the others."""
    yield first
    async for line in lines:
        yield line


async def stream_answer(
    models: Models, question: Question, request: Request
) -> AsyncIterator[bytes]:
    """Yields the lines of an answer, after the requests before it are finished.

    A client that disconnects is noticed at the next line, which ends the computation.

    Args:
      models: the models.
      question: the request.
      request: its connection.
    """
    loop = asyncio.get_running_loop()
    models.pending += 1
    try:
        async with models.turn:
            if await request.is_disconnected():
                return
            pieces = models.answer(question)
            while True:
                piece = await loop.run_in_executor(models.thread, next_piece, pieces)
                if piece is None:
                    return
                yield json.dumps(piece).encode() + b"\n"
    finally:
        models.pending -= 1


def next_piece(pieces: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """The next piece, None at the end; an error of the model becomes the last piece."""
    try:
        return next(pieces, None)
    except ValueError as error:
        return {"error": str(error)}


def refuse(why: str, status: int) -> Response:
    """A response with an error message."""
    return JSONResponse({"error": why}, status_code=status)


def read_page() -> tuple[str, str]:
    """The page, and its Content-Security-Policy.

    The policy allows the page's script and style, by their digests, and requests to this server.
    """
    page = resources.files("t5x_lite.demo").joinpath("page.html").read_text(encoding="utf-8")

    def digests(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in parts
        )

    policy = (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, policy


def is_loopback(host: str) -> bool:
    """True if an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
