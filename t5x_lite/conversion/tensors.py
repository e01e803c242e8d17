# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other makes, opened: their model as a config, their tensors, and their table."""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.conversion import huggingface, matching, renaming, sources, weights
from t5x_lite.conversion.huggingface import sentence_t5
from t5x_lite.conversion.matching import Plan
from t5x_lite.conversion.sources import Source, SourceError
from t5x_lite.conversion.tables import Entry
from t5x_lite.conversion.weights import Converted


class Tensors(NamedTuple):
    """A checkpoint of another make; no weight of it is read yet."""

    path: Path
    model: config.Model
    source: Source
    entries: Sequence[Entry]
    ignored: Sequence[str] = ()
    duplicates: Mapping[str, str] = {}

    def plan(self, allow: Sequence[str] = ()) -> Plan:
        """Where every weight comes from; what does not fit is in its problems."""
        return matching.plan(
            self.source.names,
            self.model,
            self.entries,
            ignored=self.ignored,
            duplicates=self.duplicates,
            allow=allow,
        )

    def weights(self, allow: Sequence[str] = ()) -> Converted:
        """Its weights as ours.

        Raises:
          MatchError: tensors are missing, left over or of another shape.
          SourceError: a tensor that repeats another one differs from it.
        """
        plan = self.plan(allow)
        plan.check(str(self.path))
        allowed = lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in allow)
        weights.check_duplicates(self.source, plan, self.duplicates, allowed)
        return Converted(self.source, self.model, plan, allowed, str(self.path))


class WithProjection:
    """A T5's tensors, and the projection of a Sentence-T5 that lies in a file of its own."""

    def __init__(self, source: Source, dense: Source):
        self.source, self.dense = source, dense
        if set(dense.names) != {"linear.weight"}:
            raise SourceError(
                f"2_Dense should have linear.weight alone; it has {list(dense.names)}"
            )
        self.names = source.names | {sentence_t5.PROJECTION: dense.names["linear.weight"]}

    def read(self, name: str) -> np.ndarray:
        if name == sentence_t5.PROJECTION:
            return self.dense.read("linear.weight")
        return self.source.read(name)


def of_folder(folder: str | Path) -> Tensors:
    """A Hugging Face folder: config.json and safetensors.

    Raises:
      ValueError: a file is missing or broken, or the model is none that can be expressed.
    """
    folder = Path(folder)
    source = sources.open(folder)
    said = sentence_t5.described(folder, read_json(folder / "config.json"))
    dense = sentence_t5.dense_file(folder)
    if dense is not None:
        source = WithProjection(source, sources.open(dense))
    with sources.naming(folder / "config.json", "the model"):
        family = huggingface.family_of(said)
        source = renaming.renamed(source, family)
        try:
            cfg = family.model(said, source.names.keys())
        except KeyError as error:
            raise SourceError(f"{folder / 'config.json'} has no field {error}") from error
    return Tensors(
        folder, cfg, source, family.entries(cfg), family.ignored(cfg), family.duplicates(cfg)
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(
            f"{path.parent} has no {path.name}, which says what its weights are: copy it from where"
            " they come from"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read: {sources.told(error)}") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path} should hold an object of JSON; it holds {type(found).__name__}")
    return found
