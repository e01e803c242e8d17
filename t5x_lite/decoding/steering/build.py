# SPDX-License-Identifier: Apache-2.0
"""Rules of choice, and the logits processors of a config."""

from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.decoding.request import Request
from t5x_lite.decoding.sampling import SamplingParams
from t5x_lite.decoding.steering.constraints import make_automaton
from t5x_lite.decoding.steering.penalties import FrequencyPenalty, RepetitionPenalty
from t5x_lite.decoding.steering.processor import LogitsProcessor, Processors
from t5x_lite.decoding.steering.sequences import (
    ForcedBeginning,
    MinNewTokens,
    NoRepeatNgram,
    SequenceBias,
)
from t5x_lite.decoding.steering.spans import InputSpans
from t5x_lite.decoding.steering.stop_strings import StopStrings


class ChoiceRules(NamedTuple):
    """Rules by which the next token is chosen.

    Attributes:
      sampling: how rows are sampled; None for greedy decoding.
      processors: what changes the logits before.
      strings: texts that end a row; None for none.
      diversity: penalty of a token that an earlier group of beams takes; None without groups.
      companion: `companions.companion.Companion` whose logits are combined with the model's; None
        for none.
    """

    sampling: SamplingParams | None = None
    processors: Processors = Processors()
    strings: StopStrings | None = None
    diversity: Any = None
    companion: Any = None


def make_processors(decode: config.Decode, request: Request) -> Processors:
    """Returns the processors of a config, in the order of transformers; constraints come last.

    Args:
      decode: the config, its bad words as ids.
      request: the rows.
    """
    rows = len(request.row)

    def each(value: float, dtype: type = np.float32) -> Any:
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
        stops: Any = np.atleast_1d(np.asarray(request.eos, np.int32))
        rules.append(MinNewTokens(each(decode.min_new_tokens, np.int32), stops))
    if decode.forced_bos_token_id is not None:
        tokens: Any = np.full((rows, 1), decode.forced_bos_token_id, np.int32)
        rules.append(ForcedBeginning(tokens, each(1, np.int32)))
    if request.constraint is not None:
        rules.append(make_automaton(request.constraint, request.limit))
    if request.healing is not None:
        rules.append(make_automaton(request.healing, request.limit, request.healing_start))
    if request.spans is not None:
        ends: Any = np.atleast_1d(np.asarray(request.eos, np.int32))
        rules.append(InputSpans(request.spans, each(0, np.int32) + request.limit, ends))
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
    before: Any = np.full((len(biases), longest - 1), -1, np.int32)
    last: Any = np.array([ids[-1] for ids, _ in biases], np.int32)
    added: Any = np.array([bias for _, bias in biases], np.float32)
    for row, (ids, _) in zip(before, biases, strict=True):
        row[len(row) - len(ids) + 1 :] = ids[:-1]
    return SequenceBias(before, last, added)
