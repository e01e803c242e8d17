# SPDX-License-Identifier: Apache-2.0
"""A frozen decoder-only model of any make, and what it thinks the next token is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite import config, model
from t5x_lite.adaptation import agreement
from t5x_lite.batch import Lesson
from t5x_lite.conversion import origins, weights
from t5x_lite.conversion.origins import Origin
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.model.attention import View
from t5x_lite.sharding import spec


class Teacher(NamedTuple):
    """An opened checkpoint: what it is, without its weights. `size` ids are taught, 0..size - 1."""

    path: str
    model: config.Model
    origin: Origin
    size: int

    def params(self) -> Any:
        """The weights on the mesh in force, in the dtype that they are used in.

        Raises:
          ValueError: the checkpoint is damaged or not of its model.
        """
        # Cast once here instead of at every use: half the memory, the same values.
        try:
            return weights.load(self.origin.weights(()), self.model, self.model.activations)
        except ValueError as error:
            raise ValueError(f"Distillation.teacher: {error}") from error


def open_teacher(run: config.Run, vocabularies: tuple[Vocabulary, Vocabulary]) -> Teacher:
    """The teacher of Run.distillation, whose vocabulary agrees with those of the run.

    Raises:
      ValueError: nothing that is read lies there, it is no decoder alone, cannot read rows as long
        as the run's, or has another vocabulary; the first difference is told.
    """
    path = run.distillation.teacher
    try:
        origin = origins.open(path, origins.Asked())
    except ValueError as error:
        raise ValueError(f"Distillation.teacher: {error}") from error
    cfg = origin.model
    config.require(
        cfg.layout == "joined",
        f"Distillation.teacher: {path} has an encoder; a teacher is decoder-only, as it has to say "
        "what comes next",
    )
    model.check_mesh(cfg)
    longest = sum(run.data.lengths.values())
    config.require(
        cfg.decoder.positions != "learned" or longest <= cfg.decoder.max_length,
        f"Distillation.teacher: {path} has {cfg.decoder.max_length} positions, but Data.lengths "
        f"{run.data.lengths} make texts of {longest}",
    )
    taught = origin.text.pair[1]
    for own in vocabularies:
        check_vocabulary(path, taught, own)
    check_mode(run, vocabularies[1], taught.size)
    size = taught_size(cfg, taught, run.model, vocabularies[1])
    config.require(
        (run.distillation.top_k or 1) <= size,
        f"Distillation.teacher knows {size} ids, fewer than top_k = {run.distillation.top_k}. Bind "
        "Distillation.top_k = None for the whole distribution",
    )
    return Teacher(path, cfg, origin, size)


def taught_size(
    teacher: config.Model, taught: Vocabulary, student: config.Model, own: Vocabulary
) -> int:
    """How many ids both have: of equal vocabularies those of the models, padding included."""
    if taught.size == own.size:
        return min(teacher.vocab, student.vocab)
    # Ids that the run has added stand where the teacher's model has padding.
    return taught.size


def check_vocabulary(path: str, taught: Vocabulary, own: Vocabulary) -> None:
    """Raises ValueError where the teacher means another text by an id that the run has too."""
    told = agreement.difference(taught, own)
    if told is None and taught.eos != own.eos:
        told = f"texts end with id {taught.eos} there and {own.eos} here"
    config.require(
        told is None,
        f"Distillation.teacher ({path}) has another vocabulary than the run: {told}. Both must "
        'read text alike: bind Data.vocabulary to one of Vocabulary.kind = "checkpoint", '
        f"Vocabulary.path = {path!r}",
    )


def check_mode(run: config.Run, own: Vocabulary, size: int) -> None:
    """Raises ValueError where inputs would begin with ids that the teacher never saw."""
    objective = run.data.objective
    for part in getattr(objective, "parts", (objective,)):
        mode = getattr(part, "mode", None)
        config.require(
            mode is None or max(own.encode(mode), default=0) < size,
            f"Run.distillation: the mode {mode!r} of {type(part).__name__} is an id that the "
            "teacher does not have. Leave out PrefixLM.mode, or train without a teacher",
        )


def logits(teacher: Teacher, params: Any, lesson: Lesson) -> Float[Array, "b t v"]:
    """The teacher's float32 logits for every target, of the ids that it teaches."""
    transformer = model.Transformer(teacher.model)
    hidden = transformer.apply({"params": params}, lesson, method=read)
    chosen = jnp.take_along_axis(hidden, lesson.places[:, :, None], axis=1)
    found = transformer.apply({"params": params}, chosen, method="logits")
    whole = jax.reshard(found, spec("batch length whole"))
    return jax.lax.stop_gradient(whole[:, :, : teacher.size])


def read(transformer: model.Transformer, lesson: Lesson) -> Float[Array, "b r d"]:
    """What the decoder makes of every token of a lesson."""
    inside = {"query_prefix": lesson.inside, "key_prefix": lesson.inside}
    sight = transformer.sight(lesson.segments, lesson.segments, causal=True, **inside)
    view = View(lesson.positions, sight, how=transformer.how)
    return transformer.decoder(transformer.embed(lesson.tokens), view)
