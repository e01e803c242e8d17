# SPDX-License-Identifier: Apache-2.0
"""Answers in the shapes of OpenAI's API."""

import base64
import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from t5x_lite.evaluation.prediction import TokenScore
from t5x_lite.serving.completion import CompletionChunk


@dataclasses.dataclass
class Choice:
    """One text of an answer so far.

    Attributes:
      text: its text.
      tokens: its ids.
      scores: its tokens with their probabilities, where they are wanted.
      finish_reason: "stop" or "length" once it has ended.
    """

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    scores: list[TokenScore] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def add(self, chunk: CompletionChunk) -> None:
        """Adds a part of the text."""
        self.text += chunk.text
        self.tokens += chunk.tokens
        self.scores += chunk.scores
        self.finish_reason = chunk.finish_reason


class Answer:
    """Shape of the answers of a route: completions; subclasses are those of others.

    Attributes:
      model: name of the model.
      logprobs: log-probabilities are wanted.
      decode_text: returns the text of ids.
      head: what all parts of the answer begin with.
    """

    prefix, kind, part_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, logprobs: bool, decode_text: Callable[[Sequence[int]], str]):
        self.model, self.logprobs, self.decode_text = model, logprobs, decode_text
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """The answer when all texts have ended."""
        shown = [self.show_choice(number, each) for number, each in enumerate(choices)]
        return self.head | {"choices": shown, "usage": usage}

    def part(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A part of a streamed answer."""
        return self.head | {"object": self.part_kind, "choices": choices} | more

    def first_parts(self, count: int) -> list[dict[str, Any]]:
        """Parts that a stream of `count` texts begins with."""
        return []

    def show_choice(self, number: int, choice: Choice) -> dict[str, Any]:
        """A text that has ended."""
        return self.describe(number, choice.finish_reason, choice, 0) | {"text": choice.text}

    def show_chunk(self, number: int, chunk: CompletionChunk, choice: Choice) -> dict[str, Any]:
        """A part of a text.

        Args:
          number: number of the text.
          chunk: its part.
          choice: the text so far, with this part.
        """
        before = len(choice.scores) - len(chunk.scores)
        return self.describe(number, chunk.finish_reason, choice, before) | {"text": chunk.text}

    def describe(
        self, number: int, reason: str | None, choice: Choice, before: int
    ) -> dict[str, Any]:
        """Number, end and log-probabilities of a text or its part.

        Args:
          number: number of the text.
          reason: why it has ended; None where it goes on.
          choice: the text so far.
          before: number of tokens that were sent before.
        """
        logprobs = self.show_scores(choice, before) if self.logprobs else None
        return {"index": number, "finish_reason": reason, "logprobs": logprobs}

    def show_scores(self, choice: Choice, before: int) -> dict[str, Any]:
        """Tokens with their log-probabilities, from a number on."""
        scores, tokens = choice.scores[before:], choice.tokens
        offsets = [
            len(self.decode_text(tokens[:place])) for place in range(before, len(choice.scores))
        ]
        return {
            "tokens": [each.text for each in scores],
            "token_logprobs": [each.log_probability for each in scores],
            "top_logprobs": [{text: value for _, text, value in each.top} for each in scores],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """Answers of /v1/chat/completions."""

    prefix, kind, part_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first_parts(self, count: int) -> list[dict[str, Any]]:
        """The role of each text."""
        delta = {"role": "assistant", "content": ""}
        return [
            self.part([{"index": number, "delta": delta, "finish_reason": None, "logprobs": None}])
            for number in range(count)
        ]

    def show_choice(self, number: int, choice: Choice) -> dict[str, Any]:
        """A text that has ended."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return self.describe(number, choice.finish_reason, choice, 0) | {"message": message}

    def show_chunk(self, number: int, chunk: CompletionChunk, choice: Choice) -> dict[str, Any]:
        """A part of a text.

        Args:
          number: number of the text.
          chunk: its part.
          choice: the text so far, with this part.
        """
        delta = {"content": chunk.text} if chunk.text else {}
        before = len(choice.scores) - len(chunk.scores)
        return self.describe(number, chunk.finish_reason, choice, before) | {"delta": delta}

    def show_scores(self, choice: Choice, before: int) -> dict[str, Any]:
        """Tokens with their log-probabilities, from a number on."""
        content = [
            show_token(each.text, each.log_probability)
            | {"top_logprobs": [show_token(text, value) for _, text, value in each.top]}
            for each in choice.scores[before:]
        ]
        return {"content": content, "refusal": None}


class TaskAnswer(Answer):
    """Answers of the routes of tasks: texts under "data", in the order of the inputs."""

    kind, task = "list", "text"

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """The answer when all texts have ended."""
        data = [
            {"object": self.task, "index": number, "text": each.text}
            | {"finish_reason": each.finish_reason}
            for number, each in enumerate(choices)
        ]
        return self.head | {"data": data, "usage": usage}


class Translation(TaskAnswer):
    """Answers of /v1/translations."""

    prefix, task = "translation", "translation"


class Summary(TaskAnswer):
    """Answers of /v1/summaries."""

    prefix, task = "summary", "summary"


def show_token(text: str, log_probability: float) -> dict[str, Any]:
    """A token with its log-probability."""
    return {"token": text, "logprob": log_probability, "bytes": list(text.encode())}


def count_usage(prompts: Sequence[int], choices: Sequence[Choice]) -> dict[str, int]:
    """Counts of tokens: those of each input once, and those of all texts."""
    read, written = sum(prompts), sum(len(each.tokens) for each in choices)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }


def show_vectors(vectors: np.ndarray, encoding: str, model: str, tokens: int) -> dict[str, Any]:
    """The answer of /v1/embeddings.

    Args:
      vectors: float32 [n d].
      encoding: "float", or "base64" for the bytes of little-endian floats.
      model: name of the model.
      tokens: number of tokens that were read.
    """

    def show(vector: np.ndarray) -> Any:
        if encoding == "float":
            return vector.tolist()
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()

    data = [
        {"object": "embedding", "index": number, "embedding": show(vector)}
        for number, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
