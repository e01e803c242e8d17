# SPDX-License-Identifier: Apache-2.0
"""Flash attention compiles for TPUs that are not there, forward and backward."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive
from flash_toys import Kind, assembled, case

from t5x_lite.kernels.backend import Backend
from t5x_lite.kernels.flash.api import AttentionSource, flash_attention
from t5x_lite.kernels.mask import Mask

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which the test extra brings")

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16}


def chip_place(chip: str):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(CHIPS[chip], platform="tpu")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compiled(chip: str, kind: Kind, dtype: str):
    """Compiles the gradient with respect to every argument for one chip.

    Args:
      chip: its name.
      kind: of attention.
      dtype: key in DTYPES.
    """
    place = chip_place(chip)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        case(kind, 0, DTYPES[dtype]),
    )
    backend = Backend("tpu", int(chip[1]))

    def everything(q, sources, gradient):
        parts = [(x.keys, x.values, None if x.bias is None else x.bias.table) for x in sources]

        def context(q, parts):
            assembled_sources = tuple(map(assembled, sources, parts))
            return flash_attention(q, assembled_sources, kind.softcap, backend)[0]

        value, pull = jax.vjp(context, q, parts)
        return value, pull(gradient)

    return jax.jit(everything).trace(*arguments).lower().compile()


ALL = Kind(causal=True, prefix=True, window=True, offset=True, softcap=30.0, second=100)
SPREAD = [
    ("v4", Kind(heads=(2, 1, 64), lengths=(512, 512)), "bfloat16"),
    ("v4", Kind(heads=(1, 1, 256), lengths=(90, 200)), "float32"),
    ("v5e", ALL._replace(heads=(1, 3, 64)), "bfloat16"),
    ("v5e", Kind(heads=(3, 1, 96), lengths=(114, 114), causal=True), "float32"),
    ("v5p", ALL._replace(heads=(1, 2, 128)), "float32"),
    ("v5p", Kind(heads=(1, 1, 64), lengths=(114, 300)), "float32"),
    ("v6e", ALL._replace(heads=(2, 1, 96)), "bfloat16"),
    ("v6e", Kind(heads=(1, 2, 256), causal=True, window=True), "bfloat16"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "chip, kind, dtype", mark_exhaustive(SPREAD, kept=[SPREAD[k] for k in (1, 2, 3, 7)])
)
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


@pytest.mark.slow
def test_heads_of_64_are_not_padded_in_memory():
    """Two share 128 lanes, as a projection leaves them: nothing the size of an array is copied."""
    b, t, n, h = 4, 512, 12, 64
    flat = jax.ShapeDtypeStruct((b, t, n * h), jnp.bfloat16, sharding=chip_place("v5e"))
    segments = jax.ShapeDtypeStruct((b, t), jnp.int32, sharding=flat.sharding)

    def context(q, k, v, segments):
        keys, values = (jnp.swapaxes(x.reshape(b, t, n, h), 1, 2) for x in (k, v))
        source = AttentionSource(keys, values, Mask(segments, segments))
        y, _ = flash_attention(q.reshape(b, t, n, 1, h), (source,), None, Backend("tpu", 5))
        return y.reshape(b, t, n * h)

    def gradients(q, k, v, segments, gradient):
        value, pull = jax.vjp(lambda *x: context(*x, segments), q, k, v)
        return value, pull(gradient)

    both = jax.jit(gradients).trace(flat, flat, flat, segments, flat).lower().compile()
    assert both.memory_analysis().temp_size_in_bytes < b * t * n * h * 2
