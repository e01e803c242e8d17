# SPDX-License-Identifier: Apache-2.0
"""Texts to texts: tokenised, sorted into batches of like length, decoded, and put back in order."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config, decoding, sharding
from t5x_lite.data import tasks
from t5x_lite.data.vocabularies import Vocabulary, edges
from t5x_lite.decoding.drafters.union import sources
from t5x_lite.decoding.tally import Tally
from t5x_lite.decoding.widths import Adaptive
from t5x_lite.evaluation.drafting import Drafters


class Prediction(NamedTuple):
    """What the model wrote for one input, best first, and what it thinks of each.

    scores are what the texts are ranked by: log_probabilities (in nats) over the length penalty.
    Of the best text, calls says in which forward pass each token was written, and guessed by whom
    it had been guessed ("model": nobody); both are empty after beam search.
    """

    texts: list[str]
    scores: list[float]
    log_probabilities: list[float]
    tokens: list[list[int]]
    calls: list[int]
    guessed: list[str]


class Predictor:
    """Writes and scores texts with one set of weights.

    params are a model's own, as training has them. ended says whether an input ends with eos, as
    the source of an example does; the beginning of a text to be continued does not. tally counts
    what drafting was worth.
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
        self.drafters = Drafters(cfg, self.params, self.targets)
        self.tally = Tally()
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
        counted: bool = True,
    ) -> list[Prediction]:
        """One Prediction for each input, given as ids with their end.

        rows numbers the inputs for sampling (0, 1, ... otherwise): with the same number and seed
        a text is drawn the same in any company. told(count) hears how many are done so far. What
        is not counted leaves tally as it is.
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
            drafting = self.drafters.ready(request, decode)
            result = decoding.generate(self.cfg, self.params, request, decode, drafting)
            names = guessers(drafting)
            if counted:
                self.tally.add(result, names, len(places))
            for row, place in enumerate(places):
                found[place] = self.prediction(result, row, names)
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

    def prediction(self, result: decoding.Result, row: int, names: tuple[str, ...]) -> Prediction:
        """Row `row` of a result; names[i] is who guesses node i of a block."""
        tokens = [
            ids[:length].tolist()
            for ids, length in zip(result.tokens[row], result.lengths[row], strict=True)
        ]
        return Prediction(
            texts=[self.targets.decode(ids) for ids in tokens],
            scores=result.scores[row].tolist(),
            log_probabilities=result.log_probability[row].tolist(),
            tokens=tokens,
            calls=[] if result.call is None else result.call[row, 0, : len(tokens[0])].tolist(),
            guessed=[]
            if result.node is None
            else [names[node] for node in result.node[row, 0, : len(tokens[0])]],
        )


def guessers(drafting: decoding.Drafting) -> tuple[str, ...]:
    """Who guesses each node of a block; "model" for the root."""
    drafter = drafting.drafter
    return sources(drafter.drafter if isinstance(drafter, Adaptive) else drafter)


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
