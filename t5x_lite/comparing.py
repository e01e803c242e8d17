# SPDX-License-Identifier: Apache-2.0
"""Which twins are compared, how they are matched and what is measured: its part of the config."""

from dataclasses import dataclass, field
from typing import Literal

from t5x_lite.typed import Checked, require

TWINS = ("encoder_decoder", "causal_decoder", "prefix_decoder", "shallow_decoder")


@dataclass(frozen=True)
class Compare(Checked):
    """A family of models that differ in architecture alone, trained and measured alike.

    The run's own model is the encoder-decoder; of the other twins, the causal and the prefix-LM
    decoder have no encoder, and the shallow decoder is an encoder-decoder with `shallow_layers`
    decoder layers and a deeper encoder. Depth and then the width of the MLP are chosen so that
    each has as many parameters, or training FLOPs, or inference FLOPs per example, as `matched`
    says. Every twin sees the same examples as often, with seeds Run.seed, Run.seed + 1, ...

    Quality is measured on `examples` of `split`; speed with `rows` texts at once at every pair of
    `input_lengths` and `output_lengths` (ids), medians of `repeats` turns; `drafters` are names of
    `Decode.decoder` whose guesses are counted on the same texts; `quantised` are names of
    `--quantize`: each twin's quality is measured again with its weights so rounded.

    A twin in `trained` is not trained but taken: {"causal_decoder": ("runs/a", "runs/b")} names a
    checkpoint of any make for each seed, with the ids of the run's data. Other twins are matched
    to a taken encoder-decoder; how far off a taken one is, is told.
    """

    twins: tuple[
        Literal["encoder_decoder", "causal_decoder", "prefix_decoder", "shallow_decoder"], ...
    ] = TWINS
    matched: Literal["parameters", "training", "inference"] = "parameters"
    seeds: int = 3
    shallow_layers: int = 1
    split: str = "test"
    examples: int = 1000
    rows: tuple[int, ...] = (1, 8)
    input_lengths: tuple[int, ...] = (16, 128)
    output_lengths: tuple[int, ...] = (16, 64)
    repeats: int = 5
    drafters: tuple[str, ...] = ("lookup", "trigram")
    quantised: tuple[str, ...] = ("int8", "int4", "int4_activations")
    trained: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def check(self):
        require(len(self.twins) > 1, "Compare.twins names fewer than two: nothing to compare")
        require(len(set(self.twins)) == len(self.twins), "Compare.twins names one twice")
        require("encoder_decoder" in self.twins, "Compare.twins needs encoder_decoder, the model")
        for name in ("seeds", "shallow_layers", "examples", "repeats"):
            require(getattr(self, name) >= 1, f"Compare.{name} must be at least 1")
        for name in ("rows", "input_lengths", "output_lengths"):
            values = getattr(self, name)
            require(
                len(values) > 0 and min(values) >= 1,
                f"Compare.{name} must name numbers from 1 on; got {values}",
            )
        require(min(self.output_lengths) > 1, "Compare.output_lengths must be at least 2 each")
        for name, paths in self.trained.items():
            require(name in self.twins, f"Compare.trained names {name!r}, which is not in twins")
            require(
                len(paths) == self.seeds,
                f"Compare.trained has {len(paths)} of {name}; Compare.seeds is {self.seeds}",
            )
