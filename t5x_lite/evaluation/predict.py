# SPDX-License-Identifier: Apache-2.0
"""Prediction of texts: tokenized, sorted into batches of like length, decoded, back in order."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from t5x_lite import config, decoding, sharding
from t5x_lite.config.canvas import check_canvas_decode
from t5x_lite.data import built_in
from t5x_lite.decoding import generation
from t5x_lite.decoding.acceptance.stats import AcceptanceStats
from t5x_lite.decoding.request import (
    check_examples,
    check_positions,
    count_samples,
    describe_excess,
    describe_ids,
)
from t5x_lite.decoding.scoring import check_pairs
from t5x_lite.evaluation import choosing
from t5x_lite.evaluation.companions import CompanionCache, companion_texts
from t5x_lite.evaluation.coverage import CoverageScore
from t5x_lite.evaluation.drafting import DrafterCache
from t5x_lite.evaluation.prediction import (
    Prediction,
    TargetScore,
    drafter_names,
    make_prediction,
    naming_longest,
)
from t5x_lite.evaluation.search import list_sources, search_texts
from t5x_lite.evaluation.steered_rows import SteeredRows
from t5x_lite.model.computation import params_for_compute
from t5x_lite.tokenizers.vocabularies import encode_texts
from t5x_lite.tokenizers.vocabulary import TextVocabulary


class Predictor:
    """Writes and scores texts with one set of weights.

    Attributes:
      cfg: config of the model.
      params: weights, prepared for decoding.
      inputs: vocabulary of inputs.
      targets: vocabulary of targets.
      drafters: drafters of the model.
      companions: companions of the model.
      tally: acceptance of drafts so far.
      ended: true if an input ends with eos, as the source of an example does; the beginning of a
        text to be continued does not.
      batch_size: most inputs of a batch.
      compute: Decode.compute of the weights.
    """

    def __init__(
        self,
        cfg: config.Model,
        params: Any,
        vocabularies: tuple[TextVocabulary, TextVocabulary],
        *,
        ended: bool = True,
        batch_size: int = 64,
    ):
        self.cfg = cfg
        self.params = decoding.prepare_params(cfg, params)
        self.inputs, self.targets = vocabularies
        self.drafters = DrafterCache(cfg, self.targets)
        self.companions = CompanionCache(cfg, self.drafters.load_model)
        self.tally = AcceptanceStats()
        self.ended = ended
        self.batch_size = batch_size
        self.choosers: dict[tuple[str, str], choosing.Chooser] = {}
        self.compute = "auto"
        # Predictors of the same weights by Decode.compute; they share the dict.
        self.computing: dict[str, Predictor] = {self.compute: self}

    def with_params(self, params: Any) -> "Predictor":
        """Returns a predictor like this one with other weights, prepared for decoding."""
        other = copy.copy(self)
        other.params, other.tally, other.choosers = params, AcceptanceStats(), {}
        other.drafters = DrafterCache(self.cfg, self.targets)
        other.drafters.tiered.at_once = self.drafters.tiered.at_once
        other.companions = CompanionCache(self.cfg, other.drafters.load_model)
        other.computing = {other.compute: other}
        return other

    def for_compute(self, compute: str) -> "Predictor":
        """Returns the predictor of the same weights that computes as Decode.compute says."""
        if compute not in self.computing:
            origin = self.computing["auto"]
            params = params_for_compute(self.cfg, origin.params, compute)
            other = origin.with_params(params)
            other.compute, other.computing = compute, self.computing
            other.tally, other.choosers = origin.tally, origin.choosers
            self.computing[compute] = other
        return self.computing[compute]

    def with_config(self, cfg: config.Model) -> "Predictor":
        """Returns a predictor like this one whose model has another config of the same weights."""
        other = copy.copy(self)
        other.cfg, other.drafters = cfg, DrafterCache(cfg, self.targets)
        other.companions = CompanionCache(cfg, other.drafters.load_model)
        other.computing = {other.compute: other}
        return other

    def predict(
        self,
        texts: Sequence[str],
        decode: config.Decode,
        *,
        rows: Sequence[int] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """Predicts one Prediction for each text.

        Args:
          texts: inputs.
          decode: config of decoding.
          rows: numbers of the inputs, see `predict_ids`.
          on_progress: called with the number of texts done.
        """
        self.find_chooser(decode)  # whatever is wrong with it is said before the work
        ids = self.encode_inputs(texts)
        predictions = self.predict_ids(ids, decode, texts=texts, rows=rows, on_progress=on_progress)
        return self.order_texts(texts, predictions, decode)

    def order_texts(
        self, inputs: Sequence[str], predictions: list[Prediction], decode: config.Decode
    ) -> list[Prediction]:
        """Puts the texts of each prediction in the order of Decode.choose.

        Args:
          inputs: text of each input.
          predictions: one for each input.
          decode: config of decoding.
        """
        chooser = self.find_chooser(decode)
        if chooser is None or not predictions:
            return predictions
        return choosing.order_predictions(chooser, inputs, predictions)

    def find_chooser(self, decode: config.Decode, field: str = "choose") -> choosing.Chooser | None:
        """The chooser that decode names, made once; None for the order of the texts.

        Args:
          decode: config of decoding.
          field: of decode that names it: choose or judge.

        Raises:
          ValueError: there is no such metric, checkpoint or function.
        """
        key = field, getattr(decode, field)
        if key[1] and key not in self.choosers:
            kind, _, argument = key[1].partition(":")
            self.choosers[key] = (
                CoverageScore(self, float(argument))
                if kind == "coverage"
                else choosing.make_chooser(key[1], self.load_scorer, field)
            )
        return self.choosers.get(key)

    def load_scorer(self, path: str) -> Callable[[list[str], list[str]], list[float]]:
        """Loads another checkpoint: its log-probabilities of targets after inputs."""
        from t5x_lite.checkpoints.opening import open_checkpoint

        shape = dict(jax.sharding.get_abstract_mesh().shape)
        restored = open_checkpoint(path).load(config.Mesh(**shape) if shape else None)
        other = Predictor(
            restored.run.model,
            restored.params,
            restored.vocabularies,
            ended=has_inputs(restored.run),
            batch_size=self.batch_size,
        )
        return lambda inputs, targets: [total for total, _ in other.score(inputs, targets)]

    def predict_ids(
        self,
        ids: Sequence[Sequence[int]],
        decode: config.Decode,
        *,
        texts: Sequence[str] | None = None,
        rows: Sequence[int] | None = None,
        on_progress: Callable[[int], None] | None = None,
        counted: bool = True,
    ) -> list[Prediction]:
        """Predicts one Prediction for each input.

        Args:
          ids: ids of each input, with their end.
          decode: config of decoding.
          texts: the inputs, for a companion or the judge of a search; None to decode their ids.
          rows: numbers of the inputs for sampling, 0, 1, ... by default; see `make_request`.
          on_progress: called with the number of inputs done.
          counted: false to leave `tally` as it is.
        """
        if decode.compute != self.compute:
            return self.for_compute(decode.compute).predict_ids(
                ids, decode, texts=texts, rows=rows, on_progress=on_progress, counted=counted
            )
        self.check_inputs(ids, decode)
        rows = range(len(ids)) if rows is None else rows
        if decode.search:
            sources = list_sources(texts or map(self.inputs.decode, ids), ids, rows)
            return search_texts(self, sources, decode, on_progress)
        steered = SteeredRows(self.cfg, (self.inputs, self.targets), ids, decode)
        prompts, decode = self.companion_inputs(decode, texts, ids), steered.decode
        most, predictions = max(self.batch_size // count_samples(decode), 1), {}
        for places in self.batches(steered.ids, most):
            numbers = [rows[place] for place in places]
            request = steered.request(places, self.padded_rows(len(places)), numbers)
            request = self.companions.attach(request, decode, self.params, prompts, places)
            names = drafter_names(self.drafters.get(decode))
            lengths = [len(steered.ids[place]) for place in places]
            with naming_longest(lengths, decode, numbers):
                result = self.drafters.generate(self.params, request, decode)
            if counted:
                self.tally.add(result, names, len(places))
            for row, place in enumerate(places):
                write_text = functools.partial(steered.write_text, place)
                predictions[place] = make_prediction(result, row, names, write_text, self.targets)
            if on_progress:
                on_progress(len(predictions))
        return [predictions[place] for place in range(len(ids))]

    def check_inputs(self, ids: Sequence[Sequence[int]], decode: config.Decode) -> None:
        """Raises ValueError for inputs that the model cannot continue.

        Called before they are sorted: messages number the inputs as the caller does.
        """
        check_canvas_decode(self.cfg, decode)
        if len(ids):
            check_examples(self.cfg, ids)
            check_positions(self.cfg, "Input", ids, decode.max_new_tokens)

    def score(
        self, inputs: Sequence[str], targets: Sequence[str]
    ) -> list[tuple[float, list[float]]]:
        """Log-probability of each target given its input, and of its tokens, in nats."""
        scored = self.score_ids(self.encode_inputs(inputs), self.encode_targets(targets))
        return [(each.log_probability, each.tokens) for each in scored]

    def score_ids(
        self,
        ids: Sequence[Sequence[int]],
        target_ids: Sequence[Sequence[int]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[TargetScore]:
        """Scores each target given its input, batched by length.

        Args:
          ids: ids of each input.
          target_ids: ids of each target.
          on_progress: called with the number of pairs done.

        Raises:
          ValueError: the model cannot read a pair.
        """
        if ids:
            check_pairs(self.cfg, ids, target_ids)
        scored: dict[int, TargetScore] = {}
        for places in self.batches([[*a, *b] for a, b in zip(ids, target_ids, strict=True)]):
            filled = [*places, *[places[0]] * (self.padded_rows(len(places)) - len(places))]
            scores = decoding.score(
                self.cfg,
                self.params,
                [ids[place] for place in filled],
                [target_ids[place] for place in filled],
            )
            for row, place in enumerate(places):
                tokens = scores.tokens[row, : scores.lengths[row]].tolist()
                total, greedy = float(scores.log_probability[row]), bool(scores.greedy[row])
                scored[place] = TargetScore(total, tokens, greedy)
            if on_progress:
                on_progress(len(scored))
        return [scored[place] for place in range(len(ids))]

    def describe_trouble(self, text: str, new_tokens: int = 1, target: str | None = None) -> str:
        """The reason why the model cannot read a text; "" where it can.

        Its vocabulary lacks something in it, an id is outside of the model's, there is no token, or
        it takes more positions than the model has learned.

        Args:
          text: an input.
          new_tokens: tokens that are written after it; 1 where it is only read.
          target: text to be scored after it, in place of `new_tokens`.
        """
        try:
            ids = self.encode_inputs([text])[0]
            if target is not None:
                target_ids = self.encode_targets([target])[0]
                new_tokens = len(target_ids)
                if reason := describe_ids(self.cfg, target_ids):
                    return f"the target {reason}"
        except ValueError as error:
            return str(error)
        return describe_ids(self.cfg, ids, empty=self.cfg.encoder is None) or describe_excess(
            self.cfg, ids, new_tokens
        )

    def encode_inputs(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each input."""
        rows = [ids.tolist() for ids in encode_texts(self.inputs, texts, self.ended)]
        return [self.without_start(row) for row in rows] if self.cfg.encoder is None else rows

    def without_start(self, row: list[int]) -> list[int]:
        """row without the start that a chat template wrote: a decoder-only model adds it itself."""
        begun = self.cfg.add_bos and row[:1] == [self.cfg.decoder_start_token_id]
        return row[1:] if begun else row

    def companion_inputs(
        self, decode: config.Decode, texts: Sequence[str] | None, ids: Sequence[Sequence[int]]
    ) -> list[list[int]] | None:
        """The ids of what a companion reads for each input; None for what the model reads.

        Args:
          decode: config of decoding.
          texts: inputs of the model; None to decode their ids.
          ids: their ids.

        Raises:
          ValueError: the companion does not fit the model, or cannot read an input.
        """
        if self.companions.get(decode, self.params) is None:
            return None
        others = companion_texts(decode, texts or [self.inputs.decode(row) for row in ids])
        read = None if others is None else self.encode_inputs(others)
        self.companions.check(decode, ids if read is None else read)
        return read

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each target."""
        return [ids.tolist() for ids in encode_texts(self.targets, texts)]

    def batches(self, ids: Sequence[Sequence[int]], most: int | None = None) -> Iterator[list[int]]:
        """Yields indices of inputs that share a batch: those of like length.

        A batch ends at `most` inputs (batch_size if None), or before one that is so long that more
        than half of the batch would be padding: every input is padded to the longest.
        """
        most = self.batch_size if most is None else most
        batch: list[int] = []
        tokens = 0
        for place in np.argsort([len(row) for row in ids], kind="stable").tolist():
            padded = decoding.bucket_length(len(ids[place]))
            tokens += padded
            if batch and (len(batch) == most or (len(batch) + 1) * padded > 2 * tokens):
                yield batch
                batch, tokens = [], padded
            batch.append(place)
        if batch:
            yield batch

    def padded_batches(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Any]]:
        """Yields indices of a batch's inputs, and their ids [b t] and lengths [b] on the mesh.

        Rows after those of the indices repeat the first one.
        """
        for places in self.batches(ids):
            rows = [ids[place] for place in places]
            rows += [rows[0]] * (self.padded_rows(len(places)) - len(places))
            padded = decoding.pad_rows(rows, decoding.bucket_length(max(map(len, rows))))
            yield places, generation.shard_rows(padded)

    def padded_rows(self, count: int) -> int:
        """Number of rows to pad `count` to: one that the mesh can split, of few different ones."""
        shards = sharding.batch_shards()
        rows = min(decoding.bucket_length(count, 1), max(self.batch_size, count))
        return -(-rows // shards) * shards


def has_inputs(run: config.Run) -> bool:
    """True if the run's examples have inputs that end, false for text to be continued."""
    if run.model.readout is not None:
        return True
    if run.data is None:
        return run.model.layout != "decoder_only"
    task = run.data.task
    while isinstance(task, config.Mixture):
        task = task.tasks[0]
    if run.model.layout != "decoder_only" or run.data.objective is not None:
        return True
    if isinstance(task, config.TextSource):
        return task.inputs is not None
    if task in built_in.BUILT_IN:
        return built_in.BUILT_IN[task].has_inputs
    return "inputs" in run.data.lengths
