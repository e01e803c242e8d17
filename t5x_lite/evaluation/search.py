# SPDX-License-Identifier: Apache-2.0
"""Search among samples by a judge of texts: `decoding.search` with a tokenizer."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config, decoding
from t5x_lite.config.search import parse_search
from t5x_lite.decoding.adaptive.drafter import Adaptive
from t5x_lite.decoding.forks import ForkedDecoder, ForkedTexts
from t5x_lite.decoding.lattice import Lattice, search_lattices
from t5x_lite.decoding.request import check_positions
from t5x_lite.decoding.search import POLICIES, Judge, SearchSettings, SearchText, join_results
from t5x_lite.decoding.steering.stop_strings import find_stops
from t5x_lite.evaluation.choosing import Candidates, Chooser, UserUtility
from t5x_lite.evaluation.prediction import Prediction, drafter_names, make_prediction
from t5x_lite.evaluation.steered_rows import SteeredRows
from t5x_lite.utils.not_none import not_none


class SearchSource(NamedTuple):
    """An input to continue.

    Attributes:
      text: the input, for the judge.
      ids: its ids.
      row: its number, which keys the sampling.
    """

    text: str
    ids: Sequence[int]
    row: int


def list_sources(
    texts: Iterable[str], ids: Sequence[Sequence[int]], rows: Sequence[int]
) -> list[SearchSource]:
    """Returns inputs as sources.

    Args:
      texts: the inputs.
      ids: ids of each.
      rows: number of each.
    """
    return [SearchSource(*each) for each in zip(texts, ids, rows, strict=True)]


class Search(NamedTuple):
    """A search after one input.

    Attributes:
      texts: in the order of the policy.
      decoder: has counted the forward passes.
      steered: the input, which writes texts from tokens.
    """

    texts: list[SearchText]
    decoder: ForkedDecoder
    steered: SteeredRows


def search_texts(
    predictor: Any,
    sources: Sequence[SearchSource],
    decode: config.Decode,
    on_progress: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Searches for the texts that continue each input, one input after the other.

    Args:
      predictor: `predict.Predictor`, the model.
      sources: the inputs.
      decode: config of decoding, with a search.
      on_progress: called with the number of inputs done.

    Raises:
      ValueError: the judge or the drafter cannot be used.
    """
    judge = not_none(predictor.find_chooser(decode, "judge"))
    predictions = []
    for source in sources:
        search = run_search(predictor, judge, source, decode)
        predictions.append(predict_chosen(predictor, search, decode))
        if on_progress:
            on_progress(len(predictions))
    return predictions


def run_search(
    predictor: Any,
    chooser: Chooser,
    source: SearchSource,
    decode: config.Decode,
) -> Search:
    """Searches for the texts that continue one input.

    Args:
      predictor: the model.
      chooser: gives texts their numbers.
      source: the input.
      decode: config of decoding, with a search.
    """
    policy, rounds = parse_search(decode.search)
    decode = one_text(predictor, decode)
    settings = SearchSettings(
        decode.particles, decode.segment_tokens, decode.judge_weight, rounds, decode.seed
    )
    steered = steer_row(predictor, source.ids, decode)
    decode = steered.decode
    decoder = ForkedDecoder(
        predictor.cfg,
        predictor.params,
        request_row(predictor, steered, source),
        decode,
        predictor.drafters.get(decode),
        find_delimiters(predictor, decode),
    )
    judge = make_judge(chooser, source.text, steered)
    return Search(POLICIES[policy](decoder, judge, settings), decoder, steered)


def name_judge(predictor: Any, judge: Any) -> Any:
    """Returns a judge as a Decode.judge; a function is kept by the predictor under its name."""
    if not callable(judge):
        return judge
    name = f"function:{judge.__module__}.{getattr(judge, '__qualname__', judge)}"
    predictor.choosers["judge", name] = UserUtility(judge, "judge")
    return name


def search_lattice(predictor: Any, text: str, decode: config.Decode, merged: int) -> Lattice:
    """Returns the lattice of a beam search after one input.

    Args:
      predictor: `predict.Predictor`, the model.
      text: the input.
      decode: config of decoding, with beams.
      merged: tokens in which texts agree that are merged.
    """
    predictor = predictor.for_compute(decode.compute)
    (ids,) = predictor.encode_inputs([text])
    check_positions(predictor.cfg, "Input", [ids], decode.max_new_tokens)
    steered = steer_row(predictor, ids, decode)
    decode, request = steered.decode, request_row(predictor, steered, SearchSource(text, ids, 0))
    return search_lattices(predictor.cfg, predictor.params, request, decode, merged)[0]


def one_text(predictor: Any, decode: config.Decode) -> config.Decode:
    """Returns the config of a single sample, by a drafter whose blocks have one size.

    Raises:
      ValueError: the size would be measured.
    """
    drafter = "plain" if decode.drafter == "auto" else decode.drafter
    alone = dataclasses.replace(decode, search="", judge="", choose="", n_best=1, drafter=drafter)
    if isinstance(predictor.drafters.get(alone).drafter, Adaptive):
        raise ValueError(
            f"Decode.search with Decode.drafter {drafter} needs the size of its blocks: set "
            "Decode.draft_length to 2 or more"
        )
    return alone


def request_row(predictor: Any, steered: SteeredRows, source: SearchSource) -> decoding.Request:
    """Returns the request of one input.

    Args:
      predictor: the model.
      steered: the input with its tables.
      source: the input.
    """
    decode = steered.decode
    request = steered.request([0], predictor.padded_rows(1), [source.row])
    prompts = predictor.companion_inputs(decode, [source.text], [source.ids])
    return predictor.companions.attach(request, decode, predictor.params, prompts)


def steer_row(predictor: Any, ids: Sequence[int], decode: config.Decode) -> SteeredRows:
    """Returns an input with the tables of a config.

    Args:
      predictor: the model.
      ids: the input.
      decode: config of decoding.
    """
    vocabularies = predictor.inputs, predictor.targets
    return SteeredRows(predictor.cfg, vocabularies, [ids], decode)


def find_delimiters(predictor: Any, decode: config.Decode) -> Any:
    """Returns the table of the texts that end a segment; None without them."""
    ends = dataclasses.replace(decode, stop=decode.segment_stop)
    return find_stops(ends, predictor.targets, predictor.cfg.vocab)


def make_judge(chooser: Chooser, text: str, steered: SteeredRows) -> Judge:
    """Returns the judge of new tokens: a chooser of the texts that they write.

    Args:
      chooser: gives texts their numbers.
      text: the input.
      steered: the same as ids.
    """

    def judge(rows: ForkedTexts) -> Sequence[float]:
        texts = [steered.write_text(0, ids) for ids in rows.tokens]
        scores = rows.result.scores[:, 0].tolist()
        return chooser([Candidates(text, texts, scores, rows.done)])[0]

    return judge


def predict_chosen(predictor: Any, search: Search, decode: config.Decode) -> Prediction:
    """Returns texts that a search has found as a prediction.

    Args:
      predictor: the model.
      search: the search.
      decode: config of decoding.
    """
    chosen = search.texts[: decode.n_best]
    result, values = join_results(chosen), [each.value for each in chosen]
    drafting = predictor.drafters.get(one_text(predictor, decode))
    write_text = functools.partial(search.steered.write_text, 0)
    names = drafter_names(drafting)
    prediction = make_prediction(result, 0, names, write_text, predictor.targets)
    return prediction._replace(utilities=values if np.all(np.isfinite(values)) else [])
