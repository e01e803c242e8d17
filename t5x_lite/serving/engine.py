# SPDX-License-Identifier: Apache-2.0
"""Engine that writes the texts of many requests: a queue, and one thread that computes."""

import contextlib
import dataclasses
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax

from t5x_lite import config
from t5x_lite.evaluation import streaming
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.serving.completion import (
    Completion,
    CompletionChunk,
    EngineClosedError,
    FinishReason,
    QueueFullError,
    TextRequest,
)

# Fields of config.Decode that need several rows for one text, or another model beside it.
UNSERVED = {"beams": 1, "n_best": 1, "search": "", "choose": "", "companion": ""}


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """Sizes of an engine: they decide its memory, and the shapes of its few programs.

    Attributes:
      rows: texts that are written at the same time.
      max_inputs: most ids of an input.
      max_new_tokens: most new tokens of a text.
      block: forward passes between two looks at the queue.
      prefill_tokens: ids of inputs that are read between two blocks, about.
      queue: requests that may wait.
    """

    rows: int = 16
    max_inputs: int = 512
    max_new_tokens: int = 256
    block: int = 4
    prefill_tokens: int = 512
    queue: int = 256

    def __post_init__(self):
        for field in dataclasses.fields(self):
            config.require(
                getattr(self, field.name) >= 1,
                f"EngineLimits.{field.name} must be 1 or more; got {getattr(self, field.name)}",
            )


class EngineGauges(NamedTuple):
    """Numbers of an engine, for metrics.

    Attributes:
      rows: texts that can be written at the same time.
      rows_used: texts that are being written.
      queued: requests that wait.
      finished: completions by finish reason.
      prompt_tokens: ids of inputs that were read.
      tokens: new tokens.
      accepted: those among them that a drafter had proposed.
      passes: forward passes.
    """

    rows: int
    rows_used: int
    queued: int
    finished: dict[str, int]
    prompt_tokens: int
    tokens: int
    accepted: int
    passes: int


