# SPDX-License-Identifier: Apache-2.0
"""The kernels over the vocabulary compile for every TPU generation, and hold no logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_lite.kernels.backend import Backend
from t5x_lite.kernels.vocabulary.cross_entropy import fused_cross_entropy
from t5x_lite.kernels.vocabulary.logits import CrossEntropyConfig

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which the test extra brings")

DTYPES = (jnp.float32, jnp.bfloat16)
CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@functools.cache
def mesh_of(chip: str, count: int) -> Mesh:
    """A mesh [1 count] of chips that are not there."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[:count]
    devices = np.array(devices).reshape(1, count)
    return Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def compiled(function, mesh, *arrays):
    """Compiles a function for a mesh.

    Args:
      function: of the arrays.
      mesh: of the devices.
      *arrays: shape, dtype and spec of each argument.
    """
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in arrays
    ]
    return jax.jit(function).trace(*shapes).lower().compile()


def trained(
    chip: str, sizes: tuple[int, int, int], dtype, config: CrossEntropyConfig, count: int = 1
):
    """Compiles losses and gradients; the vocabulary is split over the chips.

    Args:
      chip: its name.
      sizes: rows, width and vocabulary.
      dtype: of hidden states and table.
      config: of the kernel.
      count: number of chips.
    """
    config = dataclasses.replace(config, axes=("tensor",))
    backend = Backend("tpu", int(chip[1]))
    table = P("tensor") if config.tied else P(None, "tensor")
    losses = jax.shard_map(
        lambda *operands: fused_cross_entropy(*operands, config, backend),
        mesh=mesh_of(chip, count),
        in_specs=(P("data"), table, P("data")),
        out_specs=P("data"),
    )

    def both(hidden, table, targets):
        def objective(hidden, table):
            token_losses = losses(hidden, table, targets)
            return token_losses.objective.sum(), token_losses

        return jax.value_and_grad(objective, (0, 1), has_aux=True)(hidden, table)

    rows, width, vocab = sizes
    shape = (vocab, width) if config.tied else (width, vocab)
    arrays = (((rows, width), dtype, P()), (shape, dtype, table), ((rows,), jnp.int32, P()))
    return compiled(both, mesh_of(chip, count), *arrays)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chip, sizes, dtype, tied",
    [
        ("v4", (300, 96, 1000), jnp.float32, True),
        ("v4", (1824, 512, 4096), jnp.bfloat16, False),
        ("v5e", (1824, 768, 4100), jnp.bfloat16, True),
        ("v5p", (40, 64, 100), jnp.bfloat16, False),
        ("v6e", (300, 128, 1000), jnp.float32, False),
    ],
)
def test_cross_entropy_and_its_gradients_compile_and_hold_no_logits(chip, sizes, dtype, tied):
    config = CrossEntropyConfig(tied, smoothing=0.1, z_loss=1e-4, softcap=30.0, scale=0.125)
    program = trained(chip, sizes, dtype, config)
    rows, _, vocab = sizes
    if rows > 256:
        assert program.memory_analysis().temp_size_in_bytes < rows * vocab


def test_cross_entropy_of_a_split_vocabulary_compiles():
    config = CrossEntropyConfig(tied=True, smoothing=0.1, z_loss=1e-4)
    trained("v5e", (512, 128, 2048), jnp.bfloat16, config, count=4)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "width, vocab, tied, dtype",
    [
        *((768, 32128, tied, dtype) for tied in (True, False) for dtype in DTYPES),
        (2048, 250112, False, jnp.bfloat16),
    ],
)
def test_cross_entropy_compiles_at_full_size(chip, dtype, tied, width, vocab):
    trained(chip, (4096, width, vocab), dtype, CrossEntropyConfig(tied, 0.1, 1e-4))
