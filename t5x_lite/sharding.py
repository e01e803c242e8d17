# SPDX-License-Identifier: Apache-2.0
"""The mesh, the one table from named axes to mesh axes, and how arrays get onto devices.

Weights and activations name their axes; only `RULES` knows the mesh. FSDP and tensor parallelism
are rows of this table, not other code.
"""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_lite import config
from t5x_lite.batch import Batch

AXES = ("data", "fsdp", "tensor")

# Activations: batch length width whole. Weights: the rest; `embed` is what FSDP splits, and it
# becomes `width` (whole again) at the moment of use. `encoder_embed` is the width of an encoder
# beside a decoder of another one.
RULES = {
    "batch": ("data", "fsdp"),
    "length": None,
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
}


def spec(axes: str) -> P:
    """The placement of an array whose axes are named, e.g. spec("batch length width")."""
    return P(*(RULES[axis] for axis in axes.split()))


def mesh_shape(cfg: config.Mesh, devices: int) -> tuple[int, int, int]:
    """Devices per axis, with -1 filled in.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    if -1 in sizes:
        rest = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = max(1, devices // rest)
    if int(np.prod(sizes)) != devices:
        raise ValueError(
            f"Mesh data={cfg.data} fsdp={cfg.fsdp} tensor={cfg.tensor} covers "
            f"{int(np.prod(sizes))} devices, but there are {devices}: change the Mesh bindings"
        )
    return tuple(sizes)


def use_mesh(cfg: config.Mesh, devices: list | None = None) -> jax.sharding.Mesh:
    """Makes the mesh over devices (all of them unless given) and sets it for what follows."""
    devices = jax.devices() if devices is None else devices
    mesh = jax.make_mesh(mesh_shape(cfg, len(devices)), AXES, devices=devices)
    jax.set_mesh(mesh)
    return mesh


def batch_shards() -> int:
    """How many parts the batch is split into: a batch size must be a multiple of it."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return sizes["data"] * sizes["fsdp"]


def place(value: np.ndarray, axes: str) -> jax.Array:
    """A host array of this process, as (its part of) a global array."""
    return jax.make_array_from_process_local_data(named(axes), np.asarray(value))


def named(axes: str) -> NamedSharding:
    return NamedSharding(jax.sharding.get_mesh(), spec(axes))


def place_batch(batch: Batch) -> Batch:
    """The rows of this host, placed as one global batch over the mesh."""
    return jax.tree.map(lambda rows: place(rows, "batch length"), batch)
