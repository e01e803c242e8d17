# SPDX-License-Identifier: Apache-2.0
"""The device mesh, the table from named axes to mesh axes, and placement of arrays.

Weights and activations name their axes; only `RULES` knows the mesh. FSDP and tensor parallelism
are rows of this table, not other code.
"""

import contextlib
import contextvars
from collections.abc import Generator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_lite import config

AXES = ("data", "fsdp", "tensor")
# Shards the length of rows; a mesh has it only if Mesh.context is above 1. Next to `tensor` in the
# mesh, as neighbors exchange keys and values in every layer.
CONTEXT = "context"
Rows = TypeVar("Rows", bound=tuple)
LENGTH_SPLIT = contextvars.ContextVar("LENGTH_SPLIT", default=False)

# Axes of activations: batch, length, width, whole. The others are axes of weights. FSDP shards
# `embed`, which is gathered to `width` for use. `encoder_embed` is the width of an encoder whose
# decoder has another one.
RULES = {
    "batch": ("data", "fsdp"),
    "length": None,  # CONTEXT inside `split_rows`
    "width": None,
    "whole": None,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "encoder_embed": "fsdp",
    "encoder_width": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "group": None,
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "head_norm": None,
    "buckets": None,
    "positions": None,
    "projected": None,
    "outputs": None,
    "temperature": None,
    "answers": None,
    "draft_heads": None,
    "rank": None,
    "sources": None,
    "pairs": None,
}


def spec(axes: str) -> P:
    """Partition spec of an array with named axes, such as spec("batch length width")."""
    length = {"length": CONTEXT} if context_size() > 1 and LENGTH_SPLIT.get() else {}
    return P(*((RULES | length)[axis] for axis in axes.split()))


@contextlib.contextmanager
def split_rows() -> Generator[None]:
    """Context in which traced programs shard the length of rows over Mesh.context.

    For the forward pass of training. Other programs, such as decoding with its blocks of a few
    tokens, replicate rows along the context axis.
    """
    token = LENGTH_SPLIT.set(True)
    try:
        yield
    finally:
        LENGTH_SPLIT.reset(token)


def context_size() -> int:
    """Number of devices over which the mesh in force can shard the length of rows."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(CONTEXT, 1)


def token_axes() -> frozenset[str]:
    """Mesh axes that shard tokens; devices along them hold partial sums of every gradient."""
    axes = [axis for axis in spec("batch length") if axis]
    return frozenset(jax.tree.leaves(axes))


def weight_axis() -> tuple[str, int]:
    """FSDP's mesh axis, over which weights are sharded and gathered for use, and its size."""
    axis = str(RULES["embed"])
    return axis, jax.sharding.get_abstract_mesh().shape[axis]


def mesh_sizes(cfg: config.Mesh, devices: int) -> dict[str, int]:
    """Devices per mesh axis, with -1 filled in; without CONTEXT if its size is 1.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    sizes = {"data": cfg.data, "fsdp": cfg.fsdp, CONTEXT: cfg.context, "tensor": cfg.tensor}
    rest = int(np.prod([size for size in sizes.values() if size != -1]))
    sizes = {axis: max(1, devices // rest) if size == -1 else size for axis, size in sizes.items()}
    covered = int(np.prod(list(sizes.values())))
    if covered != devices:
        context = f" context={cfg.context}" if cfg.context != 1 else ""
        raise ValueError(
            f"Mesh data={cfg.data} fsdp={cfg.fsdp} tensor={cfg.tensor}{context} covers "
            f"{covered} devices, but there are {devices}: change the Mesh bindings, or --mesh of "
            "commands that read a checkpoint"
        )
    return {axis: size for axis, size in sizes.items() if axis != CONTEXT or size > 1}


def use_mesh(cfg: config.Mesh, devices: list | None = None) -> jax.sharding.Mesh:
    """Creates the mesh over devices (None: all of them) and sets it for the process."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(cfg, len(devices))
    if cfg.slices == 1:
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices)
    else:
        kinds = (AxisType.Explicit,) * len(sizes)
        mesh = jax.sharding.Mesh(slice_devices(sizes, cfg.slices, devices), tuple(sizes), kinds)
    jax.set_mesh(mesh)
    return mesh


