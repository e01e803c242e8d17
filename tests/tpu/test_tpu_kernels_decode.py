# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache compiles for TPUs that are not there."""

import dataclasses
import functools
import re
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from packaging.version import Version

from t5x_lite.kernels.backend import Backend
from t5x_lite.kernels.decode import api as decode
from t5x_lite.kernels.decode.mask import CacheMask
from t5x_lite.kernels.relative import RelativePositionBias
from t5x_lite.model.cache_slots import write_rows

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which the test extra brings")

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@functools.cache
def chip(name: str) -> SingleDeviceSharding:
    """One chip, described."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(CHIPS[name], platform="tpu").devices[0]
    return SingleDeviceSharding(device)


def compiled(name, call, shapes):
    """Compiles a call for a chip; nothing is computed.

    Args:
      name: of the chip.
      call: function of the arrays and the backend.
      shapes: of the arrays.
    """
    place = chip(name)
    backend = Backend("tpu", int(name[1]))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    return jax.jit(lambda *x: call(*x, backend)).trace(*shapes).lower().compile()


def source_of(heads, slots, size, dtype, width=4, **mask) -> tuple:
    """Shapes of a query block (a tree where it has ancestors), and of the keys and values.

    Args:
      heads: of keys, and queries for each of them.
      slots: of the cache.
      size: of a head.
      dtype: of queries, keys and values.
      width: tokens of the block.
      **mask: parts of the mask and the bias that exist.
    """
    (k, g), rows = heads, 2
    array = jax.ShapeDtypeStruct
    cache = array((rows, k, slots, size), dtype)
    numbers = {
        "ancestors": array((width, width), bool),
        "depth": array((width,), jnp.int32),
        "prefix": array((rows,), jnp.int32),
        "window_size": array((2,), jnp.int32),
    }
    fields = {name: numbers[name] for name in mask.get("parts", ())}
    block = CacheMask(array((rows,), jnp.int32), width, slots, **fields)
    bias = None
    if mask.get("bias"):
        bias = RelativePositionBias(array((32, k * g), jnp.float32), 128, False)
    return array((rows, width, k, g, size), dtype), decode.AttentionSource(
        cache, cache, block, bias
    )


TREE = ("ancestors", "depth")
CASES = {
    "t5": dict(heads=(12, 1), slots=200, bias=True),
    "t5_tree": dict(heads=(12, 1), slots=512, bias=True, parts=TREE),
    "gemma": dict(heads=(4, 2), slots=1100, parts=("window_size",)),
    "gemma_tree": dict(heads=(2, 4), slots=1100, parts=(*TREE, "window_size")),
    "prefix": dict(heads=(2, 1), slots=50, parts=("prefix", "window_size"), bias=True),
    "prefill": dict(
        heads=(1, 4), slots=1024, width=900, parts=("prefix", "window_size"), bias=True
    ),
    "largest_tree": dict(
        heads=(1, 8), slots=4096, width=64, parts=(*TREE, "window_size"), bias=True
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, case, size, dtype",
    [
        ("v4", "t5_tree", 64, jnp.bfloat16),
        ("v4", "gemma_tree", 256, jnp.float32),
        ("v5e", "t5", 64, jnp.bfloat16),
        ("v5e", "gemma_tree", 128, jnp.bfloat16),
        ("v5e", "t5_tree", 96, jnp.float32),
        ("v5p", "gemma", 256, jnp.bfloat16),
        ("v5p", "t5_tree", 64, jnp.float32),
        ("v6e", "gemma_tree", 96, jnp.bfloat16),
        ("v6e", "prefix", 128, jnp.float32),
        ("v4", "largest_tree", 256, jnp.float32),
        ("v5e", "prefill", 256, jnp.float32),
    ],
)
def test_a_block_over_its_cache_compiles(name, case, size, dtype):
    compile_case(name, case, size, dtype)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("name", CHIPS)
def test_a_block_over_its_cache_compiles_everywhere(name, size, dtype):
    for case in ("t5_tree", "gemma_tree", "prefix"):
        compile_case(name, case, size, dtype)


def compile_case(name, case, size, dtype):
    """Compiles one of CASES.

    Args:
      name: of the chip.
      case: its key in CASES.
      size: of a head.
      dtype: of queries, keys and values.
    """

    def attend(q, source, backend):
        return decode.decode_attention(q, source, 30.0, backend)

    compiled(name, attend, source_of(size=size, dtype=dtype, **CASES[case]))


@pytest.mark.parametrize("size", [64, 128])
def test_a_cache_is_read_where_it_lies(size):
    q, source = source_of((8, 1), 512, size, jnp.bfloat16, bias=True)

    def attend(q, source, backend):
        return decode.decode_attention(q, source, None, backend)

    whole = compiled("v5e", attend, (q, source))
    cache = 2 * 2 * 8 * 512 * size * 2
    # Copied into another layout, or padded to whole lanes, it would be read twice or more.
    assert cache <= whole.cost_analysis()["bytes accessed"] < 1.3 * cache
    assert whole.memory_analysis().temp_size_in_bytes < 0.1 * cache


# libtpu 0.0.42 moves a cache of heads of 64; 0.0.46 does not.
MOVES_NARROW_HEADS = Version(metadata.version("libtpu")) < Version("0.0.46")


@pytest.mark.parametrize(
    "size",
    [pytest.param(64, marks=pytest.mark.skipif(MOVES_NARROW_HEADS, reason="an old libtpu")), 128],
)
def test_a_loop_that_writes_and_reads_a_cache_never_moves_it(size):
    q, source = source_of((4, 1), 384, size, jnp.bfloat16, bias=True)

    def decoded(q, source, backend):
        def body(_, carry):
            q, keys, values, index = carry
            block = jnp.swapaxes(q[:, :, :, 0], 1, 2)
            keys, values = write_rows(keys, block, index), write_rows(values, block, index)
            mask = dataclasses.replace(source.mask, index=index)
            written = source._replace(keys=keys, values=values, mask=mask)
            return decode.decode_attention(q, written, None, backend), keys, values, index + 4

        return jax.lax.fori_loop(0, 9, body, (q, *source[:2], source.mask.index))

    text = compiled("v5e", decoded, (q, source)).as_text()
    assert f"bf16[2,4,384,{size}]" in text
    assert not re.findall(rf"= bf16\[2,4,(?:384,{size}|{size},384)\]\S* (?:copy|transpose)\(", text)


@pytest.mark.parametrize("name, size, dtype", [("v4", 64, jnp.float32), ("v5e", 128, jnp.bfloat16)])
def test_past_and_inputs_in_one_softmax_compile(name, size, dtype):
    q, past = source_of((2, 2), 300, size, dtype)
    _, inputs = source_of((2, 2), 500, size, dtype)
    inputs = inputs._replace(mask=jax.ShapeDtypeStruct((2, 500), bool))

    def merge(q, past, inputs, backend):
        return decode.merged_decode_attention(q, (past, inputs), None, backend)

    compiled(name, merge, (q, past, inputs))
