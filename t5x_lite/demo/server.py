# SPDX-License-Identifier: Apache-2.0
"""Server of the page: one thread that computes, one request at a time, with streamed answers."""

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from t5x_lite.demo.limits import WIDTH, Limits, Question, parse_question
from t5x_lite.serving.connections import HostGuard, StoppableServer
from t5x_lite.utils.paths import parse_path

# Most connections at a time; others get status 503.
CONNECTIONS = 64
# Seconds that running answers have to end after Ctrl-C.
LAST_SECONDS = 3
# Drafters without a number of layers or a file.
DRAFTERS = ("plain", "blockwise", "lookup", "recycling", "trigram", "jacobi", "lookahead")
# Forward passes between two pieces of an answer; the first token is sent at once.
EVERY = 2
# Most examples of a model, and most characters of one.
EXAMPLES, LONGEST_EXAMPLE = 4, 80
# Of models that are not a run with predictions: a question, a beginning, a task of T5's.
CHAT_EXAMPLES = "What is the capital of France?", "Name three colors."
BEGINNINGS = "The capital of France is", "def fibonacci(n):"
T5_TASKS = ("translate English to German: The house is wonderful.",)


class Models:
    """Sessions by name, and the single thread that computes (a mesh belongs to a thread).

    Attributes:
      limits: limits of requests.
      sessions: sessions by name.
      drafters: the allowed drafters by name of the session.
      examples: inputs to click by name of the session.
      programs: keys of the programs that are compiled.
      thread: the computing thread.
      turn: lock of the request in progress.
      pending: number of requests in progress or waiting.
      stopping: true once the server stops: every answer ends at its next piece.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.sessions: dict[str, Any] = {}
        self.drafters: dict[str, list[str]] = {}
        self.examples: dict[str, list[str]] = {}
        self.programs: set[tuple] = set()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.turn = asyncio.Lock()
        self.pending = 0
        self.stopping = False

    def stop(self) -> None:
        """Ends the answers in progress at their next piece, and those that wait."""
        self.stopping = True

    def is_busy(self) -> bool:
        """True while the computing thread does not take up work, within half a second."""
        try:
            self.thread.submit(int).result(timeout=0.5)
        except TimeoutError:
            return True
        return False

    def load(self, name: str, path: str) -> None:
        """Loads a checkpoint and decodes once, so that its programs are compiled.

        Raises:
          ValueError: it cannot be loaded, or lacks a decoder.
        """
        from t5x_lite import interactive

        self.add(name, lambda: interactive.load(path), parse_path(path))

    def attach(self, name: str, path: str) -> None:
        """Adds the first model with adapters, which share its weights.

        Args:
          name: its name on the page.
          path: a run with adapters, or a folder of peft.

        Raises:
          ValueError: the name is taken, or these are no adapters of the model.
        """
        if name in self.sessions:
            raise ValueError(f"--adapter {name}: a model on the page has this name already")
        base = next(iter(self.sessions.values()))
        self.add(name, lambda: base.with_adapters(path), parse_path(path))

    def add(self, name: str, make: Any, folder: Path | None = None) -> None:
        """Adds a session.

        Args:
          name: its name on the page.
          make: returns the session; runs in the computing thread.
          folder: where it was loaded from, whose predictions give examples.
        """

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
        self.examples[name] = predicted_inputs(folder) or general_examples(self.sessions[name])

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
                    "examples": self.examples[name],
                    "chats": session.template is not None,
                }
            )
        return descriptions

    def answer(self, question: Question) -> Iterator[dict[str, Any]]:
        """Yields the answer in pieces, and at the end its times; runs in the computing thread.

        Where programs have to be compiled first, a piece says so, and at the end "compiled" is the
        seconds that it took; other times do not include it.
        """
        from t5x_lite.analysis.drawing import token_labels
        from t5x_lite.evaluation import streaming

        session = self.sessions[question.model]
        predictor = session.predictor
        text = session.prompt(question.text) if question.chat else question.text
        program = program_key(predictor, question, text)
        compiled = None
        if program not in self.programs:
            yield {"compiling": True}
            compiled = self.compile(predictor, text, question)
            self.programs.add(program)
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
        yield {"done": True, "compiled": compiled} | times

    def compile(self, predictor: Any, text: str, question: Question) -> float:
        """Writes the first piece of an answer, which is dropped; returns the seconds.

        Args:
          predictor: the model.
          text: the input, with the chat template applied.
          question: the request.
        """
        from t5x_lite.evaluation import streaming

        began = time.perf_counter()
        next(streaming.stream_text(predictor, text, question.decode, EVERY))
        return time.perf_counter() - began


def predicted_inputs(folder: Path | None) -> list[str]:
    """Short inputs of the newest predictions of a run; none for other folders."""
    files = sorted(
        folder.glob("predictions/*.jsonl") if folder is not None else [],
        key=lambda path: path.stat().st_mtime,
    )
    inputs: list[str] = []
    for line in files[-1].read_text(encoding="utf-8").splitlines() if files else []:
        try:
            text = json.loads(line)["input"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(text, str) and 0 < len(text) <= LONGEST_EXAMPLE and text not in inputs:
            inputs.append(text)
        if len(inputs) == EXAMPLES:
            break
    return inputs


def general_examples(session: Any) -> list[str]:
    """Examples of a model of which only the kind is known."""
    if session.template is not None:
        return list(CHAT_EXAMPLES)
    return list(BEGINNINGS if session.predictor.cfg.encoder is None else T5_TASKS)


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
    rules = decode.drafter, decode.choices, decode.companion, decode.stop
    used = decode.temperature > 0, decode.min_p > 0, decode.repetition_penalty != 1
    return question.model, *rules, *used, *sizes


def application(models: Models, hosts: Collection[str], addresses: bool = False) -> Starlette:
    """The web application: the page, the list of models, and answers.

    A request is JSON, so that a page of another site cannot send one (browsers send a preflight
    request first), and requests with another Host are refused (DNS rebinding).

    Args:
      models: the models.
      hosts: names of this server.
      addresses: also answer requests that name an IP address.
    """
    page, headers = read_page()

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

    def refuse_host(host: str) -> Response:
        return refuse(f"Unknown host: start the page with --allow_host={host}", 400)

    guard = Middleware(HostGuard, names=hosts, addresses=addresses, refuse=refuse_host)
    return Starlette(routes=routes, middleware=[guard])


def page_server(app: Starlette, models: Models) -> StoppableServer:
    """The server of an application, which ends the running answers when it is stopped."""
    return StoppableServer(app, models.stop, CONNECTIONS, LAST_SECONDS)


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
                if models.stopping:
                    yield json.dumps({"error": "the server was stopped"}).encode() + b"\n"
                    return
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


def read_page() -> tuple[str, dict[str, str]]:
    """The page, and the headers of every answer.

    The Content-Security-Policy allows the page's script and style, by their digests, and requests
    to this server.
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
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
