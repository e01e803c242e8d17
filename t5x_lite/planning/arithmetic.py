# SPDX-License-Identifier: Apache-2.0
"""A training step's figures by arithmetic alone: for chips that no compiler here compiles for, and
to prune a search.

Weights, optimizer state and batch are exact. What a layer keeps for its backward pass is counted
from its products; buffers that only a compiler knows are not. For T5 1.1 XXL on v5e:16x16 and
v5e:4x4 (4 rows of 512 + 128 tokens on each chip) it says 8.4 and 12.3 GiB where the compiler says
7.7 and 11.9.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5x_lite import config, sharding
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.model import quantization
from t5x_lite.planning import aot
from t5x_lite.planning.chips import HOP_SECONDS, Slice
from t5x_lite.planning.collectives import Collective
from t5x_lite.planning.figures import Figures, Memory
from t5x_lite.planning.steps import REFERENCE
from t5x_lite.training import flops, frozen_base, setup, token_losses


class StepShapes(NamedTuple):
    """Shapes of a step's arguments, with the mesh axes over which each axis is split.

    Attributes:
      params: tree of the weights that train.
      optimizer: tree of the optimizer state.
      batch: arrays of a batch.
      base: tree of frozen weights; None without adapters.
      reference: tree of a reference model's weights; None without one.
    """

    params: Any
    optimizer: Any
    batch: Any
    base: Any = None
    reference: Any = None


def step_shapes(run: TrainingRun) -> StepShapes:
    """Shapes of a run's training step, for any mesh; jax needs one device here."""
    sharding.use_mesh(config.Mesh(1, 1, 1), jax.devices("cpu")[:1])
    shapes = aot.abstract_state(run)
    frozen = (frozen_base.base_shapes(run), aot.reference_shapes(run))
    return StepShapes(shapes.params, shapes.optimizer, aot.abstract_batch(run), *frozen)


