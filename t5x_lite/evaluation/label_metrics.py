# SPDX-License-Identifier: Apache-2.0
"""Metrics of labels, numbers and tags, by name and by the kind of readout that they are of.

Their definitions are those of scikit-learn and scipy, with which tests compare them; all values are
in percent. Precision and recall of what never occurs are 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from t5x_lite.config.readout import Readout
from t5x_lite.tokenizers.labels import TextSpan
from t5x_lite.utils.nearest import suggest


class LabeledOutputs(NamedTuple):
    """Outputs of a readout for n texts, and what is right.

    Attributes:
      scores: [n r] probabilities of labels; [n] numbers; None for tags.
      chosen: [n] number of the label; [n r] of labels 1 or 0; None for numbers and tags.
      references: as `chosen`, or [n] numbers; None for tags.
      spans: spans of each text, of tags.
      reference_spans: the right ones.
      tags: number of each token's tag, all texts end to end, of tags.
      reference_tags: the right ones.
    """

    scores: np.ndarray | None = None
    chosen: np.ndarray | None = None
    references: np.ndarray | None = None
    spans: Sequence[Sequence[TextSpan]] = ()
    reference_spans: Sequence[Sequence[TextSpan]] = ()
    tags: np.ndarray | None = None
    reference_tags: np.ndarray | None = None


def accuracy(outputs: LabeledOutputs) -> float:
    """Texts whose label is right, or all of whose labels are; tokens whose tag is right."""
    if outputs.tags is not None:
        return float(np.mean(outputs.tags == outputs.reference_tags))
    right = np.asarray(outputs.chosen) == np.asarray(outputs.references)
    return float(np.mean(right if right.ndim == 1 else right.all(axis=1)))


def f1_binary(outputs: LabeledOutputs) -> float:
    """F1 of the second of two labels."""
    return f1_of(*(int(count[0]) for count in counts_by_label(outputs, np.array([1]))))


def f1_macro(outputs: LabeledOutputs) -> float:
    """Mean F1 of the labels: of classes, those that occur; of several labels per text, all."""
    chosen, references = np.asarray(outputs.chosen), np.asarray(outputs.references)
    several = chosen.ndim == 2
    names = np.arange(chosen.shape[1]) if several else np.union1d(chosen, references)
    counts = counts_by_label(outputs, names)
    return float(np.mean([f1_of(*each) for each in zip(*counts, strict=True)]))


def f1_micro(outputs: LabeledOutputs) -> float:
    """F1 of the counts of all labels together; for classes it is the accuracy."""
    chosen, references = np.asarray(outputs.chosen), np.asarray(outputs.references)
    several = chosen.ndim == 2
    names = np.arange(chosen.shape[1]) if several else np.union1d(chosen, references)
    return f1_of(*(count.sum() for count in counts_by_label(outputs, names)))


def counts_by_label(
    outputs: LabeledOutputs, names: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, chosen and true occurrences of each label of `names`."""
    chosen, references = np.asarray(outputs.chosen), np.asarray(outputs.references)
    if chosen.ndim == 1:
        chosen, references = chosen[:, None] == names, references[:, None] == names
    chosen, references = chosen > 0, references > 0
    return (chosen & references).sum(0), chosen.sum(0), references.sum(0)


def f1_of(right: float, chosen: float, true: float) -> float:
    """Harmonic mean of precision and recall.

    Args:
      right: occurrences that are chosen and true.
      chosen: occurrences that are chosen.
      true: occurrences that are true.
    """
    return 2 * right / max(chosen + true, 1)


