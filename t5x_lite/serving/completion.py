# SPDX-License-Identifier: Apache-2.0
"""Requests to an engine, and the completions that it writes for them, chunk by chunk."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from t5x_lite import config
from t5x_lite.evaluation.prediction import TokenScore

# stop: EOS or a stop string; length: Decode.max_new_tokens; expired: the deadline has passed.
FinishReason = Literal["stop", "length", "cancelled", "expired", "error"]


class QueueFullError(RuntimeError):
    """The queue of an engine has no place for another request; one is free after a while."""


class EngineClosedError(RuntimeError):
    """An engine that is closing takes no more requests."""


class TextRequest(NamedTuple):
    """Request for one text.

    Attributes:
      prompt: input of the model as text, or its ids with their end, as `Predictor.encode_inputs`
        returns them.
      decode: config of decoding, complete: limit, sampling, stops, constraint, log-probabilities.
      adapter: name of the adapter of the engine; "" for the model without one.
      deadline: `time.monotonic()` after which the text is no longer wanted; None for never.
      streamed: sends a chunk after every block; if False, one with the whole text at the end.
      client: requests of one client share the prefix cache; those of another cannot tell what is in
        it.
    """

    prompt: str | Sequence[int]
    decode: config.Decode
    adapter: str = ""
    deadline: float | None = None
    streamed: bool = True
    client: str = ""


class CompletionChunk(NamedTuple):
    """Part of a completion: the tokens since the last one, and their text.

    Joined, the texts are what `Predictor.predict` returns. An incomplete character, and what may
    become a stop string, wait for the next chunk, so that a chunk may have tokens and no text.

    Attributes:
      text: text since the last chunk.
      tokens: ids since the last chunk.
      scores: of these tokens, with Decode.logprobs; else empty.
      finish_reason: why the text has ended, in the last chunk; else None.
    """

    text: str
    tokens: list[int]
    scores: list[TokenScore]
    finish_reason: FinishReason | None = None


@dataclasses.dataclass
class Usage:
    """Counts of one completion.

    Attributes:
      prompt_tokens: ids of the input.
      tokens: new tokens so far.
      accepted: those among them that a drafter had proposed.
      cached_tokens: ids of the input whose keys and values were in the prefix cache.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    accepted: int = 0
    cached_tokens: int = 0


class Completion:
    """Text that an engine writes for a request; any thread may read or cancel it.

    Iterating yields the chunks, once, up to the one with the finish reason.

    Attributes:
      request: the request.
      usage: counts so far.
      error: the exception behind the finish reason "error"; else None.
    """

    def __init__(
        self, request: TextRequest, on_chunk: Callable[[CompletionChunk], None] | None = None
    ):
        """Begins without a chunk.

        Args:
          request: the request.
          on_chunk: called with every chunk in the engine's thread, in place of iteration; it must
            not block.
        """
        self.request, self.usage = request, Usage()
        self.error: BaseException | None = None
        self.cancelled = threading.Event()
        self.chunks: queue.SimpleQueue[CompletionChunk] = queue.SimpleQueue()
        self.on_chunk = on_chunk or self.chunks.put

    def __iter__(self) -> Iterator[CompletionChunk]:
        """Yields the chunks, waiting for each."""
        while True:
            chunk = self.chunks.get()
            yield chunk
            if chunk.finish_reason is not None:
                return

    def cancel(self) -> None:
        """Ends the text at the next block, with finish reason "cancelled"; no-op after the end."""
        self.cancelled.set()

    def result(self) -> CompletionChunk:
        """Waits for the end, and returns the whole text as one chunk.

        Raises:
          Exception: the error of a completion that failed.
        """
        chunks = list(self)
        if self.error is not None:
            raise self.error
        return CompletionChunk(
            "".join(chunk.text for chunk in chunks),
            [token for chunk in chunks for token in chunk.tokens],
            [score for chunk in chunks for score in chunk.scores],
            chunks[-1].finish_reason,
        )
