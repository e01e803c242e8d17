# SPDX-License-Identifier: Apache-2.0
"""How a run begins with other weights and with a teacher: its part of the config tree."""

from dataclasses import dataclass
from typing import Literal

from t5x_lite.typed import Checked, require


@dataclass(frozen=True)
class Part(Checked):
    """Weights that train otherwise than the rest, by patterns of their names.

    A name is "decoder.layers.cross_attention.query"; * stands for anything. `rate` multiplies the
    learning rate; 0 freezes, which costs no gradient and no optimizer memory. Before step `begin`
    the weights stand still; from there `warmup` steps rise to the rate of the schedule.
    """

    weights: tuple[str, ...]
    rate: float = 1.0
    begin: int = 0
    warmup: int = 0

    def check(self):
        require(len(self.weights) > 0, "Part.weights is empty: name weights by patterns")
        require(self.rate >= 0, f"Part.rate cannot be negative; got {self.rate}")
        require(self.begin >= 0, f"Part.begin cannot be negative; got {self.begin}")
        require(self.warmup >= 0, f"Part.warmup cannot be negative; got {self.warmup}")


@dataclass(frozen=True)
class Adaptation(Checked):
    """The weights of a run made from those of other models, tower by tower.

    `source` is a checkpoint of any make (run folder, Hugging Face folder, .gguf). The run's
    decoder gets the weights of its tower `decoder_from`, the run's encoder those of `encoder_from`
    of `encoder_source` (None: of the same checkpoint). Ids that the source does not have get
    `rows`: the mean of its embeddings with noise of a tenth of their spread, or new ones drawn as
    at the start of pretraining.

    `cross` says where cross-attention comes from, which a source of one tower lacks: copied from
    the decoder's self-attention, or random. `cross_scale` multiplies what it says at the start.
    Norms after the sublayers (Gemma) keep that small; in layers without them it drowns what the
    decoder knows, and with a small scale, or 0, the decoder begins as it was.
    """

    source: str
    encoder_source: str | None = None
    decoder_from: Literal["decoder", "encoder"] = "decoder"
    encoder_from: Literal["decoder", "encoder"] | None = None
    cross: Literal["copy", "random"] = "copy"
    cross_scale: float = 1.0
    rows: Literal["mean", "random"] = "mean"

    def check(self):
        require(
            0 <= self.cross_scale <= 1,
            f"Adaptation.cross_scale must be in [0, 1]; got {self.cross_scale}",
        )


@dataclass(frozen=True)
class Distillation(Checked):
    """A frozen decoder-only teacher, whose distribution over the next token is learned too.

    The objective is (1 - weight) * cross entropy + weight * temperature^2 * KL(teacher, student),
    both distributions at that `temperature` (Hinton et al., 2015). With `top_k` the teacher gives
    its k most probable ids and the probability of all others together. `answers` is a folder that
    python -m t5x_lite.distill wrote: the teacher is then not loaded at all.
    """

    teacher: str
    weight: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None
    answers: str | None = None

    def check(self):
        require(0 < self.weight <= 1, f"Distillation.weight must be in (0, 1]; got {self.weight}")
        require(
            self.temperature > 0,
            f"Distillation.temperature must be positive; got {self.temperature}",
        )
        require(self.top_k is None or self.top_k >= 1, "Distillation.top_k must be at least 1")
        require(
            self.answers is None or self.top_k is not None,
            "Distillation.answers holds the top_k of the teacher: bind Distillation.top_k too",
        )
