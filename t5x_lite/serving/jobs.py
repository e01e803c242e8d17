# SPDX-License-Identifier: Apache-2.0
"""Requests that write texts, read by the rules of their routes: what an engine has to write."""

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

from t5x_lite import config
from t5x_lite.config.checked import Range
from t5x_lite.serving.answers import Answer, ChatAnswer, Summary, Translation
from t5x_lite.serving.completion import TextRequest
from t5x_lite.serving.errors import ApiError, InvalidField
from t5x_lite.serving.fields import (
    Wanted,
    check_text,
    list_decodes,
    list_prompts,
    make_decode,
    parse_json,
    read_request,
)
from t5x_lite.serving.models import ServedModel, ServedModels

Alternatives = Annotated[int, Range(0, 20)]
LANGUAGES = {"source_language": (str,), "target_language": (str,)}


class Job(NamedTuple):
    """Texts to write for a request.

    Attributes:
      served: the model.
      requests: a request for each text: n for each input.
      answer: shape of the answer.
      prompts: number of tokens of each input.
      wanted: fields of the request.
    """

    served: ServedModel
    requests: list[TextRequest]
    answer: Answer
    prompts: list[int]
    wanted: Wanted


class Reader(NamedTuple):
    """Rules of a route: what its requests have besides the common fields, and how it is read.

    Attributes:
      hints: annotation and default of each field.
      read: reads the request of a model: the ids of its inputs, and defaults of decoding.
      answer: shape of its answers.
    """

    hints: dict[str, tuple]
    read: Callable[[ServedModel, Wanted], tuple[list[list[int]], config.Decode]]
    answer: type[Answer]


def read_prompts(served: ServedModel, wanted: Wanted) -> tuple[list[list[int]], config.Decode]:
    """Reads the inputs of /v1/completions."""
    prompts = list_prompts(wanted.others["prompt"], "prompt")
    return encode_prompts(served.session.predictor, prompts, "prompt"), served.decode


def read_messages(served: ServedModel, wanted: Wanted) -> tuple[list[list[int]], config.Decode]:
    """Reads the conversation of /v1/chat/completions with the model's template.

    Raises:
      InvalidField: the model has no template, or it does not take the messages.
    """
    if served.session.template is None:
        raise InvalidField(
            "model", f"{served.name} has no chat template: /v1/completions continues a text"
        )
    messages = [join_parts(each) for each in wanted.others["messages"]]
    try:
        prompt = served.session.prompt(messages)
    except ValueError as error:
        raise InvalidField("messages", str(error)) from None
    return encode_prompts(served.session.predictor, [prompt], "messages"), served.decode


