# SPDX-License-Identifier: Apache-2.0
"""How a kernel is run: on which chip, or interpreted, and what its results look like to JAX."""

from dataclasses import dataclass
from typing import Literal

import jax

Platform = Literal["tpu", "gpu", "interpret"]


@dataclass(frozen=True)
class How:
    """Who runs a kernel: compiled for a TPU of some generation or by Triton for a GPU, or
    interpreted operation by operation (any backend, slow, for tests).

    generation is a TPU's: 4, 5 or 6 and up; it says how much fast memory there is. chip is jax's
    device_kind, by which measured blocks are found.
    """

    platform: Platform
    generation: int = 5
    chip: str = ""

    @property
    def interpret(self) -> bool:
        return self.platform == "interpret"


INTERPRETED = How("interpret")


def device() -> tuple[str, str]:
    """Platform and kind of the devices of the mesh in force, also of devices that are not here and
    are only compiled for; without a mesh, of JAX's own."""
    ahead = jax.sharding.get_abstract_mesh().abstract_device
    if ahead is not None:
        return ahead.platform, ahead.device_kind
    own = jax.devices()[0]
    return own.platform, own.device_kind


def like(shape: tuple[int, ...], dtype, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result: it varies over the mesh axes over which an operand does."""
    kinds = [jax.typeof(operand).manual_axis_type for operand in operands]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=kinds[0].update(varying=varying) if kinds else None
    )
