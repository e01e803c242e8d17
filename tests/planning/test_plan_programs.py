# SPDX-License-Identifier: Apache-2.0
"""Compiled programs read from their text: how often loops run, FLOPs, bytes, who talks to whom."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from t5x_lite.planning import chips, collectives, counted, hlo, trips

SHAPE = (16, 32)


def program_text(function, *arguments) -> str:
    """Text of the compiled program of a function."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arguments]
    return jax.jit(function).lower(*shapes).compile().as_text()


def program(function, *arguments) -> hlo.Module:
    """Parsed program of a function."""
    return hlo.parse_module(program_text(function, *arguments))


def work(module: hlo.Module) -> counted.ProgramCost:
    """Cost of a program."""
    return counted.program_cost(module, trips.executions(module))


@pytest.fixture(autouse=True)
def without_mesh():
    with jax.set_mesh(None):
        yield


@pytest.mark.parametrize("outer, inner", [(1, 1), (3, 5), (7, 2)])
def test_products_in_nested_loops_count_as_often_as_they_run(outer, inner):
    def nested(x, weights):

        def turn(x, _):
            return (jnp.tanh(x @ weights), None)

        def around(x, _):
            return (jax.lax.scan(turn, x, length=inner)[0] + 1, None)

        return jax.lax.scan(around, x, length=outer)[0]

    result = work(program(nested, SHAPE, (32, 32)))
    assert result.flops == outer * inner * 2 * 16 * 32 * 32


def test_a_loop_that_ends_by_data_counts_once_and_is_told():
    def until(x, weights):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ weights, x)

    module = program(until, SHAPE, (32, 32))
    run = trips.executions(module)
    assert len(run.unknown) == 1
    assert counted.program_cost(module, run).flops == 2 * 16 * 32 * 32


def test_loops_count_down_and_from_elsewhere_than_zero():
    def turns(x, weights):
        return jax.lax.fori_loop(3, 11, lambda _, x: x @ weights, x)

    assert work(program(turns, SHAPE, (32, 32))).flops == 8 * 2 * 16 * 32 * 32


NOTED = """\
HloModule noted

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %y = f32[8,8]{1,0:T(8,128)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], /*index=1*/f32[8,8]{1,0:T(8,128)S(1)}) tuple(%i, %y)
}

%condition (p.1: (s32[], f32[8,8])) -> pred[] {
  %p.1 = (s32[], f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  ROOT %r = pred[]{:T(512)} custom-call(%p.1), custom_call_target="of data"
}

ENTRY %main (a: f32[8,8]) -> (s32[], f32[8,8]) {
  %a = f32[8,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %b = f32[8,8]{1,0:T(8,128)S(1)} copy(%a)
  %begin = (s32[], f32[8,8]{1,0:T(8,128)S(1)}) tuple(%zero, %b)
  ROOT %w = (s32[], f32[8,8]{1,0:T(8,128)S(1)}) while(%begin), condition=%condition, body=%body NOTE
}
"""


def test_a_noted_trip_count_is_believed_and_fast_memory_costs_no_bytes():
    noted = NOTED.replace("NOTE", ', backend_config={"known_trip_count":{"n":"6"}}')
    result = work(hlo.parse_module(noted))
    # The copy reads 256 bytes of HBM into fast memory; every product writes 256 bytes to HBM.
    assert result == counted.ProgramCost(flops=6 * 2 * 8**3, moved=256 + 6 * 256)
    assert trips.executions(hlo.parse_module(NOTED.replace("NOTE", ""))).unknown == ("w",)


ELEMENT = re.compile(r"^ *%(\S+) = .* get-tuple-element\(%([\w.\-]+)\), index=(\d+).*\n", re.M)


def compact(text: str) -> str:
    """A program as XLA's compact dumps write it (those of jaxlib 0.12): `%loop#0` where an element
    of a tuple is used, and no instruction for it."""
    sources = {name: (source, index) for name, source, index in ELEMENT.findall(text)}

    def used(name: str) -> str:
        if name not in sources:
            return name
        source, index = sources[name]
        return f"{used(source)}#{index}"

    return hlo.NAME.sub(lambda match: f"%{used(match[1])}", ELEMENT.sub("", text))


def in_loop(x, weights):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ weights), jnp.sum(x)), x, length=6)


