# SPDX-License-Identifier: Apache-2.0
"""Streaming of a text, piece by piece."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from t5x_lite import config, decoding
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.evaluation.prediction import drafter_names
from t5x_lite.evaluation.steered_rows import SteeredRows
from t5x_lite.utils.not_none import not_none


class TextPiece(NamedTuple):
    """Tokens since the last piece, and their text.

    Joined, the texts are what `predict` returns. An incomplete character, and spaces that a
    tokenizer may still drop, wait for the next piece.

    Attributes:
      text: text since the last piece.
      tokens: ids since the last piece.
      calls: the forward pass that wrote each token.
      drafted_by: the drafter that had proposed each token ("model" if none).
      total: forward passes so far.
    """

    text: str
    tokens: list[int]
    calls: list[int]
    drafted_by: list[str]
    total: int


def stream_text(
    predictor: Predictor,
    text: str,
    decode: config.Decode,
    every: int = 4,
) -> Iterator[TextPiece]:
    """Streams what the model writes after a text.

    Args:
      predictor: the model.
      text: input.
      decode: config of decoding.
      every: forward passes per piece.

    Raises:
      ValueError: beams are above 1, every is below 1, or the model cannot read the text.
    """
    predictor = predictor.for_compute(decode.compute)
    vocabularies, ids = (predictor.inputs, predictor.targets), predictor.encode_inputs([text])
    steered = SteeredRows(predictor.cfg, vocabularies, ids, decode)
    decode, request = steered.decode, steered.request([0], predictor.padded_rows(1))
    others = predictor.companion_inputs(decode, [text], ids)
    request = predictor.companions.attach(request, decode, predictor.params, others)
    results = predictor.drafters.stream(predictor.params, request, decode, every)
    names = drafter_names(predictor.drafters.get(decode))
    return text_pieces(results, names, functools.partial(steered.write_text, 0))


def text_pieces(
    results: Iterator[decoding.Result],
    names: tuple[str, ...],
    write_text: Callable[..., str],
) -> Iterator[TextPiece]:
    """Decodes results into pieces.

    Args:
      results: tokens so far, after every few forward passes.
      names: the drafter that proposes each node of a block.
      write_text: returns the text of the new tokens; with growing=True, what stays of it
        whatever follows.
    """
    sent, text, count_sent = "", "", 0
    for result in results:
        count = int(result.lengths[0, 0])
        ids, calls, nodes = (
            not_none(rows)[0, 0, :count].tolist()
            for rows in (result.tokens, result.token_step, result.token_node)
        )
        text, ready = write_text(ids), write_text(ids, growing=True)
        ready = ready.rstrip("\ufffd").rstrip()
        new = ready[len(sent) :] if ready.startswith(sent) else ""
        drafted_by = [names[node] for node in nodes[count_sent:]]
        yield TextPiece(new, ids[count_sent:], calls[count_sent:], drafted_by, result.steps)
        sent, count_sent = sent + new, count
    if text != sent:
        yield TextPiece(text[len(sent) :], [], [], [], result.steps)
