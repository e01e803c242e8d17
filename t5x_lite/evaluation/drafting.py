# SPDX-License-Identifier: Apache-2.0
"""Drafters of a Predictor, built once per name, decoding with them, and the check that drafted
texts are those of plain decoding.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from t5x_lite import config, decoding
from t5x_lite.adaptation import vocabulary_compatibility
from t5x_lite.cli import records
from t5x_lite.decoding import streaming
from t5x_lite.decoding.adaptive.drafter import Adaptive
from t5x_lite.decoding.adaptive.tiers import TieredDecoder
from t5x_lite.decoding.canvas.writing import fill_canvas
from t5x_lite.decoding.drafters import registry
from t5x_lite.decoding.request import check_positions
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import parse_path


class DrafterCache:
    """Drafters of one model, by the fields of config.Decode that choose them; decodes with them.

    Attributes:
      cfg: config of the model.
      targets: vocabulary of targets; None for drafters that read no text.
      tiered: decodes with the drafters whose draft length is measured.
    """

    def __init__(self, cfg: config.Model, targets: TextVocabulary):
        self.cfg, self.targets = cfg, targets
        self.drafters: dict[tuple, decoding.Drafting] = {}
        self.models: dict[str, tuple[config.Model, Any]] = {}
        self.tiered = TieredDecoder(cfg, report_wait)
        self.announced: set[tuple] = set()

    def get(self, decode: config.Decode) -> decoding.Drafting:
        """Returns the drafter that decode names; an Adaptive one has no prices.

        Raises:
          ValueError: there is no such drafter, or it does not fit the model.
        """
        key = (decode.drafter, decode.draft_length, decode.accept, decode.beams > 1)
        if key not in self.drafters:
            self.drafters[key] = registry.make_drafting(
                self.cfg, decode, self.load_draft_model, self.load_texts
            )
        return self.drafters[key]

    def generate(
        self, params: Any, request: decoding.Request, decode: config.Decode
    ) -> decoding.Result:
        """Decodes a request with the drafter that decode names.

        Args:
          params: weights, prepared for decoding.
          request: the rows.
          decode: config of decoding.
        """
        if self.cfg.canvas is not None:
            return fill_canvas(self.cfg, params, request, decode)
        drafting = self.get(decode)
        self.check_draft_models(request, decode)
        self.announce(request, decode)
        if not isinstance(drafting.drafter, Adaptive):
            return decoding.generate(self.cfg, params, request, decode, drafting)
        *_, result = self.tiered.stream(params, request, decode, drafting)
        return result

    def stream(
        self, params: Any, request: decoding.Request, decode: config.Decode, every: int
    ) -> Iterator[decoding.Result]:
        """Yields the growing result of `generate`.

        Args:
          params: weights, prepared for decoding.
          request: the rows.
          decode: config of decoding.
          every: number of forward passes between two results.

        Raises:
          ValueError: decode has beams, or `every` is below 1.
        """
        streaming.check_stream(decode, every)
        drafting = self.get(decode)
        self.check_draft_models(request, decode)
        self.announce(request, decode)
        if not isinstance(drafting.drafter, Adaptive):
            return decoding.stream(self.cfg, params, request, decode, drafting, every)
        return self.tiered.stream(params, request, decode, drafting, every)

    @contextlib.contextmanager
    def at_once(self) -> Generator[None]:
        """Drafts from the first step on for a while, for those who look at the drafts."""
        before, self.tiered.at_once = self.tiered.at_once, True
        try:
            yield
        finally:
            self.tiered.at_once = before

    def announce(self, request: decoding.Request, decode: config.Decode) -> None:
        """Reports once for each shape of a large model that its programs are compiled now."""
        read = request.prompts if request.inputs is None else request.inputs
        length = decoding.bucket_length(decode.max_new_tokens)
        shape = (*read.shape, length, decode.beams, decode.temperature > 0)
        large = registry.count_decoder_weights(self.cfg) >= registry.MIN_ADAPTIVE_WEIGHTS
        if large and shape not in self.announced:
            self.announced.add(shape)
            report_wait(
                f"compiling or loading programs for {read.shape[0]} x {read.shape[1]} tokens in, "
                f"{length} out"
            )

    def check_draft_models(self, request: decoding.Request, decode: config.Decode) -> None:
        """Raises ValueError where a draft model has too few learned positions for a request."""
        lengths = request.inputs_length
        if lengths is None:
            # Without the start, which a draft model adds itself.
            lengths = request.prompts_length - self.cfg.add_bos
        for part in decode.drafter.split("+"):
            path = part.removeprefix("draft:")
            if path != part and path in self.models:
                cfg, _ = self.models[path]
                source = range(int(max(lengths)))
                check_positions(cfg, f"--drafter={part}: input", [source], decode.max_new_tokens)

    def load_draft_model(self, path: str) -> tuple[config.Model, Any]:
        """Loads a draft model: its config, and its weights on the mesh in force.

        Raises:
          ValueError: it is not a checkpoint, or one of another vocabulary.
        """
        return self.load_model(path, f"drafter=draft:{path}")

    def load_model(self, path: str, owner: str) -> tuple[config.Model, Any]:
        """Loads another checkpoint of the same vocabulary, once: config, and weights on the mesh.

        Args:
          path: the checkpoint.
          owner: option that names it, for messages.

        Raises:
          ValueError: it is not a checkpoint, or one of another vocabulary.
        """
        if path in self.models:
            return self.models[path]
        from t5x_lite.checkpoints.opening import open_checkpoint

        shape = dict(jax.sharding.get_abstract_mesh().shape)
        restored = open_checkpoint(path).load(config.Mesh(**shape) if shape else None)
        pair = sorted((restored.vocabularies[1], self.targets), key=lambda each: each.size)
        if why := vocabulary_compatibility.describe_difference(*pair):
            raise ValueError(f"{owner}: it writes another vocabulary than the model: {why}")
        cfg = restored.run.model
        self.models[path] = cfg, decoding.prepare_params(cfg, restored.params)
        return self.models[path]

    def load_texts(self, path: str) -> list[list[int]]:
        """Loads ids of the texts of a file, as the model would write them: lines, or the field
        `prediction` of a .jsonl that infer wrote.

        Raises:
          ValueError: there is no such file, or no text in it.
        """
        option = f"drafter=recycling:{path}"
        try:
            file = str(parse_path(path))
            every = records.Source(file, records.is_json_lines(path), "prediction").records()
            known = [not_none(record.text) for record in every if record.trouble is None]
        except OSError as error:
            raise ValueError(f"{option} cannot be read: {error.strerror}") from None
        if not known:
            raise ValueError(
                f"{option} has no text: give it lines, or the .jsonl that infer wrote, with a "
                'field "prediction"'
            )
        start = [self.cfg.decoder_start_token_id] if self.cfg.encoder else []
        end = [self.targets.eos] if self.targets.ends else []
        return [[*start, *map(int, row), *end] for row in self.targets.encode_all(known)]


def report_wait(what: str) -> None:
    """Prints a line on stderr about what is waited for."""
    print(f"t5x_lite: {what}", file=sys.stderr, flush=True)


class DraftDifference(NamedTuple):
    """First difference of a drafted text from the plain one.

    Attributes:
      place: number of the token, from 0.
      plain: id of the plain text, -1 if it ends.
      drafted: id of the drafted text, -1 if it ends.
      gap: nats by which the model prefers the plain token: about 0 is a tie that rounding decides;
        NaN if a text ends.
    """

    place: int
    plain: int
    drafted: int
    gap: float


def first_difference(
    predictor: Any, ids: Sequence[int], plain: Sequence[int], drafted: Sequence[int]
) -> DraftDifference | None:
    """First difference of two texts; None if they are the same.

    Args:
      predictor: the model.
      ids: ids of the input.
      plain: ids written by plain decoding.
      drafted: ids written with a drafter.
    """
    pairs = zip([*plain, -1], [*drafted, -1], strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        return None
    both = [list(text[: place + 1]) for text in (plain, drafted)]
    if min(map(len, both)) <= place:
        return DraftDifference(place, *([*text, -1][place] for text in both), float("nan"))
    rows = predictor.padded_rows(2)
    filled = both + both[-1:] * (rows - 2)
    scores = decoding.score(predictor.cfg, predictor.params, [ids] * rows, filled)
    gap = float(scores.tokens[0, place] - scores.tokens[1, place])
    return DraftDifference(place, plain[place], drafted[place], gap)


def differences_from_plain(
    predictor: Any,
    ids: Sequence[Sequence[int]],
    decode: config.Decode,
    rows: Sequence[int],
    predictions: Sequence[Any],
) -> list[DraftDifference | None]:
    """Differences of predictions from plain decoding of the same requests.

    Args:
      predictor: the model.
      ids: ids of each input.
      decode: config of decoding.
      rows: numbers of the inputs.
      predictions: one for each input.
    """
    plain_decode = dataclasses.replace(decode, drafter="plain", accept="exact", draft_length=0)
    plain = predictor.predict_ids(ids, plain_decode, rows=rows, counted=False)
    pairs = zip(ids, plain, predictions, strict=True)
    return [first_difference(predictor, row, a.tokens[0], b.tokens[0]) for row, a, b in pairs]
