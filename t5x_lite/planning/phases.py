# SPDX-License-Identifier: Apache-2.0
"""Phases of writing texts on one roofline, by arithmetic for any chip: encode or prefill, decode.

A phase takes the longer of its FLOPs over the peak and its bytes over the bandwidth of HBM, and the
collectives after it ("How to Scale Your Model", Austin et al., 2025, parts 1 and 7). Weights and
caches are exact; scores of attention are not written to HBM, as in fused kernels.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from t5x_lite import config, sharding
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.planning import steps
from t5x_lite.planning.arithmetic import (
    axis_seconds,
    count_sublayers,
    mesh_axes,
    product_sizes,
    split_bytes,
)
from t5x_lite.planning.chips import Chip, Slice
from t5x_lite.training import flops
from t5x_lite.utils.not_none import not_none

# Ids of inputs that one program reads: shorter inputs share it.
READ_TOGETHER = 512
# Bytes of the scale that a quantized cache has for each token and head, of keys and of values.
SCALE_BYTES = 4
CACHE_BITS = (4, 8)
# Float32 logits and a copy of them where a token is chosen.
LOGIT_BYTES = 8


class TextSizes(NamedTuple):
    """Sizes of a served text, and formats.

    Attributes:
      inputs: ids of an input.
      new_tokens: tokens that are written for it.
      quantize: format of the layers' matrices, as "int8"; None for the dtype of activations.
      cache_bits: bits of a key or value, with a scale for each token and head; None for the dtype
        of activations.
    """

    inputs: int
    new_tokens: int
    quantize: str | None = None
    cache_bits: int | None = None


class Phase(NamedTuple):
    """One run of a phase on one chip.

    Attributes:
      name: of the phase.
      chip: kind of chip.
      rows: texts at once, of one shard of the mesh's batch.
      tokens: tokens of these rows.
      flops: FLOPs of the chip.
      moved: bytes of HBM that it reads and writes.
      waits: seconds of its collectives.
    """

    name: Literal["encode", "prefill", "decode"]
    chip: Chip
    rows: int
    tokens: int
    flops: float
    moved: float
    waits: float

    @property
    def compute(self) -> float:
        """Seconds of the FLOPs alone."""
        return self.flops / self.chip.peak

    @property
    def memory(self) -> float:
        """Seconds of the HBM traffic alone."""
        return self.moved / self.chip.bandwidth

    @property
    def seconds(self) -> float:
        """Seconds at best."""
        return max(self.compute, self.memory) + self.waits

    @property
    def intensity(self) -> float:
        """FLOPs for each byte of HBM traffic."""
        return self.flops / self.moved

    @property
    def bound(self) -> str:
        """Part that takes the longest."""
        parts = {"compute": self.compute, "memory": self.memory, "interconnect": self.waits}
        return max(parts, key=lambda name: parts[name])


@dataclasses.dataclass(frozen=True)
class ServingArithmetic:
    """Bytes and FLOPs of texts on one chip of a mesh.

    Attributes:
      cfg: the model.
      slice: the chips.
      mesh: sizes of the mesh axes.
      sizes: sizes of a text, and formats.
      weights: shapes of the weights by dotted name, as decoding keeps them.
      row: shapes of one row's cache: keys and values of its tokens and of its encoded inputs.
      inputs: encoded inputs of a row, padded; 0 for a lone decoder.
      slots: cache slots of a row, padded.
    """

    cfg: config.Model
    slice: Slice
    mesh: dict[str, int]
    sizes: TextSizes
    weights: dict[str, Any]
    row: Any
    inputs: int
    slots: int

    @property
    def shards(self) -> int:
        """Number of parts of the mesh that have rows of their own."""
        return self.mesh["data"] * self.mesh["fsdp"]

    def shard_rows(self, rows: int) -> int:
        """Rows of a shard.

        Raises:
          ValueError: the mesh cannot split the rows.
        """
        if rows % self.shards:
            raise ValueError(
                f"--decode_rows={rows} cannot be split over {self.shards} parts of the mesh (data "
                "x fsdp): choose a multiple"
            )
        return rows // self.shards

    @property
    def tensor(self) -> int:
        """Number of parts into which every layer is split."""
        return self.mesh["tensor"]

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return jnp.dtype(self.cfg.dtype).itemsize

    def weight_bytes(self) -> int:
        """Bytes of all weights on a chip."""
        return split_bytes(self.weights, self.mesh)

    def row_bytes(self) -> float:
        """Bytes of a row's cache on a chip."""
        total = 0.0
        for leaf in jax.tree.leaves(self.row):
            _, heads, slots, width = leaf.shape
            split = self.tensor if mesh_axes(leaf)[1] else 1
            if heads % split:
                raise ValueError(f"{heads} heads of keys cannot be split over {split} chips")
            bits = self.sizes.cache_bits
            token = width * bits / 8 + SCALE_BYTES if bits else width * leaf.dtype.itemsize
            total += heads // split * slots * token
        return total

    def working_bytes(self) -> float:
        """Bytes of a chip's activations for each row of a decode step, its logits included."""
        stack = not_none(self.cfg.decoder)
        wide = product_sizes(self.cfg, stack, self.tensor) * self.itemsize
        return LOGIT_BYTES * self.cfg.vocab / self.tensor + wide

    def read_rows(self) -> int:
        """Rows whose inputs one program reads, of one shard."""
        return max(READ_TOGETHER // self.read_tokens(), 1)

    def read_tokens(self) -> int:
        """Ids that are read of a row before it writes."""
        return self.inputs or self.slots - steps.new_slots(self.sizes.new_tokens)

    def reading_bytes(self) -> float:
        """Bytes of the activations of the widest layer while inputs are read."""
        stack = self.cfg.encoder or not_none(self.cfg.decoder)
        width = stack.embed + product_sizes(self.cfg, stack, self.tensor)
        return self.read_rows() * self.read_tokens() * width * self.itemsize

    def used_weights(self, reading: bool) -> int:
        """Bytes of weights that a phase reads, gathered along fsdp.

        Args:
          reading: of encode or prefill; False of a decode step.
        """
        table = "embedding" if self.cfg.tied else "head"

        def is_used(name: str) -> bool:
            of_inputs = name.startswith("encoder.") or (
                ".cross_attention.key" in name or ".cross_attention.value" in name
            )
            if reading and self.cfg.encoder is not None:
                return of_inputs
            return not of_inputs and name.startswith(("decoder.", table))

        used = {name: leaf for name, leaf in self.weights.items() if is_used(name)}
        return split_bytes(used, self.mesh | {"fsdp": 1})

    def collective_seconds(self, stack: config.Stack, tokens: int, weights: int) -> float:
        """Seconds of a phase's collectives: sums along tensor, weights gathered along fsdp.

        Args:
          stack: the stack that runs.
          tokens: tokens of a chip.
          weights: bytes of the weights that it uses.
        """
        seconds = 0.0
        if self.tensor > 1:
            size = tokens * stack.embed * self.itemsize
            each = axis_seconds("all-reduce", size, "tensor", self.mesh, self.slice)
            seconds += stack.layers * count_sublayers(self.cfg, stack) * each
        if self.mesh["fsdp"] > 1:
            seconds += axis_seconds("all-gather", weights, "fsdp", self.mesh, self.slice)
        return seconds

    def reading(self, rows: int) -> Phase:
        """The phase that reads inputs: encode, or prefill of a lone decoder.

        Args:
          rows: of one shard.
        """
        length, decoder = self.read_tokens(), not_none(self.cfg.decoder)
        stack = self.cfg.encoder or decoder
        operations = flops.self_attention_and_mlp_flops(stack, length)
        if self.cfg.encoder is None:
            operations += 2 * stack.embed * self.cfg.vocab  # logits of the last token
            written = length / self.slots * self.row_bytes()
        else:
            keys = 2 * decoder.key_heads * decoder.head_dim
            operations += 2 * decoder.layers * length * stack.embed * keys
            written = length / (length + self.slots) * self.row_bytes()
        layer = product_sizes(self.cfg, stack, self.tensor) + stack.embed
        passes = 2 * stack.layers * length * layer * self.itemsize
        weights = self.used_weights(reading=True)
        return Phase(
            name="prefill" if self.cfg.encoder is None else "encode",
            chip=self.slice.chip,
            rows=rows,
            tokens=rows * length,
            flops=rows * operations / self.tensor,
            moved=weights + rows * (passes + written),
            waits=self.collective_seconds(stack, rows * length, weights),
        )

    def decoding(self, rows: int) -> Phase:
        """A decode step: a token for each row, over all slots of its cache.

        Args:
          rows: of one shard.
        """
        stack = not_none(self.cfg.decoder)
        weights = self.used_weights(reading=False)
        layer = product_sizes(self.cfg, stack, self.tensor) + stack.embed
        passes = 2 * stack.layers * layer * self.itemsize
        logits = LOGIT_BYTES * self.cfg.vocab / self.tensor
        return Phase(
            name="decode",
            chip=self.slice.chip,
            rows=rows,
            tokens=rows,
            flops=rows * steps.token_flops(self.cfg, self.inputs, self.slots) / self.tensor,
            moved=weights + rows * (self.row_bytes() + passes + logits),
            waits=self.collective_seconds(stack, rows, weights),
        )


def serving_arithmetic(run: config.Run, slice_: Slice, sizes: TextSizes) -> ServingArithmetic:
    """Bytes and FLOPs of a run's texts on a slice; jax needs one device here.

    Args:
      run: config of the run.
      slice_: the chips.
      sizes: sizes of a text, and formats.

    Raises:
      ValueError: the model has no decoder, its layers cannot be quantized so, or the mesh does not
        cover the chips.
    """
    cfg = steps.require_decoder(run.model, "--serve")
    mesh = sharding.mesh_sizes(run.mesh, slice_.count)
    sharding.use_mesh(config.Mesh(1, 1, 1), jax.devices("cpu")[:1])
    params = steps.decode_weights(cfg)
    size = steps.Decoding(1, sizes.new_tokens, sizes.inputs)
    encoded, _, cache, slots = steps.decode_arguments(run, params, size)
    inputs = 0 if encoded.input_mask is None else encoded.input_mask.shape[1]
    row = (cache, encoded.cross_kv)
    weights = flatten_tree(steps.weight_shapes(cfg, sizes.quantize))
    return ServingArithmetic(cfg, slice_, mesh, sizes, weights, row, inputs, slots)