NESTED = """\
HloModule nested

ENTRY %main (p: (f32[4], (f32[8], (s32[], bf16[2,3])))) -> bf16[2,3] {
  %p = (f32[4]{0}, /*index=1*/(f32[8]{0:T(8)S(1)}, (s32[], bf16[2,3]{1,0:T(2,128)(2,1)}))) parameter(0)
  %second = (f32[8]{0:T(8)S(1)}, (s32[], bf16[2,3]{1,0:T(2,128)(2,1)})) get-tuple-element(%p), index=1
  %fast = f32[8]{0:T(8)S(1)} get-tuple-element(%second), index=0
  %inner = (s32[], bf16[2,3]{1,0:T(2,128)(2,1)}) get-tuple-element(%second), index=1
  %matrix = bf16[2,3]{1,0:T(2,128)(2,1)} get-tuple-element(%inner), index=1
  %sine = f32[8]{0} sine(%fast)
  ROOT %copy = bf16[2,3]{1,0:T(2,128)(2,1)} copy(%matrix)
}
"""  # noqa: E501


@pytest.mark.parametrize("kind", ["a loop", "its trips unnoted", "nested tuples"])
def test_elements_of_tuples_written_where_they_are_used_are_the_same_program(kind):
    text = NESTED if kind == "nested tuples" else program_text(in_loop, SHAPE, (32, 32))
    if kind == "its trips unnoted":
        text = re.sub(r"known_trip_count", "", text)
    assert "get-tuple-element" in text and "#" not in text and "#1" in compact(text)
    spelled, short = hlo.parse_module(text), hlo.parse_module(compact(text))
    assert trips.executions(short) == trips.executions(spelled)
    assert work(short) == work(spelled) and not trips.executions(short).unknown
    # Every instruction, with the operation, arrays and memory spaces of all its operands.
    for name, computation in spelled.computations.items():
        assert described(short.computations[name]) == described(computation)


def described(computation: hlo.Computation) -> list:
    """Each instruction that is not an element of a tuple, and what it reads."""
    kept = [x for x in computation.instructions.values() if x.operation != "get-tuple-element"]
    read = [[computation.instructions[name] for name in x.operands] for x in kept]
    return [
        (x.name, x.operation, x.arrays, [(y.operation, y.arrays) for y in operands])
        for x, operands in zip(kept, read, strict=True)
    ]


@pytest.mark.parametrize(
    "estimate",
    [
        '"flops":"70","transcendentals":"5","bytes_accessed":"64"',
        '"bytes_accessed":"64","flops":"70"',
    ],
)
def test_a_kernel_costs_what_it_tells_in_whatever_order(estimate):
    text = """\
ENTRY %main (a: f32[4]) -> f32[12] {
  %a = f32[4]{0} parameter(0)
  ROOT %k = f32[12]{0:S(1)} custom-call(%a), custom_call_target="tpu_custom_call", KERNEL
}
"""
    config = f'backend_config={{"custom_call_config":{{"cost_estimate":{{{estimate}}}}}}}'
    # A quarter of what it reads and writes lies in HBM.
    assert work(hlo.parse_module(text.replace("KERNEL", config))) == counted.ProgramCost(70, 16)


def test_text_that_is_no_program_is_refused():
    for text in ("", "HloModule x\n", "ENTRY nonsense {"):
        with pytest.raises(ValueError, match="no ENTRY computation"):
            hlo.parse_module(text)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(st.integers(-1, 6), st.integers(-1, 6)),
)
def test_a_convolutions_products_are_those_that_meet_its_input(sizes, strides, pads):
    (left, kernel), (stride, spread, apart) = sizes, strides
    whole = (left - 1) * spread + 1 + sum(pads)
    result = (whole - (kernel - 1) * apart - 1) // stride + 1
    if result < 1:
        return
    meet = 0
    for out, tap in itertools.product(range(result), range(kernel)):
        place = out * stride - pads[0] + tap * apart
        meet += place % spread == 0 and 0 <= place // spread < left
    window = f"window={{size={kernel} stride={stride} pad={pads[0]}_{pads[1]} "
    window += f"lhs_dilate={spread} rhs_dilate={apart}}}, dim_labels=b0f_0io->b0f"
    assert counted.valid_places(window, 0, left, kernel, result) == meet


def test_a_convolution_costs_what_xla_says_it_does():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 1), ((3, 1), (0, 2)), (1, 2), (2, 1))

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 3, 8, 9), (4, 3, 3, 2))]
    lowered = jax.jit(convolve).lower(*shapes)
    module = hlo.parse_module(lowered.compile().as_text())
    kinds = {i.operation for c in module.computations.values() for i in c.instructions.values()}
    assert "convolution" in kinds
    assert work(module).flops == lowered.compile().cost_analysis()["flops"]


def wired(sizes: tuple[int, ...], axes=("data", "fsdp", "tensor")) -> collectives.Wiring:
    """Eight chips of a 2 x 4 slice in the order of their places."""
    places = np.array(list(itertools.product(range(2), range(4))))
    return collectives.Wiring(axes, sizes, places, chips.parse_topology("v5e:2x4"))


