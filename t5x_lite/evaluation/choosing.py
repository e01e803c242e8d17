# SPDX-License-Identifier: Apache-2.0
"""Choice among several texts for one input, and the report of what the choice can gain.

A chooser gives every text a utility, from the input, the texts and their log-probabilities; texts
are ordered by it, best first. By name (Decode.choose):

  score               the log-probability over the length penalty
  mbr:METRIC          the mean of a metric against all texts of the input (minimum Bayes risk;
                      Kumar and Byrne, 2004; of samples: Eikema and Aziz, 2020)
  rerank:PATH         the log-probability of another checkpoint
  function:M.NAME     the function NAME of module M: (input, texts) -> a number for each text
  coverage:BETA       score plus BETA times the coverage penalty (evaluation.coverage)
"""

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from t5x_lite.evaluation import metrics


class Candidates(NamedTuple):
    """Texts for one input.

    Attributes:
      input: the input.
      texts: the texts; of samples the same one may occur several times.
      scores: log-probability of each over its length penalty.
      done: texts that have ended, in a search; all if it is empty.
    """

    input: str
    texts: Sequence[str]
    scores: Sequence[float]
    done: Sequence[bool] = ()


class Chooser(Protocol):
    """A way to choose: the utilities of the texts of every input, higher is better."""

    def __call__(self, candidates: Sequence[Candidates]) -> list[list[float]]: ...


def make_chooser(
    name: str,
    load_scorer: Callable[[str], Callable[[list[str], list[str]], list[float]]],
    field: str = "choose",
) -> Chooser:
    """Returns the chooser of a Decode.choose, or of a Decode.judge.

    Args:
      name: its name.
      load_scorer: path of a checkpoint -> (inputs, targets) -> their log-probabilities.
      field: of Decode, for messages.

    Raises:
      ValueError: there is no such metric, checkpoint or function.
    """
    kind, _, argument = name.partition(":")
    if kind == "mbr":
        return MinimumBayesRisk(argument)
    if kind == "rerank":
        return Rerank(load_scorer(argument))
    if kind == "function":
        return UserUtility(import_function(argument, f"Decode.{field}"), field)
    return rank_by_score


def rank_by_score(candidates: Sequence[Candidates]) -> list[list[float]]:
    """Returns the scores of the model itself."""
    return [list(each.scores) for each in candidates]


class MinimumBayesRisk:
    """Expected utility of a text, if the truth is one of the texts; each counts as often as it
    occurs.

    Args:
      metric: key of metrics.METRICS; the mean of its values if it has several.

    Raises:
      ValueError: there is no such metric.
    """

    def __init__(self, metric: str):
        self.metric = metric
        metrics.find_metric(metric)

    def __call__(self, candidates: Sequence[Candidates]) -> list[list[float]]:
        return [self.utilities(each.texts) for each in candidates]

    def utilities(self, texts: Sequence[str]) -> list[float]:
        """Mean utility of each text against all of them."""
        counts = {text: texts.count(text) for text in dict.fromkeys(texts)}
        means = {}
        for text in counts:
            pairs = [count * utility(self.metric, text, [other]) for other, count in counts.items()]
            means[text] = sum(pairs) / len(texts)
        return [means[text] for text in texts]


class Rerank:
    """Log-probability of the texts under another model.

    Args:
      score: (inputs, targets) -> log-probabilities.
    """

    def __init__(self, score: Callable[[list[str], list[str]], list[float]]):
        self.score = score

    def __call__(self, candidates: Sequence[Candidates]) -> list[list[float]]:
        pairs = {(each.input, text): None for each in candidates for text in each.texts}
        inputs, texts = map(list, zip(*pairs, strict=True))
        known = dict(zip(pairs, self.score(inputs, texts), strict=True))
        return [[known[each.input, text] for text in each.texts] for each in candidates]


