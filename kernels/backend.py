# SPDX-License-Identifier: Apache-2.0
"""Backends of the kernels, the device that is compiled for, and how arrays are split over it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax

Platform = Literal["tpu", "gpu", "interpret", "cudnn"]


@dataclass(frozen=True)
class Backend:
    """Device of a kernel: a TPU (Mosaic), a GPU (Mosaic GPU or Triton), or the interpreter.

    The interpreter runs a kernel operation by operation on any device. It is slow, for tests.
    "cudnn" is no kernel of ours: on a GPU, cuDNN's attention where it can, plain XLA elsewhere.

    Attributes:
      platform: "tpu", "gpu", "interpret" or "cudnn".
      generation: of a TPU: 4, 5 or 6 and up; it decides how much vector memory there is.
      chip: jax's device_kind, by which measured block sizes are looked up.
      ring: keys and values of a row that is split over devices rotate, instead of being gathered.
    """

    platform: Platform
    generation: int = 5
    chip: str = ""
    ring: bool = False

    @property
    def interpret(self) -> bool:
        """True where Pallas interprets the kernel instead of compiling it."""
        return self.platform == "interpret"


INTERPRETED = Backend("interpret")
# Names of Hopper GPUs in jax's device_kind.
HOPPER = ("H100", "H200", "H800", "H20", "GH200")
CUDNN = Backend("cudnn")


def has_kernels(backend: Backend | None) -> bool:
    """Returns True if kernels of ours run; without, masks and biases are arrays of all pairs."""
    return backend is not None and backend != CUDNN


class TargetDevice(NamedTuple):
    """A device that programs are compiled for.

    Attributes:
      platform: jax's platform, for example "cpu" or "tpu".
      kind: jax's device_kind, for example "TPU v5 lite".
    """

    platform: str
    kind: str


def target_device() -> TargetDevice:
    """Returns the device of the mesh in force, without a mesh JAX's default one.

    The devices of a mesh may be absent: then they are only compiled for.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return TargetDevice(described.platform, described.device_kind)
    default = jax.devices()[0]
    return TargetDevice(default.platform, default.device_kind)


def output_shape(shape: tuple[int, ...], dtype, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns the type of a kernel's result, as `pallas_call(out_shape=...)` takes it.

    Inside a shard_map it varies over the mesh axes over which an operand does.

    Args:
      shape: shape of the result.
      dtype: dtype of the result.
      *operands: arrays that the result depends on.
    """
    types = [jax.typeof(operand).manual_axis_type for operand in operands]
    varying = frozenset().union(*(kind.varying for kind in types))
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=types[0].update(varying=varying) if types else None
    )


def mesh_axes(x: jax.Array) -> tuple:
    """Returns for each axis of x the mesh axes over which it is split, None where it is not."""
    spec = jax.typeof(x).sharding.spec.partitions
    return spec + (None,) * (x.ndim - len(spec))


def partition_spec(*axes) -> jax.sharding.PartitionSpec | None:
    """Returns the PartitionSpec of a result, axis by axis; None without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return jax.sharding.PartitionSpec(*axes)
