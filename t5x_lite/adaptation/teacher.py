# SPDX-License-Identifier: Apache-2.0
"""A frozen decoder-only model of any checkpoint format, and its logits for distillation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite import config, model
from t5x_lite.adaptation import vocabulary_compatibility
from t5x_lite.batch import TeacherBatch
from t5x_lite.checkpoints import weights
from t5x_lite.checkpoints.opened_checkpoint import OpenedCheckpoint
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.decoding.request import check_row_lengths
from t5x_lite.model.attention import AttentionContext
from t5x_lite.sharding import spec
from t5x_lite.tokenizers.vocabulary import TextVocabulary


class Teacher(NamedTuple):
    """An opened checkpoint of a teacher, without its weights.

    Attributes:
      path: path of the checkpoint.
      model: its config.
      opened: the opened checkpoint.
      size: number of ids with logits of the teacher, 0..size - 1.
    """

    path: str
    model: config.Model
    opened: OpenedCheckpoint
    size: int

    def params(self) -> Any:
        """The weights on the mesh in force, in the dtype of computation.

        Raises:
          ValueError: the checkpoint is damaged, or does not match its config.
        """
        # Cast once here instead of at every use: half the memory, the same values.
        try:
            return weights.place_weights(self.opened.weights(), self.model, self.model.dtype)
        except ValueError as error:
            raise ValueError(f"Distillation.teacher: {error}") from error


def open_teacher(run: TrainingRun, vocabularies: tuple[TextVocabulary, TextVocabulary]) -> Teacher:
    """Opens the teacher of Run.distillation, whose vocabulary must agree with those of the run.

    Raises:
      ValueError: it is not a checkpoint, is not decoder-only, has too few positions for the rows
        of the run, or has another vocabulary; the message has the first difference.
    """
    assert run.distillation is not None
    path, top_k = run.distillation.teacher, run.distillation.top_k
    try:
        opened = open_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"Distillation.teacher: {error}") from error
    cfg = opened.model
    config.require(
        cfg.layout == "decoder_only",
        f"Distillation.teacher: {path} has an encoder; a teacher is decoder-only, as it has to "
        "predict the next token",
    )
    model.check_mesh(cfg)
    assert cfg.decoder is not None and opened.text is not None
    check_row_lengths(cfg, run.data.lengths, f"Distillation.teacher: {path}")
    teacher_vocabulary = opened.text.vocabularies[1]
    for run_vocabulary in vocabularies:
        check_vocabulary(path, teacher_vocabulary, run_vocabulary)
    check_mode(run, vocabularies[1], teacher_vocabulary.size)
    size = shared_vocabulary_size(cfg, teacher_vocabulary, run.model, vocabularies[1])
    config.require(
        (top_k or 1) <= size,
        f"Distillation.teacher knows {size} ids, fewer than top_k = {top_k}. Bind "
        "Distillation.top_k = None for the whole distribution",
    )
    return Teacher(path, cfg, opened, size)


def shared_vocabulary_size(
    teacher: config.Model,
    teacher_vocabulary: TextVocabulary,
    student: config.Model,
    run_vocabulary: TextVocabulary,
) -> int:
    """Number of ids that teacher and student share.

    Args:
      teacher: model of the teacher.
      teacher_vocabulary: its vocabulary.
      student: model of the run.
      run_vocabulary: vocabulary of the run's targets.

    Returns:
      With equal vocabularies the ids of both models, padding included.
    """
    if teacher_vocabulary.size == run_vocabulary.size:
        return min(teacher.vocab, student.vocab)
    # Ids that the run has added are padding in the teacher's model.
    return teacher_vocabulary.size


def check_vocabulary(
    path: str, teacher_vocabulary: TextVocabulary, run_vocabulary: TextVocabulary
) -> None:
    """Raises ValueError if an id stands for another text in the teacher's vocabulary.

    Args:
      path: path of the teacher.
      teacher_vocabulary: its vocabulary.
      run_vocabulary: vocabulary of the run's inputs or targets.
    """
    difference = vocabulary_compatibility.describe_difference(teacher_vocabulary, run_vocabulary)
    if difference is None and teacher_vocabulary.eos != run_vocabulary.eos:
        difference = (
            f"texts end with id {teacher_vocabulary.eos} there and {run_vocabulary.eos} here"
        )
    config.require(
        difference is None,
        f"Distillation.teacher ({path}) has another vocabulary than the run: {difference}. Both "
        'must read text alike: bind Data.vocabulary to one of Vocabulary.kind = "checkpoint", '
        f"Vocabulary.path = {path!r}",
    )


def check_mode(run: TrainingRun, run_vocabulary: TextVocabulary, size: int) -> None:
    """Raises ValueError if inputs begin with a mode whose ids the teacher lacks.

    Args:
      run: config of the run.
      run_vocabulary: vocabulary of the run's targets.
      size: number of ids of the teacher.
    """
    objective = run.data.objective
    for part in getattr(objective, "parts", (objective,)):
        mode = getattr(part, "mode", None)
        config.require(
            mode is None or max(run_vocabulary.encode(mode), default=0) < size,
            f"Run.distillation: the mode {mode!r} of {type(part).__name__} is an id that the "
            "teacher does not have. Leave out PrefixLM.mode, or train without a teacher",
        )


def compute_logits(
    teacher: Teacher, params: Any, teacher_data: TeacherBatch
) -> Float[Array, "b t v"]:
    """Computes the teacher's logits for every target.

    Args:
      teacher: the teacher.
      params: its weights.
      teacher_data: rows that it reads.

    Returns:
      float32, of the ids 0..Teacher.size - 1, without gradient.
    """
    transformer = model.Transformer(teacher.model)
    hidden = transformer.apply({"params": params}, teacher_data, method=hidden_states)
    chosen = jnp.take_along_axis(hidden, teacher_data.places[:, :, None], axis=1)
    logits = transformer.apply({"params": params}, chosen, method=model.Transformer.logits)
    replicated = jax.reshard(logits, spec("batch length whole"))
    return jax.lax.stop_gradient(replicated[:, :, : teacher.size])


def hidden_states(
    transformer: model.Transformer, teacher_data: TeacherBatch
) -> Float[Array, "b r d"]:
    """The decoder's output for every token of a teacher's batch."""
    inside = {"query_prefix": teacher_data.inside, "key_prefix": teacher_data.inside}
    mask = transformer.mask(teacher_data.segments, teacher_data.segments, causal=True, **inside)
    context = AttentionContext(teacher_data.positions, mask, backend=transformer.backend)
    return transformer.decoder(transformer.embed(teacher_data.tokens), context)
