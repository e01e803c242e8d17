# SPDX-License-Identifier: Apache-2.0
"""Zero-shot choice: which of several texts a model finds most likely after an input."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from t5x_lite import config
from t5x_lite.cli.options import NORMALIZATIONS
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
    priors = {}
    if normalize == "prior":
        texts = list(dict.fromkeys(choice for _, choice in pairs))
        alone = score_pairs(predictor, [(prior, text) for text in texts])
        priors = {text: each.log_probability for text, each in zip(texts, alone, strict=True)}

    def measure(pair: tuple[str, str], each: TargetScore) -> float:
        match normalize:
            case "tokens":
                return each.log_probability / len(each.tokens)
            case "characters":
                return each.log_probability / len(pair[1])
            case "prior":
                return each.log_probability - priors[pair[1]]
        return each.log_probability

    results, start = [], 0
    for each in choices:
        part = slice(start, start + len(each))
        start += len(each)
        scores = [measure(*both) for both in zip(pairs[part], scored[part], strict=True)]
        best = max(range(len(scores)), key=scores.__getitem__)
        results.append(ChoiceScores(best, scores, [x.log_probability for x in scored[part]]))
    return results


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
