# SPDX-License-Identifier: Apache-2.0
"""A text as it is written, piece by piece."""

from collections.abc import Iterator
from typing import NamedTuple

from t5x_lite import config, decoding
from t5x_lite.evaluation.predict import Predictor, guessers


class Piece(NamedTuple):
    """What came since the last piece: text, and of each of its tokens the id, the call that wrote
    it and who had guessed it ("model": nobody); total counts the calls so far.

    Put together, the texts are what `predict` gives. A letter that is not whole yet, and blanks
    that a tokenizer may still take back, wait for the next piece.
    """

    text: str
    tokens: list[int]
    calls: list[int]
    guessed: list[str]
    total: int


def stream(
    predictor: Predictor,
    text: str,
    decode: config.Decode,
    every: int = 4,
) -> Iterator[Piece]:
    """What the model writes after text, a Piece after every so many forward passes.

    Raises:
      ValueError: beams are asked for, every is below 1, or the model cannot read the text.
    """
    request = decoding.request(
        predictor.cfg,
        predictor.read([text]),
        decode,
        batch=predictor.rows(1),
        eos=predictor.targets.stops,
    )
    drafting = predictor.drafters.ready(request, decode)
    given = (predictor.cfg, predictor.params, request, decode, drafting)
    return pieces(predictor, decoding.stream(*given, every=every), guessers(drafting))


def pieces(
    predictor: Predictor, results: Iterator[decoding.Result], names: tuple[str, ...]
) -> Iterator[Piece]:
    """results as pieces; names[i] is who guesses node i of a block."""
    sent, text, seen = "", "", 0
    for result in results:
        count = int(result.lengths[0, 0])
        ids, calls, nodes = (
            rows[0, 0, :count].tolist() for rows in (result.tokens, result.call, result.node)
        )
        text = predictor.targets.decode(ids)
        ready = text.rstrip("\ufffd").rstrip()
        new = ready[len(sent) :] if ready.startswith(sent) else ""
        guessed = [names[node] for node in nodes[seen:]]
        yield Piece(new, ids[seen:], calls[seen:], guessed, result.calls)
        sent, seen = sent + new, count
    if text != sent:
        yield Piece(text[len(sent) :], [], [], [], result.calls)