def matthews(outputs: LabeledOutputs) -> float:
    """Matthews' correlation of classes (Gorodkin, 2004, equation 8); 0 if one side is constant."""
    chosen, references = np.asarray(outputs.chosen), np.asarray(outputs.references)
    names = np.union1d(chosen, references)
    ours, theirs = (side[:, None] == names for side in (chosen, references))
    count, right = len(chosen), np.sum(chosen == references)
    ours, theirs = ours.sum(0).astype(np.float64), theirs.sum(0).astype(np.float64)
    spread = (count**2 - ours @ ours) * (count**2 - theirs @ theirs)
    return float((right * count - ours @ theirs) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(outputs: LabeledOutputs) -> float:
    """Pearson's correlation of numbers."""
    return correlate(np.asarray(outputs.scores), np.asarray(outputs.references))


def spearman(outputs: LabeledOutputs) -> float:
    """Spearman's correlation of numbers: that of their ranks, equal ones in the middle."""
    from scipy.stats import rankdata

    sides = np.asarray(outputs.scores), np.asarray(outputs.references)
    return correlate(*(rankdata(side) for side in sides))


def correlate(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Correlation of two rows of numbers; raises ValueError where one is constant."""
    # Compared as they are: a mean of equal numbers may be another one, by rounding.
    constant = any((side == side[0]).all() for side in (ours, theirs))
    ours, theirs = (side - np.mean(side) for side in (ours.astype(float), theirs.astype(float)))
    spread = np.sqrt((ours @ ours) * (theirs @ theirs))
    if constant or not spread > 0:
        raise ValueError("all predictions, or all references, are the same number")
    return float(ours @ theirs / spread)


def auc(outputs: LabeledOutputs) -> float:
    """Area under the ROC curve: of the second of two classes, or the mean over labels, each against
    the rest."""
    scores, references = np.asarray(outputs.scores), np.asarray(outputs.references)
    if references.ndim == 1:
        if scores.shape[1] == 2:
            return area_under_roc(scores[:, 1], references == 1)
        references = references[:, None] == np.arange(scores.shape[1])
    areas = [
        area_under_roc(scores[:, label], references[:, label] > 0)
        for label in range(scores.shape[1])
    ]
    return float(np.mean(areas))


def area_under_roc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has a higher score than a negative, ties counted as half."""
    from scipy.stats import rankdata

    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        raise ValueError("a label is in all texts or in none: the ROC curve is not defined")
    ranks = rankdata(scores.astype(np.float64))[positive].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


def span_f1(outputs: LabeledOutputs) -> float:
    """F1 of spans that are right in both ends and in their name, all texts together (conlleval)."""
    pairs = list(zip(outputs.spans, outputs.reference_spans, strict=True))
    right = sum(len({*ours} & {*theirs}) for ours, theirs in pairs)
    return f1_of(
        right, sum(len(ours) for ours, _ in pairs), sum(len(theirs) for _, theirs in pairs)
    )


# Metrics by name, with the kinds of readout that they are of.
LABEL_METRICS: dict[str, tuple[tuple[str, ...], Callable[[LabeledOutputs], float]]] = {
    "accuracy": (("classes", "labels", "tags"), accuracy),
    "f1_binary": (("classes",), f1_binary),
    "f1_macro": (("classes", "labels"), f1_macro),
    "f1_micro": (("classes", "labels"), f1_micro),
    "matthews": (("classes",), matthews),
    "auc": (("classes", "labels"), auc),
    "pearson": (("number",), pearson),
    "spearman": (("number",), spearman),
    "span_f1": (("tags",), span_f1),
}


def metric_names(readout: Readout) -> list[str]:
    """Names of the metrics of a readout; f1_binary is of two classes."""
    names = [name for name, (kinds, _) in LABEL_METRICS.items() if readout.kind in kinds]
    two = readout.kind == "classes" and readout.size == 2
    return [name for name in names if two or name != "f1_binary"]


def check_label_metrics(names: Sequence[str], readout: Readout) -> None:
    """Raises ValueError for a name that is no metric of a readout; the message has near names."""
    known = metric_names(readout)
    for name in names:
        if name not in known:
            raise ValueError(
                f"There is no metric {name!r} for a readout of kind {readout.kind}: "
                f"{suggest(name, known)}"
            )


def measure_labels(
    names: Sequence[str], outputs: LabeledOutputs
) -> tuple[dict[str, float], dict[str, str]]:
    """Values of metrics in percent, and reasons for those that are not defined here."""
    values, failures = {}, {}
    for name in names:
        try:
            values[name] = 100 * LABEL_METRICS[name][1](outputs)
        except ValueError as error:
            failures[name] = str(error)
    return values, failures