def split_bytes(tree: Any, mesh: dict[str, int]) -> int:
    """Bytes of one chip's part of every leaf.

    Raises:
      ValueError: an axis cannot be split evenly, with the leaf's name.
    """
    total = 0
    for name, leaf in flatten_tree(tree).items():
        shape = []
        for size, axes in zip(leaf.shape, mesh_axes(leaf), strict=True):
            ways = math.prod(mesh[axis] for axis in axes)
            if size % ways:
                raise ValueError(f"{name}: {size} cannot be split over {ways} chips ({axes})")
            shape.append(size // ways)
        total += quantization.array_bytes(math.prod(shape), leaf.dtype)
    return total


def mesh_axes(leaf) -> list[tuple[str, ...]]:
    """The mesh axes of every axis of a leaf."""
    spec = leaf.sharding.spec
    axes = [(each,) if isinstance(each, str) else tuple(each or ()) for each in spec]
    return axes + [()] * (len(leaf.shape) - len(axes))


def mesh_of(run: TrainingRun, count: int) -> dict[str, int]:
    """The sizes of run's mesh axes on so many chips."""
    return sharding.mesh_sizes(run.mesh, count)


def figures(run: TrainingRun, slice_: Slice, shapes: StepShapes) -> Figures:
    """Figures of a run's training step on a slice.

    Args:
      run: config of the run.
      slice_: the chips.
      shapes: shapes of the step, from `step_shapes`.

    Raises:
      ValueError: weights or rows cannot be split evenly over the mesh.
    """
    mesh = mesh_of(run, slice_.count)
    setup.check_lengths(run, mesh.get(sharding.CONTEXT, 1))
    sizes = StackSizes(run, mesh)
    params = split_bytes(shapes.params, mesh)
    kinds = {
        "parameters": params,
        **{
            name: split_bytes(tree, mesh)
            for name, tree in (("frozen weights", shapes.base), (REFERENCE, shapes.reference))
            if tree is not None
        },
        "optimizer state": split_bytes(shapes.optimizer, mesh),
        "batch": split_bytes(shapes.batch, mesh),
        "gradients": gradient_bytes(run, params),
        "activations": (
            sizes.saved_bytes() + sizes.working_bytes() + logits_bytes(run, sizes, mesh)
        ),
        "gathered weights": 3 * sizes.layer_bytes() if mesh["fsdp"] > 1 else 0,
    }
    peak = sum(kinds.values())
    excess = max(0, peak - slice_.chip.memory)
    lengths = flops.row_lengths(run.model.batch_layout, run.data.lengths)
    needed = flops.run_flops(run)
    return Figures(
        what="training step",
        source="arithmetic",
        slice=slice_,
        mesh=mesh,
        memory=Memory(kinds, peak, slice_.chip.memory, excess),
        tokens=flops.batch_rows(run) * sum(lengths),
        model_flops=needed,
        flops=int(needed * computed_share(run) / slice_.count),
        moved=moved_bytes(run, kinds, sizes),
        collectives=expected_collectives(run, slice_, mesh, sizes),
    )


def has_cross_attention(cfg: config.Model, stack: config.Stack) -> bool:
    """True for the decoder of an encoder-decoder."""
    return cfg.layout == "encoder_decoder" and stack is cfg.decoder


def count_sublayers(cfg: config.Model, stack: config.Stack) -> int:
    """Number of residual branches of a layer."""
    return 3 if has_cross_attention(cfg, stack) else 2


def product_sizes(cfg: config.Model, stack: config.Stack, tensor: int) -> float:
    """Elements of the results of a layer's matrix products on a chip, per token.

    Args:
      cfg: the model.
      stack: one of its stacks.
      tensor: number of chips that share a layer.
    """
    heads = stack.heads * stack.head_dim
    keys = stack.key_heads * stack.head_dim
    attention = 2 * heads + 2 * keys
    if has_cross_attention(cfg, stack) and not stack.merged:
        attention += 2 * heads
    split = attention + stack.mlp * (1 + stack.gated)
    return split / tensor + count_sublayers(cfg, stack) * stack.embed


class StackSizes(NamedTuple):
    """Sizes of a step's encoder and decoder stacks on one chip, of one microbatch."""

    run: TrainingRun
    mesh: dict[str, int]

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.run.model.dtype).itemsize

    @property
    def context(self) -> int:
        """Number of parts into which rows are split."""
        return self.mesh.get(sharding.CONTEXT, 1)

    def stacks(self) -> list[tuple[config.Stack, float]]:
        """Config of every stack, and the tokens of it that a chip has at once."""
        run = self.run
        rows = flops.batch_rows(run) / run.train.microbatches
        rows /= self.mesh["data"] * self.mesh["fsdp"] * self.context
        inputs, targets = flops.row_lengths(run.model.batch_layout, run.data.lengths)
        pairs = ((run.model.encoder, inputs), (run.model.decoder, targets))
        return [(stack, rows * length) for stack, length in pairs if stack is not None]

    def product_sizes(self, stack: config.Stack) -> float:
        """Elements of the results of a layer's matrix products, per token."""
        return product_sizes(self.run.model, stack, self.mesh["tensor"])

    def keys(self) -> float:
        """Elements of the keys and values of all layers, of whole rows: split rows gather them."""
        encoded = self.stacks()[0][1]
        total = 0.0
        for stack, tokens in self.stacks():
            visible = tokens + (encoded if has_cross_attention(self.run.model, stack) else 0)
            total += stack.layers * 2 * stack.key_heads * stack.head_dim * visible * self.context
        return total / self.mesh["tensor"]

    def saved_bytes(self) -> int:
        """Bytes that all layers save for the backward pass."""
        shares = {"full": 0.0, "minimal": 1.0, "none": 2.0}
        share, total = shares[self.run.train.remat], 0.0
        for stack, tokens in self.stacks():
            saved = stack.embed + share * self.product_sizes(stack)
            total += stack.layers * tokens * saved * self.itemsize
        return int(total)

    def working_bytes(self) -> int:
        """Bytes of the widest layer while its backward pass runs: values and their gradients."""
        widest = max(tokens * self.product_sizes(stack) for stack, tokens in self.stacks())
        return int(4 * widest * self.itemsize)

    def layer_bytes(self) -> int:
        """Bytes of the largest layer's weights where they are used: gathered along fsdp."""
        return int(max(self.weights(stack) for stack, _ in self.stacks()) * self.itemsize)

    def weights(self, stack: config.Stack) -> float:
        """Weights of one layer on a chip, gathered along fsdp."""
        projections = 2 * (stack.heads + stack.key_heads)
        if has_cross_attention(self.run.model, stack) and not stack.merged:
            projections *= 2
        columns = stack.head_dim * projections + stack.mlp * (2 + stack.gated)
        return stack.embed * columns / self.mesh["tensor"]


def gradient_bytes(run: TrainingRun, params: int) -> int:
    """Gradients in the dtype of activations, and their float32 sum over microbatches."""
    narrow = params * jnp.dtype(run.model.dtype).itemsize // 4
    return narrow + (params if run.train.microbatches > 1 else 0)


def logits_bytes(run: TrainingRun, sizes: StackSizes, mesh: dict[str, int]) -> int:
    """Bytes of the float32 logits and their gradient, or of a chunk of them.

    Args:
      run: config of the run.
      sizes: sizes of its stacks.
      mesh: sizes of the mesh axes.
    """
    tokens = sizes.stacks()[-1][1]
    all_logits = 8 * tokens * run.model.vocab / mesh["tensor"]
    return int(min(all_logits, token_losses.MAX_LOGIT_BYTES / 4))


def compares_models(run: TrainingRun) -> bool:
    """True if a step computes the log-probabilities of a reference model."""
    scored = getattr(run.data.task, "reference", None) is not None
    return run.preferences is not None and run.preferences.has_reference and not scored


def computed_share(run: TrainingRun) -> float:
    """FLOPs of a step over those that its model needs: what is recomputed, and a reference."""
    passes = 3 if run.lora is None else 2
    return (passes + (run.train.remat == "full") + compares_models(run)) / passes


