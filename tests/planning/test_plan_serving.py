# SPDX-License-Identifier: Apache-2.0
"""Plans of servers: bytes are those of real arrays and programs, FLOPs those of a compiler."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite import config, model, sharding
from t5x_lite.model import quantization
from t5x_lite.planning import chips, compiled, counted, hlo, phases, serving, steps, trips
from t5x_lite.planning.figures import Figures, Memory

LAYOUTS = ["encoder_decoder", "decoder_only"]
SIZES = phases.TextSizes(inputs=16, new_tokens=16)
CHIP = "v5ex1"


def run_of(layout: str, **changes) -> config.Run:
    """A run with a toy of a layout."""
    cfg = toy_model(layout, heads=4, embed=32, head_dim=8, positions="none", **changes)
    return config.Run(model_dir="none", model=cfg, data=None)


def known_of(
    layout: str, name: str = CHIP, sizes: phases.TextSizes = SIZES, mesh: config.Mesh | None = None
) -> phases.ServingArithmetic:
    """Arithmetic of a toy.

    Args:
      layout: of the model.
      name: of the chips.
      sizes: of its texts.
      mesh: over the chips.
    """
    run = dataclasses.replace(run_of(layout), mesh=mesh or config.Mesh())
    return phases.serving_arithmetic(run, chips.parse_chips(name), sizes)


@functools.cache
def compiled_step(layout: str, rows: int) -> tuple[jax.stages.Compiled, steps.Step]:
    """A decode step for this machine's CPU, compiled."""
    size = steps.Decoding(rows, SIZES.new_tokens, SIZES.inputs)
    run = dataclasses.replace(run_of(layout), mesh=config.Mesh(1, 1, 1))
    step = steps.decode(run, jax.devices()[:1], size)
    return step.trace.lower().compile(), step


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_and_flops_are_those_of_the_compiled_step(layout):
    executable, step = compiled_step(layout, 8)
    known = known_of(layout)
    assert step.kinds["parameters"] == known.weight_bytes()
    assert step.kinds["cache"] == 8 * known.row_bytes()
    # The program drops what it does not read: the encoder, and what makes keys of inputs. It looks
    # tokens up in the embedding, and has a token, an index and a mask of inputs for each row.
    read = known.used_weights(reading=False)
    read += 0 if known.cfg.tied else math.prod(known.weights["embedding"].shape) * 4
    arguments = executable.memory_analysis().argument_size_in_bytes
    assert arguments == read + 8 * known.row_bytes() + 8 * (4 + 4 + known.inputs)
    module = hlo.parse_module(executable.as_text())
    counted_flops = counted.program_cost(module, trips.executions(module)).flops
    assert counted_flops == pytest.approx(known.decoding(8).flops, rel=0.02)


@pytest.mark.parametrize("quantize", ["int8", "int4:8"])
def test_quantized_weights_have_the_bytes_of_the_arrays(quantize):
    known = known_of("encoder_decoder", sizes=SIZES._replace(quantize=quantize))
    sharding.use_mesh(config.Mesh(1, 1, 1), jax.devices()[:1])
    shapes = model.shapes(known.cfg)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    kind = quantization.parse_quantization(quantize)
    params = quantization.quantize_params(jax.tree.map(jax.numpy.asarray, zeros), kind)
    assert known.weight_bytes() == quantization.weight_bytes(params)
    assert known.weight_bytes() < known_of("encoder_decoder").weight_bytes()


@pytest.mark.parametrize("bits", phases.CACHE_BITS)
def test_a_quantized_cache_has_its_bits_and_a_scale_for_each_token_and_head(bits):
    whole = known_of("encoder_decoder")
    small = known_of("encoder_decoder", sizes=SIZES._replace(cache_bits=bits))
    width = whole.cfg.decoder.head_dim
    ratio = (width * bits / 8 + 4) / (4 * width)
    assert small.row_bytes() == pytest.approx(ratio * whole.row_bytes())
    assert serving.fitting_rows(small) > serving.fitting_rows(whole)


