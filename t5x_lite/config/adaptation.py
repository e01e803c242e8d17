# SPDX-License-Identifier: Apache-2.0
"""Config of initial weights from other models, of groups of weights, and of a teacher."""

from dataclasses import dataclass
from typing import Literal

from t5x_lite.config.checked import (
    Checked,
    Count,
    CountOrZero,
    LocalPath,
    NotNegative,
    Positive,
    Share,
    ShareAboveZero,
    SourcePath,
    require,
)


@dataclass(frozen=True)
class ParamGroup(Checked):
    """Weights that share one learning-rate rule, chosen by patterns of their names.

    A name is "decoder.layers.cross_attention.query"; * matches anything.

    Attributes:
      weights: patterns; a weight belongs to the first group of `Train.param_groups` that matches.
      rate: factor on the learning rate; 0 freezes, which costs no gradient and no optimizer memory.
      begin: step before which the weights do not move.
      warmup: steps from `begin` on over which the rate rises linearly to that of the schedule.
    """

    weights: tuple[str, ...]
    rate: NotNegative = 1.0
    begin: CountOrZero = 0
    warmup: CountOrZero = 0

    def check(self):
        require(len(self.weights) > 0, "ParamGroup.weights is empty: name weights by patterns")


@dataclass(frozen=True)
class Adaptation(Checked):
    """Initial weights of a run taken from other models, tower by tower.

    Attributes:
      source: checkpoint of any format: run folder, Hugging Face folder, .gguf file, or a model of
        the hub by name, owner/name[@revision][:file.gguf].
      encoder_source: checkpoint that the encoder comes from; None takes `source`.
      decoder_from: tower of `source` that becomes the decoder; None draws a decoder anew, of any
        size, beside the encoder.
      encoder_from: tower of `encoder_source` that becomes the encoder; None takes the decoder of
        a decoder-only source, and the encoder of any other.
      cross: cross-attention of a decoder whose source has none: copied from its self-attention,
        or random.
      cross_scale: factor on cross-attention's output at the start, in [0, 1]. Norms after the
        sublayers (Gemma) keep that output small; without them it dominates the decoder's residual
        stream, and with a small scale, or 0, the decoder begins as it was.
      rows: embeddings of ids that the source lacks: the mean of its embeddings with noise of a
        tenth of their standard deviation, or new ones drawn as for pretraining.
    """

    source: SourcePath
    encoder_source: SourcePath | None = None
    decoder_from: Literal["decoder", "encoder"] | None = "decoder"
    encoder_from: Literal["decoder", "encoder"] | None = None
    cross: Literal["copy", "random"] = "copy"
    cross_scale: Share = 1.0
    rows: Literal["mean", "random"] = "mean"


@dataclass(frozen=True)
class Distillation(Checked):
    """A frozen decoder-only teacher, whose next-token distribution is part of the loss.

    The loss is (1 - weight) * cross entropy + weight * temperature^2 * KL(teacher, student), both
    distributions at that temperature (Hinton et al., 2015). With SpanCorruption the teacher reads
    the text before spans were hidden; targets that it has no distribution for, sentinels and ends,
    have cross entropy alone (T5Gemma 2: arXiv 2512.14856, section 3.1).

    Attributes:
      teacher: checkpoint of any format, or a model of the hub by name.
      weight: share of the divergence in the loss, in (0, 1].
      temperature: that of both distributions.
      top_k: the k most probable ids of the teacher, and the probability of all others together;
        None compares the whole distributions.
      answers: folder that `python -m t5x_lite.distill` wrote; the teacher is then not loaded.
    """

    teacher: SourcePath
    weight: ShareAboveZero = 0.5
    temperature: Positive = 1.0
    top_k: Count | None = None
    answers: LocalPath | None = None

    def check(self):
        require(
            self.answers is None or self.top_k is not None,
            "Distillation.answers holds the top_k of the teacher: bind Distillation.top_k too",
        )
