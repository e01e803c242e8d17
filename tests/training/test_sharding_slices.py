# SPDX-License-Identifier: Apache-2.0
"""Slices that a data-center network joins: the data axis spans them, no other one does."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from t5x_lite import config, sharding


@dataclass(frozen=True)
class Device:
    """Device with the attributes that a mesh reads.

    Attributes:
      id: its number.
      slice_index: number of its slice.
      process_index: number of its process.
      platform: not that of a TPU.
      device_kind: nor its kind.
    """

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "none"
    device_kind: str = "none"


SIXTEEN = [Device(number, number // 8) for number in range(16)]


@pytest.mark.parametrize(
    "mesh", [config.Mesh(-1, 4), config.Mesh(2, 2, 2, 2), config.Mesh(4, 1, 4)]
)
def test_only_the_data_axis_leaves_a_slice(mesh):
    sizes = sharding.mesh_sizes(mesh, 16)
    grid = sharding.slice_devices(sizes, 2, SIXTEEN)
    assert grid.shape == tuple(sizes.values())
    assert sorted(device.id for device in grid.flat) == list(range(16))
    slices = np.vectorize(lambda device: device.slice_index, otypes=[int])(grid)
    rows = slices.reshape(sizes["data"], -1)
    assert (rows == rows[:, :1]).all()
    assert sorted(set(rows[:, 0])) == [0, 1]


def test_other_slices_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"16 devices are of 2 slices: bind Mesh.slices = 2"):
        sharding.slice_devices({"data": 4, "fsdp": 4, "tensor": 1}, 4, SIXTEEN)
    with pytest.raises(ValueError, match=r"Mesh.data=1 must be a multiple of Mesh.slices=2"):
        sharding.slice_devices({"data": 1, "fsdp": 16, "tensor": 1}, 2, SIXTEEN)
    with pytest.raises(ValueError, match="bind Mesh.slices = 1"):
        sharding.use_mesh(config.Mesh(slices=2), jax.devices())
    with pytest.raises(ValueError, match="at least 1"):
        config.Mesh(slices=0)
