# SPDX-License-Identifier: Apache-2.0
"""Texts to texts: tokenised, sorted into batches of like length, decoded, and put back in order."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config, decoding, sharding
from t5x_lite.data import tasks
from t5x_lite.data.vocabularies import Vocabulary, edges


class Prediction(NamedTuple):
    """What the model wrote for one input, best first, and what it thinks of each.

    scores are what the texts are ranked by: log_probabilities (in nats) over the length penalty.
    """

    texts: list[str]
    scores: list[float]
    log_probabilities: list[float]
    tokens: list[list[int]]


class Predictor:
    """Writes and scores texts with one set of weights.

    params are a model's own, as training has them. ended says whether an input ends with eos, as
    the source of an example does; the beginning of a text to be continued does not.
    """

    def __init__(
        self,
        cfg: config.Model,
        params: Any,
        vocabularies: tuple[Vocabulary, Vocabulary],
        *,
        ended: bool = True,
        batch_size: int = 64,
    ):
        self.cfg = cfg
        self.params = decoding.prepare(cfg, params)
        self.inputs, self.targets = vocabularies
        self.ended = ended
        self.batch_size = batch_size

    def predict(
        self,
        texts: Sequence[str],
        decode: config.Decode,
        *,
        rows: Sequence[int] | None = None,
        told: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """One Prediction for each text: `continued` from its ids."""
        return self.continued(self.read(texts), decode, rows=rows, told=told)

    def continued(
        self,
        ids: Sequence[Sequence[int]],
        decode: config.Decode,
        *,
        rows: Sequence[int] | None = None,
        told: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """One Prediction for each input, given as ids with their end.

        rows numbers the inputs for sampling (0, 1, ... otherwise): with the same number and seed
        a text is drawn the same in any company. told(count) hears how many are done so far.
        """
        rows = range(len(ids)) if rows is None else rows
        found: dict[int, Prediction] = {}
        for places in self.batches(ids):
            request = decoding.request(
                self.cfg,
                [ids[place] for place in places],
                decode,
                rows=[rows[place] for place in places],
                batch=self.rows(len(places)),
                eos=self.targets.stops,
            )
            result = decoding.generate(self.cfg, self.params, request, decode)
            for row, place in enumerate(places):
                found[place] = self.prediction(result, row)
            if told:
                told(len(found))
        return [found[place] for place in range(len(ids))]

    def score(
        self, inputs: Sequence[str], targets: Sequence[str]
    ) -> list[tuple[float, list[float]]]:
        """For each pair, the log-probability of the target and of its tokens, in nats."""
        ids, wanted = self.read(inputs), self.written(targets)
        found: dict[int, tuple[float, list[float]]] = {}
        for places in self.batches([[*a, *b] for a, b in zip(ids, wanted, strict=True)]):
            filled = [*places, *[places[0]] * (self.rows(len(places)) - len(places))]
            scores = decoding.score(
                self.cfg,
                self.params,
                [ids[place] for place in filled],
                [wanted[place] for place in filled],
            )
            for row, place in enumerate(places):
                tokens = scores.tokens[row, : scores.lengths[row]].tolist()
                found[place] = float(scores.log_probability[row]), tokens
        return [found[place] for place in range(len(ids))]

    def read(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each input."""
        start, end = edges(self.inputs)
        end = end if self.ended else []
        rows = [[*start, *map(int, ids), *end] for ids in self.inputs.encode_all(texts)]
        return [self.unbegun(row) for row in rows] if self.cfg.encoder is None else rows

    def unbegun(self, row: list[int]) -> list[int]:
        """row without the start that a chat template wrote: a lone decoder is given it anyway."""
        begun = self.cfg.starts_prompts and row[:1] == [self.cfg.start]
        return row[1:] if begun else row

    def written(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each target."""
        end = [self.targets.eos] if self.targets.ends else []
        return [[*map(int, ids), *end] for ids in self.targets.encode_all(texts)]

    def batches(self, ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Places of rows that share a batch: those of like length."""
        order = np.argsort([len(row) for row in ids], kind="stable")
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size].tolist()

    def rows(self, count: int) -> int:
        """A number of rows that the mesh can split, of few different ones."""
        shards = sharding.batch_shards()
        rows = min(decoding.bucket(count, 1), max(self.batch_size, count))
        return -(-rows // shards) * shards

    def prediction(self, result: decoding.Result, row: int) -> Prediction:
        tokens = [
            ids[:length].tolist()
            for ids, length in zip(result.tokens[row], result.lengths[row], strict=True)
        ]
        return Prediction(
            texts=[self.targets.decode(ids) for ids in tokens],
            scores=result.scores[row].tolist(),
            log_probabilities=result.log_probability[row].tolist(),
            tokens=tokens,
        )


def has_inputs(run: config.Run) -> bool:
    """Whether the run's examples have a source that ends, rather than text to be continued."""
    if run.data is None:
        return run.model.layout != "joined"
    task = run.data.task
    while isinstance(task, config.Mixture):
        task = task.tasks[0]
    if run.model.layout != "joined" or run.data.objective is not None:
        return True
    if isinstance(task, config.Files):
        return task.inputs is not None
    if task in tasks.BUILT_IN:
        return tasks.BUILT_IN[task].has_inputs
    return "inputs" in run.data.lengths
