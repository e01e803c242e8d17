# SPDX-License-Identifier: Apache-2.0
"""What one training or scoring step reads, in the three layouts of `config.Model.layout`."""

from typing import Any, NamedTuple


class Lesson(NamedTuple):
    """What a decoder-only teacher reads of a batch: each row's texts, inputs before targets.

    tokens [b r] are the decoder's own inputs, the teacher's start before a text where it has one.
    The token at places[b, i] of a row is read last before targets[b, i]; known [b t] is false where
    nothing is read before, and for padding. inside [b r] is true for the tokens of the inputs,
    which a teacher with Model.prefix_lm reads in both directions; None for all others.
    """

    tokens: Any
    segments: Any
    positions: Any
    places: Any
    known: Any
    inside: Any = None


class Answers(NamedTuple):
    """What a teacher answered: its most probable ids [b t k], the logarithms of their probabilities
    and of that of all other ids together [b t k + 1], and known [b t] as in Lesson."""

    ids: Any
    log_probabilities: Any
    known: Any


class Batch(NamedTuple):
    """Rows of packed examples; numpy on the host, jax arrays on the mesh.

    Segments number the examples of a row from 1; 0 is padding. Positions count from 0 in each
    example. Loss weights are 1 where a target is to be predicted and 0 elsewhere.

    pair      inputs [b s] for the encoder, targets [b t] for the decoder.
    joined    a decoder alone: inputs and targets one after the other in targets [b t];
              prefix [b t] is true where the token belongs to the inputs; inputs are None.
    aligned   an encoder alone: targets[b, i] is to be predicted at inputs[b, i].

    The decoder's own inputs are not stored: they are the targets one place later within each
    segment, beginning with Model.start. `lesson` is there if the run has a teacher.
    """

    targets: Any
    target_segments: Any
    target_positions: Any
    loss_weights: Any
    inputs: Any = None
    input_segments: Any = None
    input_positions: Any = None
    prefix: Any = None
    lesson: Lesson | Answers | None = None
