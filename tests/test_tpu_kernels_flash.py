# SPDX-License-Identifier: Apache-2.0
"""Flash attention compiles for TPUs that are not there, forward and backward."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_toys import Kind, assembled, case

from t5x_lite.kernels.flash_attention import Source, flash_attention
from t5x_lite.kernels.sight import Sight
from t5x_lite.kernels.tiles import How

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which the test extra brings")

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16}


def chip_place(chip: str):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(CHIPS[chip], platform="tpu")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compiled(chip: str, kind: Kind, dtype: str):
    """The gradient in everything, compiled for one chip."""
    place = chip_place(chip)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    given = jax.tree.map(shape, case(kind, 0, DTYPES[dtype]))
    how = How("tpu", int(chip[1]))

    def everything(q, sources, gradient):
        parts = [
            (x.keys, x.values, None if x.relative is None else x.relative.table) for x in sources
        ]
        call = lambda q, parts: flash_attention(
            q, tuple(map(assembled, sources, parts)), kind.softcap, how
        )
        value, pull = jax.vjp(call, q, parts)
        return value, pull(gradient)

    return jax.jit(everything).trace(*given).lower().compile()


ALL = Kind(causal=True, prefix=True, reach=True, offset=True, softcap=30.0, second=100)
SPREAD = [
    ("v4", Kind(heads=(2, 1, 64), lengths=(512, 512)), "bfloat16"),
    ("v4", Kind(heads=(1, 1, 256), lengths=(90, 200)), "float32"),
    ("v5e", ALL._replace(heads=(1, 3, 64)), "bfloat16"),
    ("v5e", Kind(heads=(3, 1, 96), lengths=(114, 114), causal=True), "float32"),
    ("v5p", ALL._replace(heads=(1, 2, 128)), "float32"),
    ("v5p", Kind(heads=(1, 1, 64), lengths=(114, 300)), "float32"),
    ("v6e", ALL._replace(heads=(2, 1, 96)), "bfloat16"),
    ("v6e", Kind(heads=(1, 2, 256), causal=True, reach=True), "bfloat16"),
]


@pytest.mark.parametrize("chip, kind, dtype", SPREAD)
def test_both_ways_compile(chip, kind, dtype):
    compiled(chip, kind, dtype)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "chip, head, dtype", list(itertools.product(CHIPS, (64, 96, 128, 256), sorted(DTYPES)))
)
def test_whole_blocks_of_every_head_size_fit_every_chip(chip, head, dtype):
    lengths = (1100, 1030)
    compiled(chip, Kind(heads=(2, 1, head), lengths=lengths, causal=True, second=600), dtype)


def test_heads_of_64_are_not_padded_in_memory():
    """Two share 128 lanes, as a projection leaves them: nothing the size of an array is copied."""
    b, t, n, h = 4, 512, 12, 64
    flat = jax.ShapeDtypeStruct((b, t, n * h), jnp.bfloat16, sharding=chip_place("v5e"))
    segments = jax.ShapeDtypeStruct((b, t), jnp.int32, sharding=flat.sharding)

    def context(q, k, v, segments):
        key_heads = lambda x: jnp.swapaxes(x.reshape(b, t, n, h), 1, 2)
        source = Source(key_heads(k), key_heads(v), Sight(segments, segments))
        y = flash_attention(q.reshape(b, t, n, 1, h), (source,), None, How("tpu", 5))
        return y.reshape(b, t, n * h)

    def gradients(q, k, v, segments, gradient):
        value, pull = jax.vjp(lambda *x: context(*x, segments), q, k, v)
        return value, pull(gradient)

    both = jax.jit(gradients).trace(flat, flat, flat, segments, flat).lower().compile()
    assert both.memory_analysis().temp_size_in_bytes < b * t * n * h * 2
