# SPDX-License-Identifier: Apache-2.0
"""Config of comparisons: the twins, what they are matched by, and what is measured."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from t5x_lite.config.checked import (
    MOST_TOKENS,
    Checked,
    Count,
    Few,
    Length,
    Range,
    SourcePath,
    Width,
    require,
)

TWINS = ("encoder_decoder", "causal_decoder", "prefix_decoder", "shallow_decoder")


@dataclass(frozen=True)
class Compare(Checked):
    """A family of models that differ in architecture alone, trained and measured alike.

    The run's own model is the encoder-decoder. The causal and the prefix-LM decoder have no
    encoder; the shallow decoder is an encoder-decoder with few decoder layers and a deeper
    encoder. Every twin sees the same examples as often, with seeds Run.seed, Run.seed + 1, ...

    Attributes:
      twins: the models, encoder_decoder among them.
      matched: what depth, and then the width of the MLP, are chosen to equal: the number of
        parameters, or training or inference FLOPs per example.
      seeds: runs of each twin.
      shallow_layers: decoder layers of the shallow decoder.
      split: split that quality is measured on.
      examples: number of its examples.
      rows: batch sizes of the speed measurements.
      input_lengths: their input lengths, in ids.
      output_lengths: their output lengths, in ids.
      repeats: measurements of each case, of which the median counts.
      drafters: names of `Decode.drafter` whose tokens per forward pass are counted on the same
        examples.
      quantized: kinds of `--quantize`; each twin's quality is measured again with its weights so
        quantized.
      trained: checkpoints of any format, one per seed, of twins that are not trained here:
        {"causal_decoder": ("runs/a", "runs/b")}. They need the ids of the run's data. Other twins
        are matched to such an encoder-decoder; the report says how far off such a twin is.
    """

    twins: tuple[
        Literal["encoder_decoder", "causal_decoder", "prefix_decoder", "shallow_decoder"], ...
    ] = TWINS
    matched: Literal["parameters", "training", "inference"] = "parameters"
    seeds: Few = 3
    shallow_layers: Few = 1
    split: str = "test"
    examples: Count = 1000
    rows: tuple[Width, ...] = (1, 8)
    input_lengths: tuple[Length, ...] = (16, 128)
    output_lengths: tuple[Annotated[int, Range(2, MOST_TOKENS)], ...] = (16, 64)
    repeats: Few = 5
    drafters: tuple[str, ...] = ("lookup", "trigram")
    quantized: tuple[str, ...] = ("int8", "int4", "int4_activations")
    trained: dict[str, tuple[SourcePath, ...]] = field(default_factory=dict)

    def check(self):
        require(len(self.twins) > 1, "Compare.twins names fewer than two: nothing to compare")
        require(len(set(self.twins)) == len(self.twins), "Compare.twins names one twice")
        require("encoder_decoder" in self.twins, "Compare.twins needs encoder_decoder, the model")
        for name in ("rows", "input_lengths", "output_lengths"):
            require(len(getattr(self, name)) > 0, f"Compare.{name} is empty: name a number")
        for name, paths in self.trained.items():
            require(name in self.twins, f"Compare.trained names {name!r}, which is not in twins")
            require(
                len(paths) == self.seeds,
                f"Compare.trained has {len(paths)} of {name}; Compare.seeds is {self.seeds}",
            )
