# SPDX-License-Identifier: Apache-2.0
"""Metrics of predictions, by name.

Every metric takes predictions (one text each) and references (the acceptable answers of each) and
returns values by name; rates are in percent, as they are published.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from t5x_lite.utils.nearest import suggest

Predictions = Sequence[str]
References = Sequence[Sequence[str]]
Metric = Callable[[Predictions, References], dict[str, float]]
# Of these less is better, losses included; of all other values more.
LESS_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "per", "wer", "edit_distance")


def edit_distance(one: Sequence, other: Sequence) -> int:
    """The fewest insertions, deletions and substitutions from one to other (Levenshtein, 1966)."""
    row = list(range(len(other) + 1))
    for i, x in enumerate(one, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(other, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def nearest_reference(prediction: str, references: Sequence[str]) -> tuple[int, int]:
    """The fewest token edits to any reference, and the length of that reference."""
    tokens = prediction.split()
    edits = [(edit_distance(tokens, each.split()), len(each.split())) for each in references]
    return min(edits)


def exact_match(predictions: Predictions, references: References) -> dict[str, float]:
    """Percent of predictions that are one of their references; outer spaces are ignored."""
    right = [
        prediction.strip() in {each.strip() for each in acceptable}
        for prediction, acceptable in zip(predictions, references, strict=True)
    ]
    return {"exact_match": 100 * mean_of(right)}


def token_edit_distance(predictions: Predictions, references: References) -> dict[str, float]:
    """Edits per text to the nearest reference, tokens are separated by spaces."""
    pairs = zip(predictions, references, strict=True)
    return {"edit_distance": mean_of([nearest_reference(*pair)[0] for pair in pairs])}


def phoneme_error_rate(predictions: Predictions, references: References) -> dict[str, float]:
    """Edits to the nearest pronunciation, as percent of its phonemes; summed over all words.

    With several pronunciations the one with the fewest edits, as published for CMUdict (Yao and
    Zweig, 2015).
    """
    pairs = [nearest_reference(*pair) for pair in zip(predictions, references, strict=True)]
    edits, lengths = map(sum, zip(*pairs, strict=True))
    return {"per": 100 * edits / max(lengths, 1)}


def word_error_rate(predictions: Predictions, references: References) -> dict[str, float]:
    """Percent of words that match none of their pronunciations."""
    wrong = [
        prediction.split() not in [each.split() for each in acceptable]
        for prediction, acceptable in zip(predictions, references, strict=True)
    ]
    return {"wer": 100 * mean_of(wrong)}


def bleu(predictions: Predictions, references: References) -> dict[str, float]:
    """Corpus BLEU of sacrebleu, 13a tokens, mixed case (Post, 2018)."""
    import sacrebleu

    return {
        "bleu": sacrebleu.corpus_bleu(list(predictions), transpose_references(references)).score
    }


def chrf(predictions: Predictions, references: References) -> dict[str, float]:
    """Corpus chrF2 of sacrebleu (Popovic, 2015)."""
    import sacrebleu

    return {
        "chrf": sacrebleu.corpus_chrf(list(predictions), transpose_references(references)).score
    }


def transpose_references(references: References) -> list[list[Any]]:
    """References in sacrebleu's order: the first of every text, the second of every text ...

    If a text has fewer than another there is None, which sacrebleu ignores.
    """
    most = max(map(len, references))
    rows = [[*each, *[None] * (most - len(each))] for each in references]
    return [list(column) for column in zip(*rows, strict=True)]


def rouge(predictions: Predictions, references: References) -> dict[str, float]:
    """ROUGE-1, -2 and -Lsum F1 (Lin, 2004), stemmed, each with its best reference.

    As T5 reports it, but without its bootstrap: the mean over texts.
    """
    from rouge_score import rouge_scorer

    kinds = ("rouge1", "rouge2", "rougeLsum")
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    scores = [
        scorer.score_multi(list(acceptable), prediction)
        for prediction, acceptable in zip(predictions, references, strict=True)
    ]
    return {kind: 100 * mean_of([score[kind].fmeasure for score in scores]) for kind in kinds}


def normalize_answer(text: str) -> str:
    """A text as SQuAD's script compares it: lower case, without punctuation, articles and extra
    spaces (Rajpurkar et al., 2016)."""
    kept = "".join(each for each in text.lower() if each not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def answer_f1(prediction: str, reference: str) -> float:
    """F1 of the words of two answers, as SQuAD's script computes it."""
    ours, theirs = (normalize_answer(text).split() for text in (prediction, reference))
    shared = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * shared / (len(ours) + len(theirs))


def squad(predictions: Predictions, references: References) -> dict[str, float]:
    """Exact match and F1 of answers as SQuAD scores them, each with its best reference."""
    pairs = list(zip(predictions, references, strict=True))
    exact = [
        max(normalize_answer(answer) == normalize_answer(each) for each in acceptable)
        for answer, acceptable in pairs
    ]
    scores = [max(answer_f1(answer, each) for each in acceptable) for answer, acceptable in pairs]
    return {"squad_exact_match": 100 * mean_of(exact), "squad_f1": 100 * mean_of(scores)}


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "edit_distance": token_edit_distance,
    "per": phoneme_error_rate,
    "wer": word_error_rate,
    "bleu": bleu,
    "chrf": chrf,
    "rouge": rouge,
    "squad": squad,
}


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
      ValueError: an unknown name; the message has near names.
    """
    if name in METRICS:
        return METRICS[name]
    raise ValueError(f"There is no metric {name!r}: {suggest(name, METRICS)}")


def measure_metrics(
    names: Sequence[str], predictions: Predictions, references: References
) -> dict[str, float]:
    """Computes all named metrics.

    Args:
      names: keys of METRICS.
      predictions: one text each.
      references: acceptable answers of each.

    Raises:
      ValueError: a name is unknown, there is nothing to measure, or a text has no reference.
    """
    metrics = [find_metric(name) for name in names]
    if not predictions:
        raise ValueError("There are no predictions to measure")
    for number, acceptable in enumerate(references):
        if not acceptable:
            raise ValueError(f"Prediction {number} has no reference to be measured against")
    values: dict[str, float] = {}
    for metric in metrics:
        values |= metric(predictions, references)
    return values


def mean_of(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)
