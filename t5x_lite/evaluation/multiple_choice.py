# SPDX-License-Identifier: Apache-2.0
"""Zero-shot choice: which of several texts a model finds most likely after an input."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.cli.options import NORMALIZATIONS
from t5x_lite.evaluation.arguments import list_texts, shorten
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.evaluation.prediction import TargetScore


class ChoiceScores(NamedTuple):
    """The choices of an input under the model.

    Attributes:
      best: number of the choice with the highest score; the first of several.
      scores: of each choice, as it was normalized.
      log_probabilities: of each choice, in nats.
    """

    best: int
    scores: list[float]
    log_probabilities: list[float]


def choose(
    predictor: Predictor,
    inputs: str | Sequence[str],
    choices: Sequence[Any],
    normalize: str = "none",
    prior: str = "",
) -> Any:
    """`score_choices` of one text, or of a list of texts.

    Args:
      predictor: the model.
      inputs: a text or a list of texts.
      choices: the choices of the text, or a list of them for each text.
      normalize: how choices are compared.
      prior: the input of a prior.

    Raises:
      ValueError: they are not texts, or do not pair up.
    """
    texts = list_texts(inputs)
    alone = isinstance(inputs, str)
    rows = [choices] if alone else list(choices)
    # A text in place of a list would be taken for its letters.
    plain = [row for row in rows if isinstance(row, str)]
    config.require(
        not plain, f"Choices are lists of texts; got {plain and shorten(plain[0])} for an input"
    )
    config.require(
        len(rows) == len(texts), f"{len(texts)} inputs but choices for {len(rows)} of them"
    )
    scored = score_choices(predictor, texts, [*map(list_texts, rows)], normalize, prior)
    return scored[0] if alone else scored


def score_choices(
    predictor: Predictor,
    inputs: Sequence[str],
    choices: Sequence[Sequence[str]],
    normalize: str = "none",
    prior: str = "",
    on_progress: Callable[[int], None] | None = None,
) -> list[ChoiceScores]:
    """Scores the choices of each input.

    Args:
      predictor: the model.
      inputs: texts.
      choices: texts that may follow each input; a decoder's begin with a space where one is due.
      normalize: how choices are compared: by log-probability (none); that of a token or of a
        character; or by how much more probable the input makes them (prior: pointwise mutual
        information; Holtzman et al., 2021).
      prior: input after which a choice is as probable as its prior; "" for no input.
      on_progress: called with the number of scored choices, those of priors not counted.

    Raises:
      ValueError: an unknown normalization, an input without choices, or a text that the model
        cannot read.
    """
    config.require(
        normalize in NORMALIZATIONS,
        f"normalize must be one of {', '.join(NORMALIZATIONS)}; got {normalize!r}",
    )
    for number, each in enumerate(choices):
        config.require(
            len(each) > 0 and all(each), f"Input {number} has no choices, or an empty one"
        )
    pairs = [(text, choice) for text, each in zip(inputs, choices, strict=True) for choice in each]
    scored = score_pairs(predictor, pairs, on_progress)
    measured = normalize_scores(predictor, pairs, scored, normalize, prior)
    results, start = [], 0
    for each in choices:
        part = slice(start, start + len(each))
        start += len(each)
        scores = measured[part]
        best = max(range(len(scores)), key=scores.__getitem__)
        results.append(ChoiceScores(best, scores, [x.log_probability for x in scored[part]]))
    return results


def normalize_scores(
    predictor: Predictor,
    pairs: Sequence[tuple[str, str]],
    scored: Sequence[TargetScore],
    normalize: str,
    prior: str,
) -> list[float]:
    """Numbers by which choices are compared.

    Args:
      predictor: the model.
      pairs: inputs with their choices.
      scored: log-probabilities of the choices.
      normalize: one of NORMALIZATIONS.
      prior: the input of a prior.
    """
    totals = [each.log_probability for each in scored]
    match normalize:
        case "tokens":
            sizes = [len(each.tokens) for each in scored]
        case "characters":
            sizes = [len(choice) for _, choice in pairs]
        case "prior":
            texts = list(dict.fromkeys(choice for _, choice in pairs))
            alone = score_pairs(predictor, [(prior, text) for text in texts])
            priors = {text: each.log_probability for text, each in zip(texts, alone, strict=True)}
            return [
                total - priors[choice] for total, (_, choice) in zip(totals, pairs, strict=True)
            ]
        case _:
            return totals
    return [total / size for total, size in zip(totals, sizes, strict=True)]


def score_pairs(
    predictor: Predictor,
    pairs: Sequence[tuple[str, str]],
    on_progress: Callable[[int], None] | None = None,
) -> list[TargetScore]:
    """Scores the second text of each pair after the first.

    Args:
      predictor: the model.
      pairs: inputs with what follows them.
      on_progress: called with the number of pairs done.
    """
    ids = [encode_pair(predictor, *pair) for pair in pairs]
    return predictor.score_ids([each for each, _ in ids], [each for _, each in ids], on_progress)


def encode_pair(predictor: Predictor, text: str, choice: str) -> tuple[list[int], list[int]]:
    """The ids of an input and of a text that follows it.

    A model whose inputs end reads a choice as a whole target, its end included. Of a text that goes
    on, both are tokenized together where the input's ids remain the same, and spaces at its end
    belong to the choice.

    Args:
      predictor: the model.
      text: the input.
      choice: what follows it.
    """
    if predictor.cfg.encoder is not None or predictor.ended:
        return predictor.encode_inputs([text])[0], predictor.encode_targets([choice])[0]
    before = text.rstrip(" ")
    whole = predictor.encode_inputs([text + choice])[0]
    context = predictor.encode_inputs([before])[0]
    if whole[: len(context)] == context and len(whole) > len(context):
        return context, whole[len(context) :]
    return context, list(predictor.targets.encode(text[len(before) :] + choice))