class UserUtility:
    """Utility by a function of the user.

    Args:
      function: (input, texts) -> a number for each text.
      field: of Decode that names it, for messages; a judge may also return minus infinity.
    """

    def __init__(
        self, function: Callable[[str, list[str]], Sequence[float]], field: str = "choose"
    ):
        self.function, self.field = function, field

    def __call__(self, candidates: Sequence[Candidates]) -> list[list[float]]:
        return [self.utilities(each) for each in candidates]

    def utilities(self, candidates: Candidates) -> list[float]:
        """Utilities of the texts of one input.

        Raises:
          ValueError: the function fails, or returns something else than a number for each text.
        """
        try:
            values = self.function(candidates.input, list(candidates.texts))
            values = list_yielded(values, len(candidates.texts))
        except (Exception, SystemExit) as error:  # also of a function that ends the process
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"Decode.{self.field}: the function failed at texts of {candidates.input!r:.80} "
                f"({reason:.200})"
            ) from error
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError):
            numbers = []
        known = [value for value in numbers if self.field != "judge" or value != -np.inf]
        if len(numbers) != len(candidates.texts) or not np.all(np.isfinite(known)):
            raise ValueError(
                f"Decode.{self.field}: the function must return a finite number for each of "
                f"{len(candidates.texts)} texts; got {values!r:.80}"
            )
        return numbers


class ImportanceResampling:
    """Draws among samples of the model as a tilted model would: p(text) exp(c . f(text)).

    The utilities are the logarithms of the weights with Gumbel noise, so the order is a draw
    without replacement. With `fit_coefficients` the tilted model has the mean features of reference
    texts (Ji et al., 2024, arXiv 2310.01041). Repeated samples count as often as they were drawn.

    Args:
      features: (input, text) -> the numbers f.
      coefficients: c.
      seed: of the noise.
    """

    def __init__(
        self,
        features: Callable[[str, str], Sequence[float]],
        coefficients: Sequence[float],
        seed: int = 0,
    ):
        self.features, self.coefficients, self.seed = features, np.asarray(coefficients), seed

    def __call__(self, candidates: Sequence[Candidates]) -> list[list[float]]:
        draw = np.random.default_rng(self.seed)
        utilities = []
        for each in candidates:
            rows = np.array([self.features(each.input, text) for text in each.texts], float)
            utilities.append((rows @ self.coefficients + draw.gumbel(size=len(rows))).tolist())
        return utilities


def fit_coefficients(
    features: Sequence[np.ndarray], wanted: Sequence[float], steps: int = 100
) -> np.ndarray:
    """Coefficients with which the reweighted samples have the mean features `wanted`.

    The minimum of a convex function, by Newton's method with halved steps.

    Args:
      features: for each input, the features [n f] of its samples.
      wanted: mean features [f] of the reference texts.
      steps: most iterations.

    Raises:
      ValueError: no weights have these means: they lie outside of what the samples reach.
    """
    goal = np.asarray(wanted, float)

    def evaluate(coefficients):
        value, gradient = -coefficients @ goal, -goal.copy()
        hessian = np.zeros((len(goal), len(goal)))
        for rows in features:
            logits = rows @ coefficients
            largest = logits.max()
            weights = np.exp(logits - largest)
            value += (largest + np.log(weights.mean())) / len(features)
            weights /= weights.sum()
            mean = weights @ rows
            gradient += mean / len(features)
            hessian += ((rows * weights[:, None]).T @ rows - np.outer(mean, mean)) / len(features)
        return value, gradient, hessian

    coefficients = np.zeros(len(goal))
    value, gradient, hessian = evaluate(coefficients)
    for _ in range(steps):
        if np.abs(gradient).max() < 1e-9 * (1 + np.abs(goal).max()):
            return coefficients
        step, size = np.linalg.lstsq(hessian, gradient, rcond=None)[0], 1.0
        while evaluate(coefficients - size * step)[0] > value and size > 1e-9:
            size /= 2
        coefficients = coefficients - size * step
        value, gradient, hessian = evaluate(coefficients)
    if np.abs(gradient).max() < 1e-4 * (1 + np.abs(goal).max()):
        return coefficients
    raise ValueError(
        f"No weights of these samples have the mean features {goal.tolist()}: the nearest are "
        f"{np.round(gradient + goal, 4).tolist()}"
    )


def list_yielded(values: Any, count: int) -> Any:
    """Result of a user's function; of a generator its values, one more than `count` at most, so
    that its errors are those of the function."""
    return list(itertools.islice(values, count + 1)) if isinstance(values, Iterator) else values


