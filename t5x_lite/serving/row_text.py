# SPDX-License-Identifier: Apache-2.0
"""Text of one completion: its request for the decoding loop, and its tokens so far."""

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config, decoding
from t5x_lite.decoding import pool
from t5x_lite.decoding.drafters import registry
from t5x_lite.decoding.request import bucket_length
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.evaluation.prediction import TokenScore
from t5x_lite.evaluation.steered_rows import SteeredRows
from t5x_lite.serving.completion import Completion, CompletionChunk, FinishReason
from t5x_lite.serving.limits import EngineLimits

# Fields of config.Decode that are arrays by row: requests that differ in them share a program.
BY_ROW = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "epsilon_cutoff", "eta_cutoff"),
    *("dynatemp_range", "dynatemp_exponent", "seed", "stop", "target_prefix"),
)
# Fields that are parameters of rows too, of rules that cost a pass over the vocabulary: requests
# that have the rule share a program, whatever the parameter.
RULES_BY_ROW = (
    *("typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    "min_new_tokens",
)
# Fields of config.Decode behind `pool.SELDOM`.
SELDOM = ("min_p", "epsilon_cutoff", "eta_cutoff", "dynatemp_range")
# Alternatives of a token are counted in steps of so many, so that few programs have them.
ALTERNATIVES = 5
LEAST_WIDTH, LEAST_BUCKET = 64, 8


class LaneKey(NamedTuple):
    """Settings of rows that share a pool.

    Attributes:
      decode: config whose fields by row have their defaults, but for the limit of its texts.
      inputs: width of the encoder's inputs; 0 without an encoder.
      prompts: width of the decoder's prompts.
      rules: those of RULES_BY_ROW that the rows have.
    """

    decode: config.Decode
    inputs: int
    prompts: int
    rules: tuple[str, ...]


# Fields of config.Decode that need several rows for one text, a table for each text, or another
# model beside it.
UNSERVED = ("beams", "n_best", "search", "choose", "companion", "span_of_input", "token_healing")
DEFAULTS = {field.name: field.default for field in dataclasses.fields(config.Decode)}


@functools.lru_cache(maxsize=256)
def shared_decode(decode: config.Decode, max_new_tokens: int, vocab: int) -> config.Decode:
    """Returns a config whose fields by row have their defaults.

    Args:
      decode: config of one request.
      max_new_tokens: that of all of them.
      vocab: size of the vocabulary, of which no token can have more alternatives.
    """
    logprobs = decode.logprobs
    if logprobs is not None:
        logprobs = min(-(-logprobs // ALTERNATIVES) * ALTERNATIVES, vocab)
    same = {name: DEFAULTS[name] for name in (*BY_ROW, *RULES_BY_ROW)}
    changes = same | {"max_new_tokens": max_new_tokens, "logprobs": logprobs}
    return dataclasses.replace(decode, **changes)


class RowText:
    """Text of one completion, from its request to its end.

    Attributes:
      completion: the completion.
      key: settings that its row shares with others.
      request: its row for the decoding loop, on the host.
      decode: config of decoding.
      tokens: new tokens so far.
      sent: text so far that is in a chunk.
      is_long: its prompt is read in chunks.
      kind: equal for texts that are read and written by the same programs.
      reading: its prompt is being read; its row writes nothing yet.
    """

    def __init__(
        self,
        completion: Completion,
        predictor: Predictor,
        ids: Sequence[int],
        limits: EngineLimits,
    ):
        """Prepares the row.

        Args:
          completion: the completion.
          predictor: the model that its request names.
          ids: ids of its input.
          limits: sizes of the engine.

        Raises:
          ValueError: a stop or a constraint cannot be followed.
        """
        self.completion, self.vocabulary = completion, predictor.targets
        vocabularies = predictor.inputs, predictor.targets
        self.steered = SteeredRows(predictor.cfg, vocabularies, [ids], completion.request.decode)
        self.decode = self.steered.decode
        self.request = self.steered.request([0], 1)._replace(stop=None)
        self.stops = self.steered.tables["stop"]
        self.stop_state = 0 if self.stops is None else int(self.stops.start)
        self.tokens: list[int] = []
        self.scores: list[TokenScore] = []
        self.sent, self.unsent = "", 0
        self.reading = False
        completion.usage.prompt_tokens = len(ids)
        cfg, decode = predictor.cfg, self.decode
        in_chunks = cfg.encoder is None and not cfg.prefix_lm
        self.is_long = in_chunks and len(self.prompt_ids()) > limits.prefill_tokens
        most = bucket_length(limits.max_inputs + cfg.add_bos)
        inputs, prompts = self.widths()
        length = width_class(decode.max_new_tokens, limits.max_new_tokens)
        self.key = LaneKey(
            decode=shared_decode(decode, length, cfg.vocab),
            inputs=width_class(inputs, most) if cfg.encoder is not None else 0,
            prompts=1 if cfg.encoder is not None and prompts == 1 else width_class(prompts, most),
            rules=tuple(name for name in RULES_BY_ROW if getattr(decode, name) != DEFAULTS[name]),
        )
        # Of a prompt that is read in chunks, the number of chunks up to a power of two.
        width = (prompts - 1) // limits.prefill_tokens
        self.kind: Hashable = (
            self.key,
            self.choice,
            width.bit_length() if self.is_long else (inputs, prompts),
        )

    @property
    def choice(self) -> pool.ChoiceLevel:
        """Work that choosing its tokens takes."""
        if any(getattr(self.decode, name) for name in SELDOM):
            return pool.ChoiceLevel.FILTERED
        sampled = self.decode.temperature > 0
        return pool.ChoiceLevel.SAMPLED if sampled else pool.ChoiceLevel.GREEDY

    def prompt_ids(self) -> np.ndarray:
        """Ids of the decoder's prompt."""
        return self.request.prompts[0, : self.request.prompts_length[0]]

    def is_read_with(self, other: "RowText") -> bool:
        """True if one program reads this text and another one into the same pool."""
        same = all(
            getattr(self.decode, name) == getattr(other.decode, name) for name in RULES_BY_ROW
        )
        key, widths = (self.key, self.is_long), self.widths()
        return same and key == (other.key, other.is_long) and widths == other.widths()

    def widths(self) -> tuple[int, int]:
        """Widths of its input and prompt, each a bucket; the first is 0 without an encoder.

        Finer than those of a whole batch: of a word in 16 ids, half the encoder's work is padding.
        """
        request = self.request
        prompts = int(request.prompts_length[0])
        prompts = 1 if prompts == 1 else bucket_length(prompts, LEAST_BUCKET)
        if request.inputs is None:
            return 0, prompts
        return bucket_length(int(request.inputs_length[0]), LEAST_BUCKET), prompts

    def add(
        self, tokens: list[int], scores: list[TokenScore], accepted: Sequence[bool], done: bool
    ) -> FinishReason | None:
        """Adds new tokens, up to the one that completes a stop string.

        Args:
          tokens: the tokens.
          scores: of them; empty without Decode.logprobs.
          accepted: of them, whether a drafter had proposed it.
          done: the row has ended.

        Returns:
          Why the text has ended; None if it goes on.
        """
        count, stopped = self.find_stop(tokens)
        self.tokens += tokens[:count]
        self.scores += scores[:count]
        usage = self.completion.usage
        usage.tokens, usage.accepted = len(self.tokens), usage.accepted + sum(accepted[:count])
        if stopped:
            return "stop"
        if not done:
            return None
        return "stop" if self.tokens and self.tokens[-1] in self.vocabulary.stops else "length"

    def find_stop(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """Returns how many tokens belong to the text, and whether they complete a stop string."""
        if self.stops is None:
            return len(tokens), False
        for count, token in enumerate(tokens, 1):
            self.stop_state = int(self.stops.following[self.stop_state, self.stops.classes[token]])
            if self.stop_state == self.stops.last:
                return count, True
        return len(tokens), False

    def chunk(self, reason: FinishReason | None) -> CompletionChunk:
        """Returns what is new since the last chunk.

        Args:
          reason: why the text has ended; None if it goes on.
        """
        text = self.steered.write_text(0, self.tokens, growing=reason is None)
        if reason is None:
            # What a tokenizer may still drop or complete waits for the next chunk.
            text = text.rstrip("\ufffd").rstrip()
            text = text if text.startswith(self.sent) else self.sent
        new, self.sent = text[len(self.sent) :], text
        first, self.unsent = self.unsent, len(self.tokens)
        return CompletionChunk(new, self.tokens[first:], self.scores[first:], reason)


def make_text(
    completion: Completion, predictors: Mapping[str, Predictor], limits: EngineLimits
) -> RowText:
    """Returns the text of a completion.

    Args:
      completion: the completion, whose request may be any.
      predictors: the model by name of each of its adapters; "" for none.
      limits: sizes of the engine.

    Raises:
      ValueError: the engine cannot serve the request.
    """
    request, decode = completion.request, completion.request.decode
    if request.adapter not in predictors:
        names = ", ".join(filter(None, predictors)) or "none"
        raise ValueError(f"There is no adapter {request.adapter!r}; there are: {names}")
    predictor = predictors[request.adapter]
    for name in UNSERVED:
        if getattr(decode, name) != DEFAULTS[name]:
            raise ValueError(f"Decode.{name} is not served in shared rows: leave it out")
    if decode.max_new_tokens > limits.max_new_tokens:
        raise ValueError(
            f"Decode.max_new_tokens {decode.max_new_tokens} is above the engine's limit, "
            f"{limits.max_new_tokens}"
        )
    registry.check_names(predictor.cfg, decode)
    ids = request.prompt
    ids = predictor.encode_inputs([ids])[0] if isinstance(ids, str) else [*ids]
    if len(ids) > limits.max_inputs:
        raise ValueError(
            f"The input has {len(ids)} tokens, and the engine's limit is {limits.max_inputs}: "
            "shorten it"
        )
    predictor.check_inputs([ids], decode)
    return RowText(completion, predictor, ids, limits)


def join_requests(
    texts: Sequence[RowText], rows: int, inputs: int, prompts: int
) -> decoding.Request:
    """Returns the rows of several texts, filled up with the first one.

    Args:
      texts: the texts.
      rows: number of rows.
      inputs: width of the inputs.
      prompts: width of the prompts.
    """
    filled = [*texts, *[texts[0]] * (rows - len(texts))]
    requests = [text.request.drop_shared() for text in filled]

    def join(name: str, width: int | None = None) -> np.ndarray | None:
        arrays = [getattr(request, name) for request in requests]
        if arrays[0] is None:
            return None
        if width is not None:
            arrays = [np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in arrays]
        return np.concatenate(arrays)

    names = ("inputs_length", "prompts_length", "limit", "seed", "row")
    joined: dict[str, Any] = {name: join(name) for name in names}
    joined |= {"inputs": join("inputs", inputs), "prompts": join("prompts", prompts)}
    return decoding.Request(**joined)


def width_class(size: int, most: int) -> int:
    """Width of the pools of rows that need so much: few, as rows of one width share a pool.

    Every step reads the keys of the whole width, so that short texts have pools of their own.

    Args:
      size: ids of the row.
      most: ids of the longest row.
    """
    width = LEAST_WIDTH
    while width < size:
        width *= 4
    return max(min(width, most), size)