@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("tensor",), ("data", "tensor")])
def test_collectives_are_found_with_their_axes_bytes_and_times(axes):
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=kinds)

    def body(x):

        def turn(x, _):
            return (jax.lax.psum(x, axes) * 0.5, None)

        total = jax.lax.scan(turn, x, length=5)[0]
        return jax.lax.all_gather(total, "fsdp", tiled=True)

    split = jax.shard_map(
        body, mesh=mesh, in_specs=P(("data", "fsdp", "tensor")), out_specs=P(), check_vma=False
    )
    with jax.set_mesh(mesh):
        module = program(split, (64, 4))
    result = collectives.collectives(module, trips.executions(module), wired((2, 2, 2)))
    sums = [each for each in result if each.kind == "all-reduce"]
    assert [(each.axes, each.times, each.bytes) for each in sums] == [(axes, 5, 8 * 4 * 4)]
    assert [each.members for each in sums] == [2 ** len(axes)]
    gathers = [each for each in result if each.kind == "all-gather"]
    assert [(each.axes, each.times, each.bytes) for each in gathers] == [(("fsdp",), 1, 16 * 16)]
    assert all(each.seconds > 0 for each in result)


@pytest.mark.parametrize("axes", [("a",), ("b",), ("c",), ("a", "c"), ("b", "c"), ("a", "b", "c")])
def test_all_ways_of_writing_groups_mean_the_same(axes):
    sizes = {"a": 2, "b": 4, "c": 3}
    ids = np.arange(24).reshape(tuple(sizes.values()))
    rest = [axis for axis in sizes if axis not in axes]
    order = [list(sizes).index(axis) for axis in (*rest, *axes)]
    groups = ids.transpose(order).reshape(-1, math.prod(sizes[axis] for axis in axes))
    named = ",".join(f"'{axis}'={size}" for axis, size in sizes.items())
    wanted = ",".join(f"'{axis}'" for axis in axes)
    listed = ",".join("{" + ",".join(map(str, group)) + "}" for group in groups)
    permuted = ",".join(f"'{axis}'={sizes[axis]}" for axis in (*rest, *axes))
    ordered = f"[2,4,3]T({','.join(map(str, order))})"
    written = [
        f"replica_groups=mesh[{named}] {{{wanted}}}, x",
        f"replica_groups=mesh[{permuted}], device_ids=({ordered}) {{{wanted}}}, x",
        f"replica_groups=[{len(groups)},{groups.shape[1]}]<={ordered}",
        f"replica_groups={{{listed}}}, y",
    ]
    for text in written:
        np.testing.assert_array_equal(collectives.replica_groups(text, 24), groups)
    with pytest.raises(ValueError, match="in a new way"):
        collectives.replica_groups("replica_groups=<<unheard>>", 24)


def test_parts_of_one_asynchronous_collective_count_once():
    start = "fusion(%a), kind=kCustom, calls=%begin"
    text = """\
%begin (p: f32[8]) -> f32[16] {
  %p = f32[8]{0} parameter(0)
  %g = f32[16]{0} all-gather(%p), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %s = f32[16]{0} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%end (q: f32[8]) -> f32[16] {
  %q = f32[8]{0} parameter(0)
  %h = f32[16]{0} all-gather(%q), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %d = f32[16]{0} custom-call(%h), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (r: f32[16]) -> f32[8] {
  %r = f32[16]{0} parameter(0)
  %e = f32[16]{0} all-reduce(%r), channel_id=4, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %c = f32[8]{0} slice(%e), slice={[0:8]}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[16]{0} START
  %m = f32[16]{0} fusion(%a), kind=kCustom, calls=%end
  ROOT %z = f32[8]{0} fusion(%m), kind=kCustom, calls=%all-reduce-scatter.1
}
""".replace("START", start)
    module = hlo.parse_module(text)
    result = collectives.collectives(module, trips.executions(module), wired((4, 2, 1)))
    summaries = [(each.kind, each.overlapped, each.bytes, each.axes) for each in result]
    assert summaries == [
        ("all-gather", True, 64, ("fsdp",)),
        ("reduce-scatter", False, 64, ("fsdp",)),
    ]


def test_a_cached_row_is_written_in_place():
    def write(cache, row):
        return jax.lax.dynamic_update_slice(cache, row, (3, 0))

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((512, 64), (1, 64))]
    compiled = jax.jit(write, donate_argnums=0).lower(*shapes).compile()
    text = compiled.as_text()
    assert re.search(r"dynamic-update-slice", text)
    result = work(hlo.parse_module(text))
    assert result.moved <= 4 * 64 * 4 and result.flops == 0
