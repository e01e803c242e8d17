# SPDX-License-Identifier: Apache-2.0
"""Logits processors of a config."""

from collections.abc import Sequence

import numpy as np

from t5x_lite import config
from t5x_lite.decoding.steering.penalties import FrequencyPenalty, RepetitionPenalty
from t5x_lite.decoding.steering.processor import LogitsProcessor, Processors
from t5x_lite.decoding.steering.sequences import (
    ForcedBeginning,
    MinNewTokens,
    NoRepeatNgram,
    SequenceBias,
)


def make_processors(
    decode: config.Decode, rows: int, eos: int | Sequence[int] | np.ndarray
) -> Processors:
    """Returns the processors that a config asks for, in the order of transformers.

    Args:
      decode: the config, its words as ids.
      rows: number of rows of the request.
      eos: ids that end a text.
    """

    def each(value: float, dtype: type = np.float32) -> np.ndarray:
        return np.full(rows, value, dtype)

    rules: list[LogitsProcessor] = []
    biases = sequence_biases(decode)
    if biases:
        rules.append(make_sequence_bias(biases))
    if decode.repetition_penalty != 1:
        rules.append(RepetitionPenalty(each(decode.repetition_penalty)))
    if decode.presence_penalty or decode.frequency_penalty:
        rules.append(
            FrequencyPenalty(each(decode.presence_penalty), each(decode.frequency_penalty))
        )
    if decode.no_repeat_ngram_size:
        rules.append(NoRepeatNgram(decode.no_repeat_ngram_size))
    if decode.min_new_tokens:
        stops = np.atleast_1d(np.asarray(eos, np.int32))
        rules.append(MinNewTokens(each(decode.min_new_tokens, np.int32), stops))
    if decode.forced_bos_token_id is not None:
        tokens = np.full((rows, 1), decode.forced_bos_token_id, np.int32)
        rules.append(ForcedBeginning(tokens, each(1, np.int32)))
    return Processors(tuple(rules))


def sequence_biases(decode: config.Decode) -> list[tuple[tuple[int, ...], float]]:
    """Returns (sequence of ids, bias) of biased, bad and suppressed tokens."""
    biases: list[tuple[tuple[int, ...], float]] = []
    biases += [((token,), bias) for token, bias in sorted((decode.logit_bias or {}).items())]
    biases += [(tuple(ids), -np.inf) for ids in decode.bad_words_ids]
    return biases + [((token,), -np.inf) for token in decode.suppress_tokens]


def make_sequence_bias(biases: list[tuple[tuple[int, ...], float]]) -> SequenceBias:
    """Returns the processor of one or more (sequence of ids, bias)."""
    longest = max(len(ids) for ids, _ in biases)
    before = np.full((len(biases), longest - 1), -1, np.int32)
    for row, (ids, _) in zip(before, biases, strict=True):
        row[len(row) - len(ids) + 1 :] = ids[:-1]
    return SequenceBias(
        before=before,
        last=np.array([ids[-1] for ids, _ in biases], np.int32),
        bias=np.array([bias for _, bias in biases], np.float32),
    )