def import_function(path: str, field: str = "Decode.choose") -> Callable:
    """Imports a function by its dotted path, which a field of the config names.

    Raises:
      ValueError: there is no such module or function.
    """
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module or path), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{field} function:{path} is no function that can be imported ({error}): "
            "MODULE.NAME names one, in the current folder or installed"
        ) from None
    if not callable(function):
        raise ValueError(f"{field} function:{path} is no function")
    return function


def order_predictions(
    chooser: Chooser, inputs: Sequence[str], predictions: Sequence[Any]
) -> list[Any]:
    """Puts the texts of each prediction in the order of their utilities, ties as they were.

    Args:
      chooser: gives the utilities.
      inputs: text of each input.
      predictions: `prediction.Prediction`, one for each input.
    """
    pairs = zip(inputs, predictions, strict=True)
    utilities = chooser([Candidates(text, each.texts, each.scores) for text, each in pairs])
    ordered = []
    for prediction, values in zip(predictions, utilities, strict=True):
        order = sorted(range(len(values)), key=lambda i: -values[i])
        fields = ("texts", "scores", "log_probabilities", "tokens", "details")
        lists = {name: getattr(prediction, name) for name in fields}
        lists = {name: [each[i] for i in order] for name, each in lists.items() if each}
        if order[0]:
            lists |= {"calls": [], "drafted_by": []}  # those of the text that was first
        ordered.append(prediction._replace(utilities=[values[i] for i in order], **lists))
    return ordered


def utility(metric: str, text: str, references: Sequence[str]) -> float:
    """A metric of one text, negative where less is better; the mean if it has several values.

    Args:
      metric: key of metrics.METRICS.
      text: the text.
      references: acceptable answers.
    """
    values = metrics.find_metric(metric)([text], [references])
    signs = [-1 if name in metrics.LESS_IS_BETTER else 1 for name in values]
    return metrics.mean_of(
        [sign * value for sign, value in zip(signs, values.values(), strict=True)]
    )


def measure_choice(
    metric: str, predictions: Sequence[Any], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Measures what a choice among the texts can gain, and how likelihood and quality go together.

    Args:
      metric: key of metrics.METRICS.
      predictions: `prediction.Prediction` with several texts, one for each input.
      references: acceptable answers of each.

    Returns:
      oracle/NAME, the metric of the best text of each input; candidates, different texts per input;
      spearman/METRIC, the mean rank correlation of log-probability and utility within an input
      (Freitag et al., 2022), over the inputs where both differ; absent where none does.
    """
    best, correlations, different = [], [], []
    for prediction, acceptable in zip(predictions, references, strict=True):
        unique = dict(zip(prediction.texts, prediction.log_probabilities, strict=True))
        utilities = [utility(metric, text, acceptable) for text in unique]
        best.append([*unique][int(np.argmax(utilities))])
        different.append(len(unique))
        correlation = rank_correlation(list(unique.values()), utilities)
        if correlation is not None:
            correlations.append(correlation)
    values = metrics.find_metric(metric)(best, references)
    report = {f"oracle/{name}": value for name, value in values.items()}
    if correlations:
        report[f"spearman/{metric}"] = metrics.mean_of(correlations)
    return report | {"candidates": metrics.mean_of(different)}


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None without differences."""
    ranks = np.array([mean_ranks(one), mean_ranks(other)])
    centered = ranks - ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((centered**2).sum(axis=1).prod())
    return float(centered.prod(axis=0).sum() / spread) if spread > 0 else None


def mean_ranks(values: Sequence[float]) -> np.ndarray:
    """Rank of each value, from 0; equal ones share the mean of their ranks."""
    array = np.asarray(values, float)
    below = (array[None, :] < array[:, None]).sum(axis=1)
    equal = (array[None, :] == array[:, None]).sum(axis=1)
    return below + (equal - 1) / 2


def preference_pair(
    input: str, texts: Sequence[str], utilities: Sequence[float]
) -> dict[str, str] | None:
    """The best and the worst text of an input, as preference tuning reads them; None if equal.

    Args:
      input: the input.
      texts: the texts.
      utilities: of each text, higher is better.
    """
    best, worst = int(np.argmax(utilities)), int(np.argmin(utilities))
    if utilities[best] == utilities[worst]:
        return None
    return {"prompt": input, "chosen": texts[best], "rejected": texts[worst]}