def one_device_mesh() -> contextlib.AbstractContextManager:
    """Context in which the mesh in force is one device of this process."""
    sizes = (1,) * len(AXES)
    return jax.set_mesh(jax.make_mesh(sizes, AXES, devices=jax.local_devices()[:1]))


def slice_devices(sizes: dict[str, int], slices: int, devices: list) -> np.ndarray:
    """Arranges devices of several slices so that only the `data` axis crosses slices.

    If devices have no slice_index, the devices of a process count as a slice.

    Args:
      sizes: devices per mesh axis.
      slices: number of slices.
      devices: all devices.

    Returns:
      Devices in an array of the shape of sizes.

    Raises:
      ValueError: the number of slices differs, or does not divide `data`.
    """
    alone = not hasattr(devices[0], "slice_index")
    attribute = "process_index" if alone else "slice_index"
    there = len({getattr(device, attribute) for device in devices})
    if there != slices:
        raise ValueError(
            f"Mesh.slices={slices}, but the {len(devices)} devices are of {there} "
            f"{'processes' if alone else 'slices'}: bind Mesh.slices = {there}"
        )
    if sizes["data"] % slices:
        raise ValueError(
            f"Mesh.data={sizes['data']} must be a multiple of Mesh.slices={slices}: it is the axis "
            "that spans slices"
        )
    within = [size // slices if axis == "data" else size for axis, size in sizes.items()]
    between = [slices if axis == "data" else 1 for axis in sizes]
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, process_is_granule=alone, allow_split_physical_axes=True
    )


def batch_shards() -> int:
    """Number of shards of the batch axis; it has to divide a batch size."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return sizes["data"] * sizes["fsdp"]


def batch_share() -> tuple[int, int]:
    """Part of each batch that this process reads, and the number of parts.

    Processes whose devices hold the same rows (tensor parallelism across hosts) read the same part.

    Raises:
      ValueError: the rows of two processes overlap in part.
    """
    rows = batch_shards()
    read: dict[int, set[int]] = {}
    for device, (part,) in named_sharding("batch").devices_indices_map((rows,)).items():
        read.setdefault(device.process_index, set()).update(range(*part.indices(rows)))
    parts = sorted({tuple(sorted(each)) for each in read.values()})
    if sum(map(len, parts)) != rows:
        raise ValueError(
            "The Mesh splits the batch across processes unevenly: let Mesh.tensor be a divisor or "
            "a multiple of the devices of a process"
        )
    return parts.index(tuple(sorted(read[jax.process_index()]))), len(parts)


def by_rows(tree: Any) -> Any:
    """Reshards arrays whose first axis is the batch to `spec("batch whole ...")`.

    From jax 0.11 on, a slice or reshape with all dimensions 1 (one row, one token) loses its
    sharding, and arrays that are concatenated or mapped together need the same one.

    Args:
      tree: arrays [b ...]; returned unchanged if no mesh is set.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def reshard(x):
        return jax.reshard(x, spec("batch" + " whole" * (x.ndim - 1)))

    return jax.tree.map(reshard, tree)


def place(value: np.ndarray, axes: str) -> jax.Array:
    """Creates a global array from each process's own part of it."""
    return jax.make_array_from_process_local_data(named_sharding(axes), np.asarray(value))


def place_whole(array: np.ndarray, placement: NamedSharding) -> jax.Array:
    """Creates a global array from a host array that every process holds in full."""
    return jax.make_array_from_callback(array.shape, placement, lambda part: array[part])


def named_sharding(axes: str) -> NamedSharding:
    """Sharding of an array with named axes on the mesh in force."""
    return NamedSharding(jax.sharding.get_mesh(), spec(axes))


def place_batch(batch: Rows) -> Rows:
    """Creates the global batch from the rows of each process."""
    return jax.tree.map(lambda rows: place(rows, "batch length"), batch)
