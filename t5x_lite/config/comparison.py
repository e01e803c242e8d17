# SPDX-License-Identifier: Apache-2.0
"""Config of comparisons: the twins, what they are matched by, and what is measured."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from t5x_lite.config.checked import (
    FAR,
    MOST_TOKENS,
    Checked,
    Count,
    CountOrZero,
    Few,
    Length,
    Range,
    SourcePath,
    Width,
    require,
)
from t5x_lite.config.data import Data
from t5x_lite.utils.nearest import suggest

TWINS = ("encoder_decoder", "causal_decoder", "prefix_decoder", "shallow_decoder")
# Depth and width of these are chosen to match the cost of the encoder-decoder.
MATCHED_TWINS = (*TWINS[1:], "tuned_prefix_decoder")
# These are the encoder-decoder but for one change.
CHANGED_TWINS = (
    "causal_encoder",
    "chunked_encoder",
    "merged_attention",
    "tied_embeddings",
    "averaged",
    "adapted",
    "scratch",
)
COSTS = ("parameters", "training", "inference")


@dataclass(frozen=True)
class Compare(Checked):
    """A family of models that differ in architecture alone, trained and measured alike.

    The run's own model is the encoder-decoder. The causal and the prefix-LM decoder have no
    encoder; the shallow decoder is an encoder-decoder with few decoder layers and a deeper
    encoder. Every twin sees the same examples as often, with seeds Run.seed, Run.seed + 1, ...

    Other twins: causal_encoder; chunked_encoder (`chunk`); merged_attention; tied_embeddings;
    averaged, whose weights are the mean of the last tenth of the run; and with `pretraining`
    tuned_prefix_decoder, a causal decoder until it is tuned as a prefix LM; adapted, an
    encoder-decoder begun from a pretrained causal decoder; scratch, without pretraining.

    Attributes:
      twins: the models, encoder_decoder among them; one with a cost of its own is NAME@COST, such
        as "shallow_decoder@inference".
      matched: what depth, and then the width of the MLP, are chosen to equal: the number of
        parameters, or training or inference FLOPs per example.
      seeds: runs of each twin.
      processes: runs that train at once; small models use a machine better side by side.
      shallow_layers: decoder layers of the shallow decoder.
      chunk: tokens of a chunk of the chunked encoder.
      depths: layers of each stack of the encoder-decoder, size by size; the family is compared in
        each size, in a folder of its own, and losses are fitted against cost.
      widths: of its states, size by size; heads and MLP keep their share.
      positions: `Stack.positions` of all stacks; the family is compared with each.
      lengths: longest lengths of targets of each bucket but the last, by which losses are reported.
      pretraining: data that every twin is trained on first; None trains on those of the run alone.
      pretraining_steps: steps of the encoder-decoder on them.
      split: split that quality is measured on.
      examples: number of its examples.
      decoded: examples of these that are decoded for metrics of text; None is all.
      rows: batch sizes of the speed measurements.
      input_lengths: their input lengths, in ids.
      output_lengths: their output lengths, in ids.
      repeats: measurements of each case, of which the median counts; 0 measures no speed.
      drafters: names of `Decode.drafter` whose tokens per forward pass are counted on the same
        examples.
      inspected: examples whose targets are read again for attention to the source by step, and for
        the geometry of the decoder's states by layer; 0 leaves both out.
      quantized: kinds of `--quantize`; each twin's quality is measured again with its weights so
        quantized.
      trained: checkpoints of any format, one per seed, of twins that are not trained here:
        {"causal_decoder": ("runs/a", "runs/b")}. They need the ids of the run's data. Other twins
        are matched to such an encoder-decoder; the report says how far off such a twin is.
      claims: rows of the page of claims that this comparison decides; their twins are trained
        alone.
      studies: further .gin files with claims of their own, whose rows stand on the same page.
      quick_steps: steps of a run with --quick.
    """

    twins: tuple[str, ...] = TWINS
    matched: Literal["parameters", "training", "inference"] = "parameters"
    seeds: Few = 3
    processes: Few = 1
    shallow_layers: Few = 1
    chunk: Length = 8
    depths: tuple[Few, ...] = ()
    widths: tuple[Width, ...] = ()
    positions: tuple[Literal["relative", "rotary", "sinusoidal", "alibi", "none"], ...] = ()
    lengths: tuple[Length, ...] = ()
    pretraining: Data | None = None
    pretraining_steps: Count = 1000
    split: str = "test"
    examples: Count = 1000
    decoded: CountOrZero | None = None
    rows: tuple[Width, ...] = (1, 8)
    input_lengths: tuple[Length, ...] = (16, 128)
    output_lengths: tuple[Annotated[int, Range(2, MOST_TOKENS)], ...] = (16, 64)
    repeats: Annotated[int, Range(0, FAR)] = 5
    drafters: tuple[str, ...] = ("lookup", "trigram")
    inspected: CountOrZero = 0
    quantized: tuple[str, ...] = ("int8", "int4", "int4_activations")
    trained: dict[str, tuple[SourcePath, ...]] = field(default_factory=dict)
    claims: tuple[str, ...] = ()
    studies: tuple[str, ...] = ()
    quick_steps: Count = 100

    def check(self):
        require(len(self.twins) > 1, "Compare.twins names fewer than two: nothing to compare")
        require(len(set(self.twins)) == len(self.twins), "Compare.twins names one twice")
        require("encoder_decoder" in self.twins, "Compare.twins needs encoder_decoder, the model")
        for twin in self.twins:
            self.check_twin(twin)
        for name in ("rows", "input_lengths", "output_lengths"):
            require(len(getattr(self, name)) > 0, f"Compare.{name} is empty: name a number")
        for name, paths in self.trained.items():
            require(name in self.twins, f"Compare.trained names {name!r}, which is not in twins")
            require(
                len(paths) == self.seeds,
                f"Compare.trained has {len(paths)} of {name}; Compare.seeds is {self.seeds}",
            )
        self.check_sweep()

    def check_twin(self, twin: str):
        name, at, cost = twin.partition("@")
        every = ("encoder_decoder", *MATCHED_TWINS, *CHANGED_TWINS)
        require(name in every, f"Compare.twins: there is no twin {name!r}; {suggest(name, every)}")
        require(
            not at or (cost in COSTS and name in MATCHED_TWINS),
            f"Compare.twins: {twin!r} is not one of {', '.join(MATCHED_TWINS)} with @ and one of "
            f"{', '.join(COSTS)}",
        )
        require(
            self.pretraining is not None
            or name not in ("tuned_prefix_decoder", "adapted", "scratch"),
            f"Compare.twins: {name} differs by its pretraining: bind Compare.pretraining",
        )

    def check_sweep(self):
        require(
            len(self.depths) == len(self.widths),
            f"Compare.depths has {len(self.depths)} and Compare.widths {len(self.widths)} numbers: "
            "bind one of each for every size",
        )
        sizes = list(zip(self.depths, self.widths, strict=True))
        require(len(set(sizes)) == len(sizes), "Compare.depths and widths name a size twice")
        require(
            len(set(self.positions)) == len(self.positions), "Compare.positions names one twice"
        )
        require(
            list(self.lengths) == sorted(set(self.lengths)),
            "Compare.lengths must rise, such as (10, 20)",
        )
        require(
            not self.trained or not self.is_sweep,
            "Compare.trained has checkpoints of one model: leave out depths, widths and positions",
        )

    @property
    def is_sweep(self) -> bool:
        """True if several families are compared: of several sizes or positions."""
        return bool(self.depths or self.positions)