def join_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one text, which clients may also send in parts.

    Raises:
      InvalidField: it has no role, or content other than text.
    """
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [
        each["text"]
        for each in (parts if isinstance(parts, list) else [])
        if isinstance(each, dict) and each.get("type") == "text" and isinstance(each["text"], str)
    ]
    if not isinstance(message.get("role"), str) or not texts or len(texts) != len(parts or ()):
        raise InvalidField("messages", "A message has a role and a content, which is text")
    return message | {"content": check_text("".join(texts), "messages")}


def task_reader(kind: str) -> Callable[..., tuple[list[list[int]], config.Decode]]:
    """Returns what reads the inputs of a task: "translation" or "summarization"."""

    def read(served: ServedModel, wanted: Wanted) -> tuple[list[list[int]], config.Decode]:
        if wanted.stream:
            raise InvalidField("stream", "Texts of tasks are not streamed: leave out stream")
        source, target = (wanted.others.get(name) for name in LANGUAGES)
        task = served.find_task(kind, source, target)
        predictor = copy.copy(served.session.predictor)
        predictor.inputs, changes = task.inputs, {}
        if task.first is not None:
            changes["forced_bos_token_id"] = task.first
        if task.max_new_tokens is not None:
            most = served.engine.limits.max_new_tokens
            changes["max_new_tokens"] = min(task.max_new_tokens, most)
        prompts = list_prompts(wanted.others["input"], "input")
        texts = [task.prefix + each if isinstance(each, str) else each for each in prompts]
        ids = encode_prompts(predictor, texts, "input")
        return ids, dataclasses.replace(served.decode, **changes)

    return read


def encode_prompts(predictor: Any, prompts: Sequence[Any], name: str) -> list[list[int]]:
    """The ids of inputs.

    Args:
      predictor: the model.
      prompts: texts, or ids.
      name: field that they are in, for messages.

    Raises:
      InvalidField: the vocabulary lacks something in a text.
    """
    try:
        return [
            predictor.encode_inputs([each])[0] if isinstance(each, str) else each
            for each in prompts
        ]
    except ValueError as error:
        raise InvalidField(name, str(error)) from None


READERS = {
    "/v1/completions": Reader(
        {"prompt": (object, ...), "logprobs": (Alternatives,)}, read_prompts, Answer
    ),
    "/v1/chat/completions": Reader(
        {
            "messages": (tuple[dict[str, object], ...], ...),
            "logprobs": (bool, False),
            "top_logprobs": (Alternatives, 0),
        },
        read_messages,
        ChatAnswer,
    ),
    "/v1/translations": Reader(
        {"input": (object, ...), **LANGUAGES}, task_reader("translation"), Translation
    ),
    "/v1/summaries": Reader({"input": (object, ...)}, task_reader("summarization"), Summary),
}


def count_alternatives(others: dict[str, Any]) -> int | None:
    """Number of alternatives of each token; None for no log-probabilities.

    Raises:
      InvalidField: alternatives without log-probabilities.
    """
    logprobs, top = others.get("logprobs"), others.get("top_logprobs", 0)
    if top and not logprobs:
        raise InvalidField("top_logprobs", "top_logprobs needs logprobs: true")
    return (top if logprobs else None) if isinstance(logprobs, bool) else logprobs


def read_job(models: ServedModels, route: str, body: bytes, client: str) -> Job:
    """Reads the request of a route.

    Args:
      models: the models.
      route: path of the route.
      body: the request.
      client: `TextRequest.client`.

    Raises:
      ApiError: a field is wrong, the model is unknown, or there are too many texts.
    """
    reader, limits = READERS[route], models.limits
    wanted = read_request(parse_json(body), reader.hints)
    served = models.get(wanted.model)
    prompts, defaults = reader.read(served, wanted)
    check_sizes(served, prompts, wanted, limits.texts)
    alternatives = count_alternatives(wanted.others)
    decodes = list_decodes(make_decode(defaults, wanted, alternatives), wanted.n)
    deadline = time.monotonic() + limits.timeout
    requests = [
        TextRequest(prompt, decode, served.adapter, deadline, wanted.stream, client)
        for prompt in prompts
        for decode in decodes
    ]
    decode_text = served.session.predictor.targets.decode
    answer = reader.answer(served.name, alternatives is not None, decode_text)
    return Job(served, requests, answer, [len(each) for each in prompts], wanted)


def check_sizes(
    served: ServedModel, prompts: Sequence[Sequence[int]], wanted: Wanted, most_texts: int
) -> None:
    """Raises ApiError for a request beyond the limits.

    Args:
      served: the model.
      prompts: ids of the inputs.
      wanted: fields of the request.
      most_texts: most texts of a request.
    """
    count, limits = len(prompts) * wanted.n, served.engine.limits
    if count > most_texts:
        raise InvalidField("n", f"The request wants {count} texts, more than {most_texts}")
    longest = max(map(len, prompts))
    if longest > limits.max_inputs:
        raise ApiError(
            400,
            f"The input has {longest} tokens, more than {limits.max_inputs}: shorten it",
            code="context_length_exceeded",
        )
    most = wanted.decode.get("max_new_tokens", 1)
    if most > limits.max_new_tokens:
        raise InvalidField("max_tokens", f"max_tokens is at most {limits.max_new_tokens}")