def test_layers_split_over_chips_have_a_part_of_everything_and_wait_for_sums():
    whole, split = (
        known_of("encoder_decoder", f"v5ex{n}", mesh=config.Mesh(1, 1, n)) for n in (1, 2)
    )
    assert split.row_bytes() == whole.row_bytes() / 2
    # Norms are on every chip.
    assert whole.weight_bytes() / 2 < split.weight_bytes() < 0.6 * whole.weight_bytes()
    assert split.decoding(4).flops == whole.decoding(4).flops / 2
    assert whole.decoding(4).waits == 0 < split.decoding(4).waits
    with pytest.raises(ValueError, match="cannot be split over 8 chips"):
        known_of("encoder_decoder", "v5ex8", mesh=config.Mesh(1, 1, 8)).row_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_costs_two_flops_for_each_weight_and_token(layout):
    """Of T5's and GPT's blocks, by hand: products with weights, and two of attention."""
    known = known_of(layout)
    cfg, length = known.cfg, 16
    stack = cfg.encoder or cfg.decoder
    inner = stack.heads * stack.head_dim
    layer = 2 * stack.embed * (4 * inner + (2 + stack.gated) * stack.mlp) + 4 * inner * length
    expected = stack.layers * length * layer
    if cfg.encoder is None:
        expected += 2 * stack.embed * cfg.vocab
    else:
        expected += cfg.decoder.layers * length * 4 * stack.embed * inner
    assert known.reading(3).flops == 3 * expected


@pytest.mark.parametrize("name", ["v5ex1", "v6ex4", "h200x1"])
def test_one_row_more_does_not_fit_and_speed_and_price_are_those_of_the_phases(name):
    known = known_of("encoder_decoder", name)
    shards = known.shards
    plan = serving.plan_server(known, price=3.6)
    rows = plan.points[-1].rows // shards
    assert plan.memory.fits and not serving.serving_memory(known, rows + 1).fits
    step, together = known.decoding(rows).seconds, known.read_rows()
    assert together == phases.READ_TOGETHER // 16
    reading = known.reading(together).seconds
    text = reading / together + 16 * step / rows
    point = plan.points[-1]
    assert point.tokens_per_second == pytest.approx(16 * shards / text)
    assert point.first_seconds == pytest.approx(reading + step)
    # 3.6 an hour: a thousandth of a second's chip.
    assert point.whole_price == pytest.approx(1e6 * text * 0.001 / 16)
    assert point.input_price + point.token_price == pytest.approx(point.whole_price)
    # Rows in use at a time: Little's law.
    used = point.requests_per_second * 16 * point.token_seconds
    assert used == pytest.approx(point.rows)
    speeds = [each.tokens_per_second for each in plan.points]
    assert speeds == sorted(speeds) and len(speeds) > 3


def test_a_phase_is_as_long_as_its_longest_part():
    chip = chips.CHIPS["v5e"]
    phase = phases.Phase("decode", chip, 1, 1, flops=chip.peak, moved=chip.bandwidth / 2, waits=0.0)
    assert (phase.seconds, phase.bound) == (1.0, "compute")
    phase = phase._replace(moved=3 * chip.bandwidth, waits=0.5)
    assert (phase.seconds, phase.bound) == (3.5, "memory")
    assert phase.intensity == pytest.approx(chip.peak / chip.bandwidth / 3)
    assert phase._replace(waits=9.0).bound == "interconnect"


def test_the_compilers_excess_is_fewer_rows(monkeypatch):
    """The compiler needs 30 % more than arithmetic for each row."""
    known = known_of("encoder_decoder")
    plan = serving.plan_server(known, price=1.0)
    tried, available = [], known.slice.chip.memory

    def compile_step(run, slice_, size):
        tried.append(size.rows)
        peak = math.ceil(known.weight_bytes() + 1.3 * size.rows * known.row_bytes())
        memory = Memory({}, peak, available, max(0, peak - available))
        cost = {"flops": 10**9, "moved": 10**9} if memory.fits else {}
        return Figures("decode step", "compiled", slice_, known.mesh, memory, size.rows, 1, **cost)

    monkeypatch.setattr(compiled, "figures", compile_step)
    result = serving.compile_server(run_of("encoder_decoder"), known.slice, plan)
    assert tried[0] == plan.points[-1].rows > tried[-1] == result.points[-1].rows
    assert result.memory.fits and result.points[-1].memory == result.memory.peak
    assert result.points[-1].first_seconds > 10**9 / known.slice.chip.bandwidth
    # Not so few that a third of the memory is left.
    assert result.memory.peak > 0.66 * available


def test_a_model_that_is_too_large_is_refused_with_the_excess():
    known = known_of("decoder_only")
    tiny = known.slice.chip._replace(memory=known.weight_bytes())
    small = dataclasses.replace(known, slice=known.slice._replace(chip=tiny))
    plan = serving.plan_server(small, price=1.0)
    assert not plan.memory.fits and plan.points == []
    assert plan.memory.excess == plan.memory.peak - known.weight_bytes()
