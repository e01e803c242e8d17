# SPDX-License-Identifier: Apache-2.0
"""Predictions of a model with Model.readout: labels with probabilities, numbers, spans."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config, model
from t5x_lite.batch import Batch
from t5x_lite.config.readout import OUTSIDE
from t5x_lite.decoding.request import check_ids, check_positions, decoder_prompt
from t5x_lite.evaluation.label_metrics import LabeledOutputs
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.model.computation import with_dtype_of
from t5x_lite.model.matching import make_rows
from t5x_lite.tokenizers import labels as label_texts
from t5x_lite.tokenizers.labels import LabelVocabulary, TextSpan
from t5x_lite.tokenizers.offsets import token_offsets
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.not_none import not_none


class FoundSpan(NamedTuple):
    """A span of a text that its tags mark.

    Attributes:
      begin: its first character.
      end: the character after its last.
      name: its name.
      text: its characters.
      probability: the lowest among those of its tokens' tags.
    """

    begin: int
    end: int
    name: str
    text: str
    probability: float


class ReadoutPrediction(NamedTuple):
    """Outputs for one text; which fields have a value depends on Readout.kind.

    Attributes:
      label: the most probable one, of classes.
      labels: those of a probability above 0.5, of labels.
      number: the number.
      spans: the spans, of tags.
      probabilities: of each label by name, of classes and labels.
      tags: the tag of each token, of tags.
    """

    label: str | None = None
    labels: list[str] | None = None
    number: float | None = None
    spans: list[FoundSpan] | None = None
    probabilities: dict[str, float] | None = None
    tags: list[str] | None = None


def predict_readouts(
    predictor: Predictor,
    texts: Sequence[str],
    ids: Sequence[Sequence[int]] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[ReadoutPrediction]:
    """Predictions for texts; what else is in a text's batch changes nothing beyond rounding.

    Args:
      predictor: a model with a readout; it tokenizes the texts.
      texts: the texts.
      ids: ids of the texts, where they are cut; None for all of their ids.
      on_progress: called with the number of texts done.

    Raises:
      ValueError: the model has no readout of labels, or cannot read a text.
    """
    readout = predictor.cfg.readout
    config.require(
        readout is not None and readout.kind != "vector",
        "The model has no labels: Model.readout is None, or a vector (embed makes vectors)",
    )
    readout = not_none(readout)
    ids = predictor.encode_inputs(texts) if ids is None else ids
    outputs = compute_outputs(predictor, ids, on_progress)
    if readout.kind != "tags":
        return [describe_outputs(readout, each[0]) for each in outputs]
    predictions = []
    for text, row in zip(texts, outputs, strict=True):
        offsets = token_offsets(predictor.inputs, text)
        # A start token that the model adds has no characters, and a cut text fewer tokens.
        row = row[max(len(row) - len(offsets), 0) :]
        predictions.append(describe_tags(readout, row, offsets[: len(row)], text))
    return predictions


def describe_outputs(readout: config.Readout, row: np.ndarray) -> ReadoutPrediction:
    """The prediction of outputs [r] of one text, of any kind but tags."""
    if readout.kind == "number":
        return ReadoutPrediction(number=float(row[0]))
    shares = probabilities(readout, row)
    by_name = dict(zip(readout.labels, shares.tolist(), strict=True))
    if readout.kind == "classes":
        return ReadoutPrediction(label=readout.labels[int(np.argmax(row))], probabilities=by_name)
    chosen = [name for name, logit in zip(readout.labels, row, strict=True) if logit > 0]
    return ReadoutPrediction(labels=chosen, probabilities=by_name)


def probabilities(readout: config.Readout, row: np.ndarray) -> np.ndarray:
    """Probabilities [... r] of outputs, float64: of one label, or of each by itself."""
    row = row.astype(np.float64)
    if readout.kind == "labels":
        return np.where(
            row >= 0, 1 / (1 + np.exp(-np.abs(row))), 1 - 1 / (1 + np.exp(-np.abs(row)))
        )
    shares = np.exp(row - row.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def describe_tags(
    readout: config.Readout, row: np.ndarray, offsets: Sequence[tuple[int, int]], text: str
) -> ReadoutPrediction:
    """The prediction of the tags of one text.

    Args:
      readout: config of the readout.
      row: outputs [s r] of its tokens.
      offsets: characters of each token.
      text: the text.
    """
    best, shares = np.argmax(row, axis=-1), probabilities(readout, row).max(axis=-1)
    tags = [readout.labels[number] for number in best]
    # Tokens without characters begin or end the text.
    tags = [
        tag if begin < end else OUTSIDE for tag, (begin, end) in zip(tags, offsets, strict=True)
    ]
    spans = [
        FoundSpan(*span[:3], text[span.begin : span.end], float(shares[places].min()))
        for span, places in label_texts.spans_of_tags(tags, offsets, text)
    ]
    return ReadoutPrediction(spans=spans, tags=tags)


def compute_outputs(
    predictor: Predictor,
    ids: Sequence[Sequence[int]],
    on_progress: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Outputs [1 r] of each text, float32; of tags [s r], one for each of its ids.

    Args:
      predictor: a model with a readout.
      ids: ids of the texts.
      on_progress: called with the number of texts done.
    """
    cfg = with_dtype_of(predictor.cfg, predictor.params)
    check_positions(cfg, "Text", ids)
    if cfg.encoder is None:
        ids = [decoder_prompt(cfg, predictor.without_start(list(row))) for row in ids]
    check_ids(cfg, "Text", ids)
    outputs: dict[int, np.ndarray] = {}
    for places, rows in predictor.padded_batches(ids):
        read = np.asarray(jax.device_get(read_rows(cfg, predictor.params, *rows)))
        for row, place in enumerate(places):
            length = len(ids[place]) if not_none(cfg.readout).kind == "tags" else 1
            outputs[place] = read[row, :length]
        if on_progress:
            on_progress(len(outputs))
    return [outputs[place] for place in range(len(ids))]


