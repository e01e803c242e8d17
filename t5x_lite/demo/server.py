# SPDX-License-Identifier: Apache-2.0
"""The server of the page: one thread that computes, questions one after the other, answers as
they are written."""

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

from t5x_lite.demo.limits import WIDTH, Limits, Question, question

# Those that need no number of layers and no file.
DECODERS = ("plain", "blockwise", "lookup", "recycling", "trigram", "jacobi", "lookahead")
# Forward passes between two pieces: the first token alone, since it is waited for.
EVERY = 2


class Models:
    """Sessions by name, and the one thread in which everything is computed (a mesh belongs to a
    thread)."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.sessions: dict[str, Any] = {}
        self.decoders: dict[str, list[str]] = {}
        self.seen: set[tuple] = set()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.turn = asyncio.Lock()
        self.asked = 0

    def load(self, name: str, path: str) -> None:
        """Loads a checkpoint and lets it write once, so that its programs are compiled.

        Raises:
          ValueError: it cannot be loaded, or writes nothing.
        """
        from t5x_lite import interactive

        self.add(name, lambda: interactive.load(path))

    def add(self, name: str, make: Any) -> None:
        """The session that make() gives, made in the thread that will use it."""

        def made():
            session = make()
            if session.predictor.cfg.decoder is None:
                raise ValueError(f"{name} is an encoder alone: it writes nothing")
            for _ in session.stream("a", length=min(64, self.limits.tokens), decoder="plain"):
                pass
            return session

        self.sessions[name] = self.thread.submit(made).result()
        self.decoders[name] = fitting(self.sessions[name].predictor)

    def described(self) -> list[dict[str, Any]]:
        """What the page says of each model."""
        import jax

        told = []
        for name, session in self.sessions.items():
            cfg = session.predictor.cfg
            leaves = jax.tree.leaves(session.predictor.params)
            told.append(
                {
                    "name": name,
                    "kind": "decoder" if cfg.encoder is None else "encoder-decoder",
                    "parameters": sum(leaf.size for leaf in leaves),
                    "decoders": self.decoders[name],
                    "chats": session.template is not None,
                }
            )
        return told

    def answer(self, asked: Question) -> Iterator[dict[str, Any]]:
        """The answer in pieces, and at the end how long it took; runs in the thread.

        fresh says that programs were compiled for it, which the times have in them.
        """
        from t5x_lite.analysis.labels import labels
        from t5x_lite.evaluation import streaming

        session = self.sessions[asked.model]
        predictor = session.predictor
        text = session.prompt(asked.text) if asked.chat else asked.text
        program = programs(predictor, asked, text)
        fresh, self.seen = program not in self.seen, self.seen | {program}
        begun, first, count = time.perf_counter(), None, 0
        for piece in streaming.stream(predictor, text, asked.decode, EVERY):
            seconds = time.perf_counter() - begun
            first = seconds if first is None else first
            count += len(piece.tokens)
            names = labels(predictor.targets, piece.tokens)
            tokens = zip(names, piece.calls, piece.guessed, strict=True)
            yield {"text": piece.text, "tokens": list(tokens), "calls": piece.total}
        seconds = time.perf_counter() - begun
        times = {"first": first, "seconds": seconds, "count": count, "rate": count / seconds}
        yield {"done": True, "fresh": fresh} | times


def fitting(predictor: Any) -> list[str]:
    """The drafters that a model can do with."""
    from t5x_lite import config

    found = []
    for name in DECODERS:
        try:
            predictor.drafters.of(config.Decode(decoder=name, width=WIDTH))
        except ValueError:
            continue
        found.append(name)
    return found


def programs(predictor: Any, asked: Question, text: str) -> tuple:
    """What decides which programs an answer to text runs."""
    from t5x_lite import decoding

    decode, read = asked.decode, len(predictor.read([text])[0])
    sizes = decoding.bucket(read), decoding.bucket(decode.length)
    return asked.model, decode.decoder, decode.temperature > 0, *sizes


def application(models: Models, host: str) -> Starlette:
    """The page, what it may ask, and who may ask it.

    A question is JSON from a page of this server itself: another site's page cannot send one, as
    browsers ask first for JSON, and a name that was made to lead here is not answered.
    """
    page, policy = page_of()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }

    async def shown(request: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    async def described(request: Request) -> Response:
        limits = {"letters": models.limits.letters, "tokens": models.limits.tokens}
        return JSONResponse({"models": models.described(), "limits": limits}, headers=headers)

    async def written(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":
            return refused("A question is JSON (Content-Type: application/json)", 415)
        try:
            body = await read(request, models.limits.bytes)
            asked = question(body, models.decoders, models.limits)
        except ValueError as error:
            return refused(str(error), 400)
        if models.asked > models.limits.waiting:
            return refused(f"Busy: {models.limits.waiting} texts are waiting already", 503)
        lines = in_turn(models, asked, request)
        # Begun here, so that whatever becomes of the response it is also ended.
        begun = await anext(lines, b"")
        return StreamingResponse(
            chained(begun, lines), media_type="application/x-ndjson", headers=headers
        )

    routes = [
        Route("/", shown),
        Route("/models", described),
        Route("/write", written, methods=["POST"]),
    ]
    allowed = ["localhost", "127.0.0.1", "[::1]"] if is_loopback(host) else ["*"]
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=allowed, www_redirect=False)
    return Starlette(routes=routes, middleware=[guard])


async def read(request: Request, most: int) -> bytes:
    """The body, given up as soon as it is too large.

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
        raise ValueError("The question did not arrive whole") from error
    return body


async def chained(begun: bytes, lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield begun
    async for line in lines:
        yield line


async def in_turn(models: Models, asked: Question, request: Request) -> AsyncIterator[bytes]:
    """The lines of an answer, as soon as those before it are through.

    Whoever goes away is noticed at the next line: nothing more is computed for them.
    """
    loop = asyncio.get_running_loop()
    models.asked += 1
    try:
        async with models.turn:
            if await request.is_disconnected():
                return
            pieces = models.answer(asked)
            while True:
                piece = await loop.run_in_executor(models.thread, following, pieces)
                if piece is None:
                    return
                yield json.dumps(piece).encode() + b"\n"
    finally:
        models.asked -= 1


def following(pieces: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """The next piece; an error of the model's is told as one, and ends the answer."""
    try:
        return next(pieces, None)
    except ValueError as error:
        return {"error": str(error)}


def refused(why: str, status: int) -> Response:
    return JSONResponse({"error": why}, status_code=status)


def page_of() -> tuple[str, str]:
    """The page, and the policy that lets it do nothing but what it is: its own script and style,
    named by their digests, and questions to its own server."""
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
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
