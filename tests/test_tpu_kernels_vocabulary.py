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

from t5x_lite.kernels import tiles
from t5x_lite.kernels.cross_entropy import fused_cross_entropy
from t5x_lite.kernels.head_choose import Draw, head_choose
from t5x_lite.kernels.vocabulary import VocabularyRule

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
    """function compiled for mesh; arrays are (shape, dtype, spec)."""
    place = lambda shape, dtype, spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    return jax.jit(function).trace(*(place(*array) for array in arrays)).lower().compile()


def trained(chip: str, sizes: tuple[int, int, int], dtype, rule: VocabularyRule, count: int = 1):
    """Losses and gradients of sizes (rows, width, vocab), compiled; v split over count chips."""
    rule = dataclasses.replace(rule, axes=("tensor",))
    how = tiles.How("tpu", int(chip[1]))
    table = P("tensor") if rule.tied else P(None, "tensor")
    losses = jax.shard_map(
        lambda *operands: fused_cross_entropy(*operands, rule, how),
        mesh=mesh_of(chip, count),
        in_specs=(P("data"), table, P("data")),
        out_specs=P("data"),
    )

    def both(hidden, table, targets):
        def objective(hidden, table):
            told = losses(hidden, table, targets)
            return told.objective.sum(), told

        return jax.value_and_grad(objective, (0, 1), has_aux=True)(hidden, table)

    rows, width, vocab = sizes
    shape = (vocab, width) if rule.tied else (width, vocab)
    arrays = (((rows, width), dtype, P()), (shape, dtype, table), ((rows,), jnp.int32, P()))
    return compiled(both, mesh_of(chip, count), *arrays)


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
    rule = VocabularyRule(tied, smoothing=0.1, z_loss=1e-4, softcap=30.0, scale=0.125)
    made = trained(chip, sizes, dtype, rule)
    rows, _, vocab = sizes
    if rows > 256:
        assert made.memory_analysis().temp_size_in_bytes < rows * vocab


def test_cross_entropy_of_a_split_vocabulary_compiles():
    rule = VocabularyRule(tied=True, smoothing=0.1, z_loss=1e-4)
    trained("v5e", (512, 128, 2048), jnp.bfloat16, rule, count=4)


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
    trained(chip, (4096, width, vocab), dtype, VocabularyRule(tied, 0.1, 1e-4))


def chosen(chip: str, sizes: tuple[int, int, int], dtype, rule: VocabularyRule, count: int = 1):
    """Tokens drawn for sizes (rows, width, vocab), and the best eight, compiled."""
    rule = dataclasses.replace(rule, axes=("tensor",))
    how = tiles.How("tpu", int(chip[1]))
    table = P("tensor") if rule.tied else P(None, "tensor")
    choose = jax.shard_map(
        lambda hidden, table, *draw: head_choose(hidden, table, rule, Draw(*draw), how, top_k=8),
        mesh=mesh_of(chip, count),
        in_specs=(P("data"), table, *[P("data")] * 4),
        out_specs=P("data"),
    )
    rows, width, vocab = sizes
    shape = (vocab, width) if rule.tied else (width, vocab)
    kinds = (jnp.float32, jnp.uint32, jnp.uint32, jnp.int32)
    draw = [((rows,), kind, P()) for kind in kinds]
    arrays = (((rows, width), dtype, P()), (shape, dtype, table), *draw)
    return compiled(choose, mesh_of(chip, count), *arrays)


@pytest.mark.parametrize(
    "chip, sizes, dtype, tied",
    [
        ("v4", (300, 96, 1000), jnp.float32, True),
        ("v4", (8, 512, 4096), jnp.bfloat16, False),
        ("v5e", (8, 768, 32128), jnp.bfloat16, True),
        ("v5p", (40, 64, 100), jnp.bfloat16, False),
        ("v6e", (30, 128, 1000), jnp.float32, False),
    ],
)
def test_the_choice_of_a_token_compiles_and_writes_no_logits(chip, sizes, dtype, tied):
    made = chosen(chip, sizes, dtype, VocabularyRule(tied, softcap=30.0, scale=0.125))
    rows, _, vocab = sizes
    if vocab > 2000:
        assert made.memory_analysis().temp_size_in_bytes < rows * vocab


def test_the_choice_from_a_split_vocabulary_compiles():
    chosen("v5e", (64, 128, 2048), jnp.bfloat16, VocabularyRule(tied=True), count=4)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows, width, vocab", [(8, 768, 32128), (512, 4096, 256000)])
def test_the_choice_compiles_at_full_size(chip, dtype, tied, rows, width, vocab):
    chosen(chip, (rows, width, vocab), dtype, VocabularyRule(tied))
