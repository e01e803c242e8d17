# SPDX-License-Identifier: Apache-2.0
"""Backends for the kernels of a test: the accelerator that JAX has here, or the interpreter.

JAX_PLATFORMS=cuda pytest tests/kernels       # Triton's kernels compiled
JAX_PLATFORMS=tpu,cpu pytest tests/kernels    # Mosaic's; float64 is computed on the CPU
"""

import contextlib

import jax
import pytest

from t5x_lite.kernels import dispatch
from t5x_lite.kernels.backend import INTERPRETED, Backend, Platform, target_device


def backend_for(platform: Platform) -> Backend:
    """Compiled where JAX's own device is of this platform, interpreted elsewhere."""
    device = target_device()
    if device.platform != platform:
        return INTERPRETED
    if platform == "gpu":
        return Backend("gpu")
    return Backend("tpu", dispatch.tpu_generation(device.kind), device.kind)


def described_gpu(kind: str = "NVIDIA H100 80GB HBM3") -> contextlib.AbstractContextManager:
    """Target of lowering, in a `with` block: one GPU of this kind, which need not be there.

    From jax 0.11 on a Triton kernel is lowered for a known kind of GPU only; 0.10.2 takes any.
    """
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    # No axes: the program is that of a single device.
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu))


def float64() -> contextlib.AbstractContextManager:
    """Computes what kernels are compared with where float64 is: not on a TPU."""
    on_tpu = jax.default_backend() == "tpu"
    return jax.default_device(jax.devices("cpu")[0]) if on_tpu else contextlib.nullcontext()


def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> jax.sharding.Mesh:
    """A mesh of Auto axes; skips the test where there are not so many devices."""
    wanted = 1
    for size in shape:
        wanted *= size
    if jax.device_count() < wanted:
        pytest.skip(f"needs {wanted} devices, there are {jax.device_count()}")
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
