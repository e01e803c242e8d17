# SPDX-License-Identifier: Apache-2.0
"""The mesh, the one table from named axes to mesh axes, and how arrays get onto devices.

Weights and activations name their axes; only `RULES` knows the mesh. FSDP and tensor parallelism
are rows of this table, not other code.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_lite import config
from t5x_lite.batch import Batch

AXES = ("data", "fsdp", "tensor")
# Splits the length of rows; a mesh has it only where Mesh.context is above 1. Beside `tensor`, as
# neighbours exchange keys and values in every layer.
CONTEXT = "context"
LENGTH_SPLIT = contextvars.ContextVar("LENGTH_SPLIT", default=False)

# Activations: batch length width whole. Weights: the rest; `embed` is what FSDP splits, and it
# becomes `width` (whole again) at the moment of use. `encoder_embed` is the width of an encoder
# beside a decoder of another one.
RULES = {
    "batch": ("data", "fsdp"),
    "length": None,  # CONTEXT inside `split_rows`
    "width": None,
    "whole": None,
    "layers": None,
    "vocab": "tensor",
    "expert": None,  # Reserved: no layer has experts.
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
    "guesses": None,
    "sources": None,
    "pairs": None,
}


def spec(axes: str) -> P:
    """The placement of an array whose axes are named, e.g. spec("batch length width")."""
    length = {"length": CONTEXT} if context_size() > 1 and LENGTH_SPLIT.get() else {}
    return P(*((RULES | length)[axis] for axis in axes.split()))


@contextlib.contextmanager
def split_rows() -> Iterator[None]:
    """While a program is traced inside, the length of rows is split over Mesh.context.

    Training's forward pass is traced so. Everything else, decoding with its blocks of a few tokens
    above all, has whole rows on each device of the context axis.
    """
    token = LENGTH_SPLIT.set(True)
    try:
        yield
    finally:
        LENGTH_SPLIT.reset(token)


def context_size() -> int:
    """Over how many devices the mesh in force splits the length of rows."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(CONTEXT, 1)


def token_axes() -> frozenset[str]:
    """The mesh axes over which tokens are split: their devices have their own share of every
    gradient."""
    axes = [axis for axis in spec("batch length") if axis]
    return frozenset(jax.tree.leaves(axes))


def weight_axis() -> tuple[str, int]:
    """The mesh axis over which weights are split and gathered for use (FSDP), and its size."""
    axis = RULES["embed"]
    return axis, jax.sharding.get_abstract_mesh().shape[axis]


def mesh_sizes(cfg: config.Mesh, devices: int) -> dict[str, int]:
    """Devices per axis, with -1 filled in; without CONTEXT where rows stay whole.

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
            f"{covered} devices, but there are {devices}: change the Mesh bindings"
        )
    return {axis: size for axis, size in sizes.items() if axis != CONTEXT or size > 1}


def use_mesh(cfg: config.Mesh, devices: list | None = None) -> jax.sharding.Mesh:
    """Makes the mesh over devices (all of them unless given) and sets it for what follows."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(cfg, len(devices))
    if cfg.slices == 1:
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices)
    else:
        kinds = (AxisType.Explicit,) * len(sizes)
        mesh = jax.sharding.Mesh(over_slices(sizes, cfg.slices, devices), tuple(sizes), kinds)
    jax.set_mesh(mesh)
    return mesh


def over_slices(sizes: dict[str, int], slices: int, devices: list) -> np.ndarray:
    """devices in the shape of sizes, of which `data` alone goes from slice to slice.

    Where devices tell no slice, the devices of a process are one.

    Raises:
      ValueError: there are other slices, or `data` is no multiple of them.
    """
    alone = not hasattr(devices[0], "slice_index")
    named = "process_index" if alone else "slice_index"
    there = len({getattr(device, named) for device in devices})
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
    """How many parts the batch is split into: a batch size must be a multiple of it."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return sizes["data"] * sizes["fsdp"]


def batch_share() -> tuple[int, int]:
    """Which part of the rows of a batch this process reads, and of how many parts.

    Processes whose devices the mesh gives the same rows (tensor parallelism between hosts) read
    the same part.

    Raises:
      ValueError: the mesh gives some processes some of the rows of others.
    """
    rows = batch_shards()
    read: dict[int, set[int]] = {}
    for device, (part,) in named("batch").devices_indices_map((rows,)).items():
        read.setdefault(device.process_index, set()).update(range(*part.indices(rows)))
    parts = sorted({tuple(sorted(each)) for each in read.values()})
    if sum(map(len, parts)) != rows:
        raise ValueError(
            "The Mesh splits the batch across processes unevenly: let Mesh.tensor be a divisor or "
            "a multiple of the devices of a process"
        )
    return parts.index(tuple(sorted(read[jax.process_index()]))), len(parts)


def by_rows(tree: Any) -> Any:
    """Arrays whose first axis is the batch, each resharded to `spec("batch whole ...")`.

    From jax 0.11 on, a slice or reshape whose every dimension is 1 (one row, one token) loses its
    sharding, and what it is concatenated or mapped with has to have the same one.

    Args:
      tree: arrays [b ...]; returned unchanged where no mesh is set.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    placed = lambda x: jax.reshard(x, spec("batch" + " whole" * (x.ndim - 1)))
    return jax.tree.map(placed, tree)


def place(value: np.ndarray, axes: str) -> jax.Array:
    """A host array of this process, as (its part of) a global array."""
    return jax.make_array_from_process_local_data(named(axes), np.asarray(value))


def named(axes: str) -> NamedSharding:
    return NamedSharding(jax.sharding.get_mesh(), spec(axes))


def place_batch(batch: Batch) -> Batch:
    """The rows of this host, placed as one global batch over the mesh."""
    return jax.tree.map(lambda rows: place(rows, "batch length"), batch)
