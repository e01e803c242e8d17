# SPDX-License-Identifier: Apache-2.0
"""Who drafts for a Predictor: made once by name, priced once per shape of batch; and the check that
its texts are those of plain decoding."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from t5x_lite import config, decoding
from t5x_lite.adaptation import agreement
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decoding import choosing, costs
from t5x_lite.decoding.widths import Adaptive
from t5x_lite.evaluation import records


class Drafters:
    """The drafters of one model, by how text is written."""

    def __init__(self, cfg: config.Model, params: Any, targets: Vocabulary):
        self.cfg, self.params, self.targets = cfg, params, targets
        self.made: dict[tuple, decoding.Drafting] = {}
        self.prices: dict[str, decoding.Drafting] = {}

    def of(self, decode: config.Decode) -> decoding.Drafting:
        """The drafter that decode names; an Adaptive one has no prices yet.

        Raises:
          ValueError: there is no such drafter, or it does not fit the model.
        """
        asked = (decode.decoder, decode.width, decode.accept, decode.beams > 1)
        if asked not in self.made:
            self.made[asked] = choosing.drafting(self.cfg, decode, self.load, self.texts)
        return self.made[asked]

    def ready(self, request: decoding.Request, decode: config.Decode) -> decoding.Drafting:
        """The drafter for this request, its widths priced."""
        drafting = self.of(decode)
        if not isinstance(drafting.drafter, Adaptive):
            return drafting
        given = (self.cfg, self.params, request, decode, drafting)
        name = costs.key(*given)
        if name not in self.prices:
            self.prices[name] = costs.priced(*given)
        return self.prices[name]

    def load(self, path: str) -> tuple[config.Model, Any]:
        """A draft model: its config, and its weights on the mesh in force.

        Raises:
          ValueError: it is no checkpoint, or one of another vocabulary.
        """
        from t5x_lite.training import restore

        shape = dict(jax.sharding.get_abstract_mesh().shape)
        restored = restore.restore(path, mesh=config.Mesh(**shape) if shape else None)
        pair = sorted((restored.vocabularies[1], self.targets), key=lambda each: each.size)
        if why := agreement.difference(*pair):
            raise ValueError(
                f"--decoder=draft:{path}: it writes another vocabulary than the model it is to "
                f"draft for: {why}"
            )
        return restored.run.model, decoding.prepare(restored.run.model, restored.params)

    def texts(self, path: str) -> list[list[int]]:
        """The texts of a file as the model would write them: `prediction` of what infer wrote
        (.jsonl), or lines.

        Raises:
          ValueError: there is no such file, or no text in it.
        """
        asked = f"--decoder=recycling:{path}"
        try:
            every = records.Source(path, path.endswith(".jsonl"), "prediction").records()
            known = [record.text for record in every if record.trouble is None]
        except OSError as error:
            raise ValueError(f"{asked} cannot be read: {error.strerror}") from None
        if not known:
            raise ValueError(
                f"{asked} has no text: give it lines, or the .jsonl that infer wrote, with a field "
                '"prediction"'
            )
        start = [self.cfg.start] if self.cfg.encoder else []
        end = [self.targets.eos] if self.targets.ends else []
        return [[*start, *map(int, row), *end] for row in self.targets.encode_all(known)]


class Difference(NamedTuple):
    """Where a drafted text first differs from the plain one, and by how many nats the model
    prefers its plain token there: about 0 is a tie that rounding decides."""

    place: int
    plain: int
    drafted: int
    gap: float


def difference(
    predictor: Any, ids: Sequence[int], plain: Sequence[int], drafted: Sequence[int]
) -> Difference | None:
    """The first difference of two texts written after the input `ids`; None where there is none."""
    pairs = zip([*plain, -1], [*drafted, -1], strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        return None
    both = [list(text[: place + 1]) for text in (plain, drafted)]
    if min(map(len, both)) <= place:
        return Difference(place, *([*text, -1][place] for text in both), float("nan"))
    rows = predictor.rows(2)
    filled = both + both[-1:] * (rows - 2)
    scores = decoding.score(predictor.cfg, predictor.params, [ids] * rows, filled)
    gap = float(scores.tokens[0, place] - scores.tokens[1, place])
    return Difference(place, plain[place], drafted[place], gap)


def differences(
    predictor: Any,
    ids: Sequence[Sequence[int]],
    decode: config.Decode,
    rows: Sequence[int],
    found: Sequence[Any],
) -> list[Difference | None]:
    """For each prediction found, what plain decoding of the same request would change."""
    told = dataclasses.replace(decode, decoder="plain", accept="exact", width=0)
    plain = predictor.continued(ids, told, rows=rows, counted=False)
    pairs = zip(ids, plain, found, strict=True)
    return [difference(predictor, row, a.tokens[0], b.tokens[0]) for row, a, b in pairs]
