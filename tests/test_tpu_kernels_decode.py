# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache compiles for TPUs that are not there."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from t5x_lite.kernels import block_decode_attention as decode
from t5x_lite.kernels import tiles
from t5x_lite.kernels.block_sight import BlockSight
from t5x_lite.kernels.relative import Relative
from t5x_lite.model.cache import write_rows

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which the test extra brings")

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@functools.cache
def chip(name: str) -> SingleDeviceSharding:
    """One chip, described."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(CHIPS[name], platform="tpu").devices[0]
    return SingleDeviceSharding(device)


def compiled(name, call, shapes):
    """call compiled for a chip; nothing is computed."""
    place = chip(name)
    how = tiles.How("tpu", int(name[1]))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    return jax.jit(lambda *x: call(*x, how)).trace(*shapes).lower().compile()


def source_of(heads, slots, size, dtype, width=4, **sight) -> tuple:
    """Shapes of a query block (a tree where it has ancestors) and of what it looks at."""
    (k, g), rows = heads, 2
    array = jax.ShapeDtypeStruct
    cache = array((rows, k, slots, size), dtype)
    numbers = {
        "ancestors": array((width, width), bool),
        "depth": array((width,), jnp.int32),
        "prefix": array((rows,), jnp.int32),
        "reach": array((2,), jnp.int32),
    }
    fields = {name: numbers[name] for name in sight.get("rules", ())}
    block = BlockSight(array((rows,), jnp.int32), width, slots, **fields)
    relative = None
    if sight.get("bias"):
        relative = Relative(array((32, k * g), jnp.float32), 128, False)
    return array((rows, width, k, g, size), dtype), decode.Source(cache, cache, block, relative)


TREE = ("ancestors", "depth")
CASES = {
    "t5": dict(heads=(12, 1), slots=200, bias=True),
    "t5_tree": dict(heads=(12, 1), slots=512, bias=True, rules=TREE),
    "gemma": dict(heads=(4, 2), slots=1100, rules=("reach",)),
    "gemma_tree": dict(heads=(2, 4), slots=1100, rules=(*TREE, "reach")),
    "prefix": dict(heads=(2, 1), slots=50, rules=("prefix", "reach"), bias=True),
    "prefill": dict(heads=(1, 4), slots=1024, width=900, rules=("prefix", "reach"), bias=True),
    "largest_tree": dict(heads=(1, 8), slots=4096, width=64, rules=(*TREE, "reach"), bias=True),
}


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
    attend = lambda q, source, how: decode.attend(q, source, 30.0, how)
    compiled(name, attend, source_of(size=size, dtype=dtype, **CASES[case]))


@pytest.mark.parametrize("size", [64, 128])
def test_a_cache_is_read_where_it_lies(size):
    q, source = source_of((8, 1), 512, size, jnp.bfloat16, bias=True)
    attend = lambda q, source, how: decode.attend(q, source, None, how)
    whole = compiled("v5e", attend, (q, source))
    cache = 2 * 2 * 8 * 512 * size * 2
    # Copied into another layout, or padded to whole lanes, it would be read twice or more.
    assert cache <= whole.cost_analysis()["bytes accessed"] < 1.3 * cache
    assert whole.memory_analysis().temp_size_in_bytes < 0.1 * cache


@pytest.mark.parametrize("size", [64, 128])
def test_a_loop_that_writes_and_reads_a_cache_never_moves_it(size):
    q, source = source_of((4, 1), 384, size, jnp.bfloat16, bias=True)

    def decoded(q, source, how):
        def body(_, carry):
            q, keys, values, index = carry
            block = jnp.swapaxes(q[:, :, :, 0], 1, 2)
            keys, values = write_rows(keys, block, index), write_rows(values, block, index)
            sight = dataclasses.replace(source.sight, index=index)
            own = source._replace(keys=keys, values=values, sight=sight)
            return decode.attend(q, own, None, how), keys, values, index + 4

        return jax.lax.fori_loop(0, 9, body, (q, *source[:2], source.sight.index))

    text = compiled("v5e", decoded, (q, source)).as_text()
    assert f"bf16[2,4,384,{size}]" in text
    assert not re.findall(rf"= bf16\[2,4,(?:384,{size}|{size},384)\]\S* (?:copy|transpose)\(", text)


@pytest.mark.parametrize("name, size, dtype", [("v4", 64, jnp.float32), ("v5e", 128, jnp.bfloat16)])
def test_past_and_inputs_in_one_softmax_compile(name, size, dtype):
    q, past = source_of((2, 2), 300, size, dtype)
    _, inputs = source_of((2, 2), 500, size, dtype)
    inputs = inputs._replace(sight=jax.ShapeDtypeStruct((2, 500), bool))
    merge = lambda q, past, inputs, how: decode.merged_decode_attention(
        q, (past, inputs), None, how
    )
    compiled(name, merge, (q, past, inputs))
