# SPDX-License-Identifier: Apache-2.0
"""Predictions: texts that a model wrote, with what is known of their tokens."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from t5x_lite import config, decoding
from t5x_lite.decoding.adaptive.drafter import Adaptive
from t5x_lite.decoding.drafters.union import draft_sources
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.exit_status import naming_lack_of_memory
from t5x_lite.utils.not_none import not_none


class TokenScore(NamedTuple):
    """A token of a text with its probability under the model.

    Attributes:
      token: id.
      text: its text, alone.
      log_probability: in nats, without temperature and rules.
      top: the most probable tokens of its place, best first: id, text, log-probability.
      truncated: probability, at the temperature, that truncation kept from being drawn.
    """

    token: int
    text: str
    log_probability: float
    top: list[tuple[int, str, float]]
    truncated: float


class TargetScore(NamedTuple):
    """A target under the model, given its input.

    Attributes:
      log_probability: in nats.
      tokens: log-probability of each of its tokens.
      greedy: each of its tokens is the most probable one of its place.
    """

    log_probability: float
    tokens: list[float]
    greedy: bool


class Prediction(NamedTuple):
    """Texts that the model wrote for one input: beams best first, samples in the order drawn; with
    Decode.choose the chosen one first.

    Attributes:
      texts: the texts.
      scores: log_probabilities over the length penalty, which rank the texts.
      log_probabilities: in nats.
      tokens: ids of each text.
      calls: of the first text, the forward pass that wrote each token; empty after beam search.
      drafted_by: of the first text, the drafter that proposed each token ("model" if none); empty
        after beam search.
      details: the tokens of each text with their probabilities; empty without Decode.logprobs.
      utilities: by which Decode.choose ordered the texts; empty without it.
    """

    texts: list[str]
    scores: list[float]
    log_probabilities: list[float]
    tokens: list[list[int]]
    calls: list[int]
    drafted_by: list[str]
    details: list[list[TokenScore]] = []
    utilities: list[float] = []


def make_prediction(
    result: decoding.Result,
    row: int,
    names: tuple[str, ...],
    write_text: Callable[[list[int]], str],
    vocabulary: TextVocabulary,
) -> Prediction:
    """Prediction of one row of a result.

    Args:
      result: tokens of a batch.
      row: number of the row.
      names: the drafter that proposes each node of a block.
      write_text: returns the text of the row's new tokens.
      vocabulary: of the single tokens.
    """
    # Beams that found no text have a score of minus infinity.
    count = max(int(np.isfinite(result.scores[row]).sum()), 1)
    tokens = [
        ids[:length].tolist()
        for ids, length in zip(result.tokens[row, :count], result.lengths[row, :count], strict=True)
    ]
    details = []
    if result.details is not None:
        details = [
            describe_tokens(vocabulary, result, (row, text), ids) for text, ids in enumerate(tokens)
        ]
    first = slice(len(tokens[0]))
    steps, nodes = result.token_step, result.token_node
    return Prediction(
        texts=[*map(write_text, tokens)],
        scores=result.scores[row, :count].tolist(),
        log_probabilities=result.log_probability[row, :count].tolist(),
        tokens=tokens,
        calls=[] if steps is None else steps[row, 0, first].tolist(),
        drafted_by=[] if nodes is None else [names[node] for node in nodes[row, 0, first]],
        details=details,
    )


def describe_tokens(
    vocabulary: TextVocabulary,
    result: decoding.Result,
    place: tuple[int, int],
    ids: Sequence[int],
) -> list[TokenScore]:
    """Tokens of a text with their probabilities.

    Args:
      vocabulary: of the texts.
      result: tokens of a batch, with details.
      place: row and number of the text.
      ids: ids of the text.
    """
    details = jax.tree.map(lambda array: array[place].tolist(), not_none(result.details))
    text_of = functools.cache(lambda token: vocabulary.decode([token]))
    return [
        TokenScore(
            token=token,
            text=text_of(token),
            log_probability=details.log_probability[i],
            top=[
                (other, text_of(other), log_probability)
                for other, log_probability in zip(
                    details.top_tokens[i], details.top_log_probability[i], strict=True
                )
            ],
            truncated=details.truncated[i],
        )
        for i, token in enumerate(ids)
    ]


def drafter_names(drafting: decoding.Drafting) -> tuple[str, ...]:
    """Names of the drafters that propose each node of a block; "model" for the root."""
    drafter = drafting.drafter
    return draft_sources(drafter.drafter if isinstance(drafter, Adaptive) else drafter)


def naming_longest(
    lengths: Sequence[int], decode: config.Decode, rows: Sequence[int]
) -> contextlib.AbstractContextManager[None]:
    """Context in which a lack of memory is one sentence that names the longest input.

    Args:
      lengths: numbers of tokens of the inputs of a batch.
      decode: config of decoding.
      rows: numbers of these inputs, from 0: of the lines of a file.
    """
    most = max(lengths)
    number = rows[list(lengths).index(most)] + 1
    return naming_lack_of_memory(
        lambda reason: (
            f"Out of memory ({reason}) for {len(lengths)} inputs, the longest of which is number "
            f"{number:,}, of {most:,} tokens, and {decode.max_new_tokens:,} new ones: shorten or "
            "leave out this line, lower Decode.max_new_tokens, or decode fewer at once (batch_size)"
        )
    )
