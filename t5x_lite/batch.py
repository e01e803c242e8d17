# SPDX-License-Identifier: Apache-2.0
"""Input of a training or scoring step, in the three layouts of `config.Model.layout`."""

from typing import Any, NamedTuple


class TeacherBatch(NamedTuple):
    """Input of a decoder-only teacher: the texts of each row, inputs before targets.

    Attributes:
      tokens: [b r] int32 decoder inputs, with the teacher's start token if it has one.
      segments: [b r] int32 segment ids; 0 is padding.
      positions: [b r] int32 positions within each text.
      places: [b t] int32 index into tokens of the last token before targets[b, i].
      known: [b t] bool; False for padding and for targets without a token before them.
      inside: [b r] True for tokens of the inputs, which a teacher with Model.prefix_lm reads in
        both directions; None for other teachers.
    """

    tokens: Any
    segments: Any
    positions: Any
    places: Any
    known: Any
    inside: Any = None


class TeacherLogits(NamedTuple):
    """Top-k predictions of a teacher.

    Attributes:
      ids: [b t k] int32 most probable ids.
      log_probabilities: [b t k + 1] their log-probabilities, and that of all other ids together.
      known: [b t] bool, as in TeacherBatch.
    """

    ids: Any
    log_probabilities: Any
    known: Any


class PairReference(NamedTuple):
    """Log-probabilities of the texts of pairs under a reference model.

    Attributes:
      scores: [b t] float32: that of the text with segment id k at k - 1, 0 beyond the last.
    """

    scores: Any


class SampleData(NamedTuple):
    """Numbers of a policy-gradient step for the samples in the targets of a batch.

    Attributes:
      advantages: [b t] float32, that of the row's sample at each of its tokens.
      old: [b t] float32, log-probability of each token before the first update by these samples.
      reference: [b t] float32, the same under the reference model; None without one.
    """

    advantages: Any
    old: Any
    reference: Any = None


class MaskedBlocks(NamedTuple):
    """Targets of a batch in masked blocks, for Model.canvas.

    Attributes:
      tokens: [b t] int32, the targets, some of them replaced by the mask token; those that are have
        the loss weights.
      blocks: [b t] int32, number of the block in its example, from 0; tokens of a prompt in layout
        joined have -1, -2 ... before it.
      text: [b t] float32, 1 for targets that are of the text, masked or not: not for what comes
        before or after it.
    """

    tokens: Any
    blocks: Any
    text: Any


class Batch(NamedTuple):
    """Rows of packed examples; numpy arrays on the host, jax arrays on the mesh.

    The layouts:

      pair      inputs [b s] for the encoder, targets [b t] for the decoder.
      joined    decoder only: inputs and targets one after the other in targets [b t].
      aligned   encoder only: targets[b, i] is predicted at inputs[b, i], or at the input before it
                by a lone decoder whose layers are not causal.

    Decoder inputs are not stored: they are the targets shifted right within each segment,
    beginning with Model.decoder_start_token_id.

    Attributes:
      targets: [b t] int32 token ids.
      target_segments: [b t] int32 number of the example in its row, from 1; 0 is padding.
      target_positions: [b t] int32 position in the example, from 0.
      loss_weights: [b t] float32, 1 for targets to predict and 0 for others.
      inputs: [b s] int32 token ids; None in layout joined.
      input_segments: [b s] int32, as target_segments.
      input_positions: [b s] int32, as target_positions.
      prefix: [b t] True for tokens of the inputs in layout joined; None in others.
      teacher_data: input or predictions of the teacher, scores of pairs under a reference model, or
        what is known of samples; None for a run without any.
      negatives: [b t] int32 token ids of a hard negative of each row; None without them.
      negative_segments: [b t] int32, as target_segments.
      negative_positions: [b t] int32, as target_positions.
      canvas: the targets in masked blocks; None for a model that writes from left to right.
    """

    targets: Any
    target_segments: Any
    target_positions: Any
    loss_weights: Any
    inputs: Any = None
    input_segments: Any = None
    input_positions: Any = None
    prefix: Any = None
    teacher_data: TeacherBatch | TeacherLogits | PairReference | SampleData | None = None
    negatives: Any = None
    negative_segments: Any = None
    negative_positions: Any = None
    canvas: MaskedBlocks | None = None