def moved_bytes(run: TrainingRun, kinds: dict[str, int], sizes: StackSizes) -> int:
    """Bytes of HBM read and written: weights three times for each microbatch, those of a reference
    once, the update once, activations in both directions.

    Args:
      run: config of the run.
      kinds: bytes that a chip holds, by kind.
      sizes: sizes of the run's stacks.
    """
    weights = sum(stack.layers * sizes.weights(stack) for stack, _ in sizes.stacks())
    microbatches = run.train.microbatches
    passes = sum(
        stack.layers * tokens * (sizes.product_sizes(stack) + stack.embed)
        for stack, tokens in sizes.stacks()
    )
    update = 3 * kinds["parameters"] + 2 * kinds["optimizer state"] + 2 * kinds["gradients"]
    reads = 3 + compares_models(run)
    step = microbatches * sizes.itemsize * reads * (weights + 2 * passes) + update
    return int(step * (1 if run.grpo is None else run.grpo.updates))


def expected_collectives(run: TrainingRun, slice_: Slice, mesh: dict[str, int], sizes: StackSizes):
    """Collectives that the rules of `sharding` lead to, each axis by itself.

    Args:
      run: config of the run.
      slice_: the chips.
      mesh: sizes of the mesh axes.
      sizes: sizes of the run's stacks.
    """
    microbatches, itemsize = run.train.microbatches, sizes.itemsize
    table = run.model.vocab * sum(stack.embed for stack, _ in sizes.stacks()) / mesh["tensor"]
    weights = sum(stack.layers * sizes.weights(stack) for stack, _ in sizes.stacks()) + table
    weight_bytes = int(weights * itemsize)
    sums = sum(
        stack.layers * count_sublayers(run.model, stack) * tokens * stack.embed * itemsize
        for stack, tokens in sizes.stacks()
    )
    passes = (3 if run.train.remat == "full" else 2) * microbatches
    key_bytes = int(sizes.keys() * itemsize)
    listed = [
        ("all-gather", "fsdp", weight_bytes, 2 * microbatches, True),
        ("reduce-scatter", "fsdp", weight_bytes, microbatches, True),
        ("all-reduce", "data", weight_bytes // mesh["fsdp"], microbatches, True),
        ("all-reduce", "tensor", int(sums), passes, False),
        ("all-reduce", sharding.CONTEXT, weight_bytes // mesh["fsdp"], microbatches, True),
        ("all-gather", sharding.CONTEXT, key_bytes, passes, False),
        ("reduce-scatter", sharding.CONTEXT, key_bytes, microbatches, False),
    ]
    result = []
    for kind, axis, count, times, overlapped in listed:
        if mesh.get(axis, 1) > 1:
            seconds = axis_seconds(kind, count, axis, mesh, slice_)
            if axis == "data" and run.mesh.slices > 1:
                seconds = seconds_over_slices(count, run.mesh.slices, mesh, slice_)
            result.append(Collective(kind, count, mesh[axis], (axis,), times, seconds, overlapped))
    return tuple(result)


def seconds_over_slices(size: int, slices: int, mesh: dict[str, int], slice_: Slice) -> float:
    """Seconds of an all-reduce along `data` over several slices: summed within each, then each
    member's share over the data-center network.

    Args:
      size: bytes of the array.
      slices: number of slices.
      mesh: sizes of the mesh axes over all slices.
      slice_: one of them.

    Raises:
      ValueError: `data` does not span the slices, or nothing is known of the chip's network.
    """
    if mesh["data"] % slices:
        raise ValueError(f"Mesh.data={mesh['data']} must be a multiple of Mesh.slices={slices}")
    if not slice_.chip.network:
        raise ValueError(
            f"Mesh.slices={slices}: nothing is known of the data-center network of "
            f"{slice_.chip.kind}; plan one slice"
        )
    members = mesh["data"] // slices
    of_slice = mesh | {"data": members}
    within = axis_seconds("all-reduce", size, "data", of_slice, slice_) if members > 1 else 0.0
    return within + 2 * size / members * (slices - 1) / slices / slice_.chip.network


def axis_seconds(kind: str, size: int, axis: str, mesh: dict[str, int], slice_: Slice) -> float:
    """Seconds of one collective along a mesh axis.

    On TPU the axis is assumed to be a ring; GPUs of a box reach each other over its switch, others
    over the network, all of a box at once.

    Args:
      kind: HLO's name of the collective.
      size: bytes of the array.
      axis: name of the mesh axis.
      mesh: sizes of the mesh axes.
      slice_: the chips.
    """
    chip, members = slice_.chip, mesh[axis]
    order = list(mesh)
    inner = math.prod(mesh[each] for each in order[order.index(axis) + 1 :])
    if chip.box is None:
        bandwidth = 2 * chip.link
    elif inner * members <= chip.box:
        bandwidth = chip.link
    else:
        bandwidth = chip.network * max(1, chip.box // inner)
    passes = 2 if kind == "all-reduce" else 1
    return passes * max(size * (members - 1) / members / bandwidth, members / 2 * HOP_SECONDS)