@functools.partial(jax.jit, static_argnums=0)
def read_rows(cfg: config.Model, params: Any, ids, length):
    """Outputs [b t r] of rows of ids: of tags for each id, else one for the row.

    Args:
      cfg: config of the model.
      params: its weights.
      ids: [b t] int32.
      length: [b] int32, ids of each row that exist.
    """
    rows = make_rows(ids, length)
    wanted = rows.segments if not_none(cfg.readout).kind == "tags" else rows.segments[:, :1]
    zeros = jnp.zeros_like(wanted)
    batch = Batch(zeros, wanted, zeros, zeros, *rows)
    transformer = model.Transformer(cfg, scan=False)
    outputs = transformer.apply({"params": params}, batch, method=model.Transformer.readout)
    return jax.reshard(outputs, P())


def prediction_fields(prediction: ReadoutPrediction) -> dict[str, Any]:
    """A prediction as fields of a line of JSON."""
    if prediction.number is not None:
        return {"prediction": float(f"{prediction.number:.7g}")}
    if prediction.spans is not None:
        spans = [
            {
                "start": span.begin,
                "end": span.end,
                "label": span.name,
                "text": span.text,
                "probability": round(span.probability, 6),
            }
            for span in prediction.spans
        ]
        return {"prediction": spans}
    shares = not_none(prediction.probabilities).items()
    return {
        "prediction": prediction.label if prediction.labels is None else prediction.labels,
        "probabilities": {name: round(share, 6) for name, share in shares},
    }


def prediction_text(prediction: ReadoutPrediction) -> str:
    """A prediction as the text of a target (`tokenizers.labels`)."""
    if prediction.label is not None:
        return prediction.label
    if prediction.labels is not None:
        return label_texts.write_labels(prediction.labels)
    if prediction.number is not None:
        return f"{prediction.number:.7g}"
    spans = [TextSpan(*span[:3]) for span in prediction.spans or ()]
    return label_texts.write_spans(spans)


def collect_outputs(
    predictor: Predictor,
    predictions: Sequence[ReadoutPrediction],
    texts: Sequence[str],
    references: Sequence[str],
) -> LabeledOutputs:
    """Predictions and their references, as metrics take them.

    Args:
      predictor: the model, with its vocabularies.
      predictions: one for each text.
      texts: the texts.
      references: their targets.
    """
    readout, targets = not_none(predictor.cfg.readout), predictor.targets
    assert isinstance(targets, LabelVocabulary)
    if readout.kind == "tags":
        return collect_tags(predictor.inputs, targets, predictions, texts, references)
    if readout.kind == "number":
        numbers = np.array([each.number for each in predictions])
        right = np.array([label_texts.parse_number(each) for each in references])
        return LabeledOutputs(scores=numbers, references=right)
    scores = np.array([[*not_none(each.probabilities).values()] for each in predictions])
    encoded = np.array([targets.encode(each) for each in references])
    if readout.kind == "labels":
        rows = [targets.encode(prediction_text(each)) for each in predictions]
        return LabeledOutputs(scores, np.array(rows), encoded)
    chosen = np.array([targets.ids[not_none(each.label)] for each in predictions])
    return LabeledOutputs(scores, chosen, encoded[:, 0])


def collect_tags(
    vocabulary: TextVocabulary,
    targets: LabelVocabulary,
    predictions: Sequence[ReadoutPrediction],
    texts: Sequence[str],
    references: Sequence[str],
) -> LabeledOutputs:
    """Spans and tags of predictions and references; only tokens with characters have a tag.

    Args:
      vocabulary: of the texts.
      targets: of the tags.
      predictions: one for each text.
      texts: the texts.
      references: their spans.
    """
    ours, theirs = [], []
    for prediction, text, reference in zip(predictions, texts, references, strict=True):
        tags = not_none(prediction.tags)
        right = targets.encode_tags(text, reference, vocabulary)
        for place, (begin, end) in enumerate(token_offsets(vocabulary, text)[: len(tags)]):
            if begin < end:
                ours.append(targets.ids[tags[place]])
                theirs.append(int(right[place]))
    spans = [[TextSpan(*span[:3]) for span in not_none(each.spans)] for each in predictions]
    right_spans = [
        label_texts.parse_spans(reference, len(text))
        for reference, text in zip(references, texts, strict=True)
    ]
    return LabeledOutputs(
        spans=spans,
        reference_spans=right_spans,
        tags=np.array(ours),
        reference_tags=np.array(theirs),
    )