class Engine:
    """Writes completions; one thread computes, any thread may submit.

    The text of a request is that of `Predictor.predict` for it alone.

    Attributes:
      limits: sizes.
      predictors: the model by name of the adapter; "" without one.
    """

    def __init__(
        self,
        predictor: Predictor,
        limits: EngineLimits = EngineLimits(),
        adapters: Mapping[str, Predictor] | None = None,
    ):
        """Starts the thread, which computes on the mesh in force.

        Args:
          predictor: the model.
          limits: sizes.
          adapters: predictors of `with_adapters`, which share the model's weights, by name.
        """
        self.limits, self.predictors = limits, {"": predictor, **(adapters or {})}
        self.waiting: deque[Completion] = deque()
        self.calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.rows_used, self.passes, self.finished = 0, 0, Counter[str]()
        self.prompt_tokens, self.tokens, self.accepted = 0, 0, 0
        self.mesh = jax.sharding.get_mesh()
        self.thread = threading.Thread(target=self.run_loop, name="engine", daemon=True)
        self.thread.start()

    def submit(
        self, request: TextRequest, on_chunk: Callable[[CompletionChunk], None] | None = None
    ) -> Completion:
        """Puts a request into the queue.

        Args:
          request: the request.
          on_chunk: called with every chunk in the engine's thread, in place of iteration; it must
            not block.

        Returns:
          The completion, which begins at once or when a row is free.

        Raises:
          ValueError: the model cannot read the prompt, or the engine does not serve the settings.
          QueueFullError: `limits.queue` requests wait already.
          EngineClosedError: the engine is closing.
        """
        self.check_request(request)
        completion = Completion(request, on_chunk)
        with self.changed:
            if self.closing:
                raise EngineClosedError("The engine is closing and takes no more requests")
            if len(self.waiting) >= self.limits.queue:
                raise QueueFullError(f"{self.limits.queue} requests wait already: try again later")
            self.waiting.append(completion)
            self.changed.notify()
        return completion

    def check_request(self, request: TextRequest) -> None:
        """Raises ValueError for a request that the engine cannot serve."""
        decode = request.decode
        if request.adapter not in self.predictors:
            names = ", ".join(filter(None, self.predictors)) or "none"
            raise ValueError(f"There is no adapter {request.adapter!r}; there are: {names}")
        for name, value in UNSERVED.items():
            if getattr(decode, name) != value:
                raise ValueError(f"Decode.{name} is not served in shared rows: leave it out")
        if decode.max_new_tokens > self.limits.max_new_tokens:
            raise ValueError(
                f"Decode.max_new_tokens {decode.max_new_tokens} is above the engine's limit, "
                f"{self.limits.max_new_tokens}"
            )
        ids = self.encode_prompt(request)
        if len(ids) > self.limits.max_inputs:
            raise ValueError(
                f"The input has {len(ids)} tokens, and the engine's limit is "
                f"{self.limits.max_inputs}: shorten it"
            )
        self.predictors[request.adapter].check_inputs([ids], decode)

    def encode_prompt(self, request: TextRequest) -> list[int]:
        """Returns the ids of a prompt."""
        if isinstance(request.prompt, str):
            return self.predictors[request.adapter].encode_inputs([request.prompt])[0]
        return [*request.prompt]

    def call(self, function: Callable[[], Any]) -> Future:
        """Runs a function in the engine's thread between two blocks: embeddings, scores, beams.

        Returns:
          The future of what it returns.

        Raises:
          EngineClosedError: the engine is closing.
        """
        future: Future = Future()
        with self.changed:
            if self.closing:
                raise EngineClosedError("The engine is closing and takes no more requests")
            self.calls.append((function, future))
            self.changed.notify()
        return future

    def gauges(self) -> EngineGauges:
        """Returns the numbers of the engine now."""
        return EngineGauges(
            rows=self.limits.rows,
            rows_used=self.rows_used,
            queued=len(self.waiting),
            finished=dict(self.finished),
            prompt_tokens=self.prompt_tokens,
            tokens=self.tokens,
            accepted=self.accepted,
            passes=self.passes,
        )

    def close(self, drain: bool = True) -> None:
        """Takes no more requests, ends those that it has, and waits for the thread's end.

        Args:
          drain: finishes texts and queue; False cancels them.
        """
        with self.changed:
            self.closing = True
            if not drain:
                for completion in self.waiting:
                    completion.cancel()
            self.changed.notify()
        self.thread.join()

    def run_loop(self) -> None:
        """Computes until the engine is closed and its queue is empty."""
        with contextlib.nullcontext() if self.mesh.empty else jax.set_mesh(self.mesh):
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.waiting or self.calls or self.closing)
                    calls, self.calls = self.calls, deque()
                    completion = self.waiting.popleft() if self.waiting else None
                for function, future in calls:
                    run_call(function, future)
                if completion is not None:
                    self.write_text(completion)
                elif self.closing and not self.calls:
                    return

    def write_text(self, completion: Completion) -> None:
        """Writes one completion from its first chunk to its last."""
        self.rows_used = 1
        try:
            reason = self.stop_reason(completion) or self.write_pieces(completion)
        except Exception as error:  # the client is told, and the next text begins
            completion.error, reason = error, "error"
        self.rows_used = 0
        self.finished[reason] += 1
        completion.on_chunk(CompletionChunk("", [], [], reason))

    def write_pieces(self, completion: Completion) -> FinishReason:
        """Sends the chunks of a text, and returns why it has ended."""
        request = completion.request
        predictor, last = self.predictors[request.adapter], -1
        text = predictor.inputs.decode(self.encode_prompt(request))
        pieces = streaming.stream_text(predictor, text, request.decode, self.limits.block)
        for piece in pieces:
            completion.usage.tokens += len(piece.tokens)
            self.tokens += len(piece.tokens)
            last = piece.tokens[-1] if piece.tokens else last
            completion.on_chunk(CompletionChunk(piece.text, piece.tokens, []))
            if reason := self.stop_reason(completion):
                return reason
        whole = completion.usage.tokens >= request.decode.max_new_tokens
        return "length" if whole and last not in predictor.targets.stops else "stop"

    def stop_reason(self, completion: Completion) -> FinishReason | None:
        """Returns why a text is to end now; None if it goes on."""
        if completion.cancelled.is_set():
            return "cancelled"
        deadline = completion.request.deadline
        return "expired" if deadline is not None and time.monotonic() > deadline else None


def run_call(function: Callable[[], Any], future: Future) -> None:
    """Runs a function, and gives its future the outcome."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
