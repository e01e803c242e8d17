# SPDX-License-Identifier: Apache-2.0
"""Cases of device.py that ask whether results are right, and what the machine can do at most."""

import dataclasses
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report
from attention_systems import describe_error
from device_cases import Case, run_of
from report import Row

from t5x_lite import config, decoding, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.kernels import api as kernels

TESTS = Path(__file__).resolve().parents[1] / "tests"
# Cases that the tests of kernels draw, and the same in float64.
sys.path += [str(TESTS / folder) for folder in ("", "laws", "kernels")]
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}


def measure_machine(case: Case, settings: dict, rehearse: bool) -> Iterator[Row]:
    """Yields the device, and what it copies and multiplies at most.

    Args:
      case: of the stage.
      settings: `elements` of the copy, in 4 bytes; `size` of the squares that are multiplied.
      rehearse: unused.
    """
    device = jax.devices()[0]
    yield Row(case.key, "device", "", None, f"{device.device_kind}, {nvidia_smi()}")
    versions = report.versions(["jax", "jaxlib", "nvidia-cudnn-cu13", "torch", "triton"])
    yield Row(case.key, "versions", "", None, ", ".join(f"{k} {v}" for k, v in versions.items()))
    x = jax.random.bits(jax.random.key(0), (settings["elements"],), jnp.uint32)
    seconds = call_seconds(jax.jit(jnp.invert), x)
    yield Row(case.key, "copy, read and written", "GB/s", 2 * x.nbytes / seconds / 1e9)
    size = settings["size"]
    a, b = jax.random.normal(jax.random.key(1), (2, size, size), jnp.bfloat16)
    seconds = call_seconds(jax.jit(jnp.matmul), a, b)
    yield Row(case.key, f"bfloat16 product of {size}", "TFLOP/s", 2 * size**3 / seconds / 1e12)


def nvidia_smi() -> str:
    """Name, driver, memory and clocks of the GPU, or why there are none."""
    fields = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no nvidia-smi: {error}"


def call_seconds(function, *operands: Any, calls: int = 10, turns: int = 5) -> float:
    """Median seconds of a call over turns, after one that warms up.

    Args:
      function: of arrays on the device.
      *operands: its arguments.
      calls: one after the other in a turn.
      turns: how often.
    """
    jax.block_until_ready(function(*operands))
    seconds = []
    for _ in range(turns):
        begin = time.perf_counter()
        for _ in range(calls):
            result = function(*operands)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - begin) / calls)
    return statistics.median(seconds)


def verdict(case: Case, name: str, deviation: float, limit: float) -> Row:
    """Row of a deviation, with a note if it is too large or NaN.

    Args:
      case: of the stage.
      name: what deviates.
      deviation: in shares of the largest value.
      limit: of the deviation.
    """
    note = "" if deviation < limit else f"WRONG: more than {limit:g}"
    return Row(case.key, name, "deviation", float(deviation), note)


def check_flash(case: Case, settings: dict) -> Iterator[Row]:
    """Yields deviations of attention over rows and its gradients, the table's too, from float64."""
    import flash_toys

    dtype = settings["dtype"]
    kinds = {
        "T5, packed": flash_toys.Kind(lengths=(300, 300)),
        "causal, two sources": flash_toys.Kind(causal=True, second=140, lengths=(200, 200)),
        "everything": flash_toys.Kind(
            heads=(2, 2, 64), causal=True, prefix=True, window=True, offset=True, softcap=2.0
        ),
        "head of 128": flash_toys.Kind(heads=(1, 2, 128), causal=True, lengths=(260, 260)),
    }
    backend = kernels.select_backend("pallas")
    assert backend is not None

    def attend(q, sources, softcap):
        return kernels.dot_product_attention(q, sources, softcap, backend)

    def attend_by_triton(q, sources, softcap):
        from t5x_lite.kernels.flash_triton.api import flash_attention

        return flash_attention(q, sources, softcap, backend)[0]

    tried = [(attend, *item) for item in kinds.items()]
    if backend.platform == "gpu":
        tried.append((attend_by_triton, "T5, packed, Triton", kinds["T5, packed"]))
    else:
        tried = tried[:1]
    for seed in range(settings["seeds"]):
        for function, name, kind in tried:
            q, sources, gradient = flash_toys.case(kind, seed, jnp.dtype(dtype))
            operands = q, sources, gradient, kind.softcap
            try:
                actual = flash_toys.context_and_gradients(function, *operands)
            except Exception as error:  # whatever a compiler refuses is a row of the table
                yield Row(case.key, name, "deviation", None, f"WRONG: {describe_error(error)}")
                continue
            wanted = flash_toys.exactly(q, sources, gradient, kind.softcap)
            for part, each in (("context", 0), ("gradients", 1)):
                deviation = flash_toys.difference(actual[each], wanted[each])
                yield verdict(case, f"{name}, seed {seed}, {part}", deviation, LIMITS[dtype])
            tables = actual[1][1][0][2], wanted[1][1][0][2]
            deviation = np.max(np.abs(tables[0] - tables[1])) / np.max(np.abs(tables[1]))
            yield verdict(case, f"{name}, seed {seed}, table", deviation, LIMITS[dtype])


def check_decode(case: Case, settings: dict) -> Iterator[Row]:
    """Yields deviations of attention over a cache from float64."""
    import test_kernels_decode as laws

    dtype = getattr(jnp, settings["dtype"])
    features = {
        "chain": {"bias": True, "size": 64},
        "tree": {"tree": True, "bias": True, "window": 40, "heads": (2, 3), "size": 64},
        "prefix": {"prefix": True, "bias": True, "size": 64},
        "head of 128": {"size": 128, "width": 8, "slots": 600},
    }
    backend = kernels.select_backend("pallas")
    for seed, (name, fields) in (
        (s, f) for s in range(settings["seeds"]) for f in features.items()
    ):
        q, source = laws.Case(dtype=dtype, seed=seed, **fields).draw()
        attend = jax.jit(
            lambda q, source: kernels.dot_product_attention(q, (source,), None, backend)
        )
        wanted = laws.expected(q, [source], None)
        far = np.max(np.abs(np.asarray(attend(q, source), np.float64) - wanted))
        yield verdict(case, f"{name}, seed {seed}", far / np.max(np.abs(wanted)), 2e-2)


def toy_run(settings: dict) -> config.Run:
    """A small float32 run of a shipped config; `layers` cuts it."""
    bindings = ['config.Model.dtype="float32"', "config.Model.vocab=512"]
    bindings += [f"config.Stack.layers={settings['layers']}"] if "layers" in settings else []
    return run_of(settings["model"], {"inputs": 48, "targets": 32}, 4, bindings=bindings)


def random_batch(run: Any, texts: int = 2) -> Batch:
    """Rows of drawn ids, packed with so many texts each, on the mesh in force."""
    draw, cfg, rows = np.random.default_rng(0), run.model, run.train.batch_size
    lengths = run.data.lengths

    def pack(length: int) -> tuple[np.ndarray, ...]:
        place = np.arange(length) * texts // length
        begins = np.searchsorted(place, place)
        ids = draw.integers(3, cfg.vocab, (rows, length)).astype(np.int32)
        every = (
            np.broadcast_to(x.astype(np.int32), ids.shape)
            for x in (place + 1, np.arange(length) - begins)
        )
        return ids, *every

    if cfg.encoder is None:
        targets = pack(lengths["inputs"] + lengths["targets"])
        prefix = targets[2] < lengths["inputs"] // texts
        batch = Batch(*targets, (~prefix).astype(np.float32), prefix=prefix)
    else:
        targets = pack(lengths["targets"])
        batch = Batch(*targets, np.ones(targets[0].shape, np.float32), *pack(lengths["inputs"]))
    return sharding.place_batch(batch)


def check_step(case: Case, settings: dict) -> Iterator[Row]:
    """Yields deviations of a step's loss and gradients with kernels from those of plain XLA."""
    run = toy_run(settings)
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    params, batch = model.initialize(run.model, jax.random.key(0)), random_batch(run)

    @functools.partial(jax.jit, static_argnums=0)
    def loss_and_gradient(cfg, params):
        def loss(params):
            apply = functools.partial(
                model.Transformer(cfg, remat="minimal").apply, {"params": params}
            )
            hidden = apply(batch, method=model.Transformer.hidden)
            losses = apply(hidden, batch.targets, 0.0, 1e-4, method=model.Transformer.losses)
            return jnp.sum(losses.objective * batch.loss_weights) / jnp.sum(batch.loss_weights)

        return jax.value_and_grad(loss)(params)

    wanted = loss_and_gradient(dataclasses.replace(run.model, attention="reference"), params)
    # Without a GPU "auto" is plain XLA too.
    on_gpu = kernels.target_device().platform == "gpu"
    for attention in ("pallas", "auto") if on_gpu else ("pallas",):
        actual = loss_and_gradient(dataclasses.replace(run.model, attention=attention), params)
        difference = abs(float(actual[0] - wanted[0]) / float(wanted[0]))
        yield verdict(case, f"loss, {attention}", difference, 1e-4)
        largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(wanted[1]))
        far = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), actual[1], wanted[1])
        yield verdict(case, f"gradients, {attention}", max(jax.tree.leaves(far)) / largest, 1e-3)


def check_greedy(case: Case, settings: dict) -> Iterator[Row]:
    """Yields the share of greedy ids that this device and the CPU have in common."""
    run = toy_run(settings)
    draw = np.random.default_rng(1)
    rows = draw.integers(3, run.model.vocab, (4, 12)).tolist()
    texts = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        sharding.use_mesh(config.Mesh(), [device])
        params = model.initialize(run.model, jax.random.key(0))
        # Logits of new weights are alike: larger ones leave no ties.
        params = decoding.prepare_params(run.model, jax.tree.map(lambda x: 2 * x, params))
        decode = config.Decode(max_new_tokens=16)
        request = decoding.make_request(run.model, rows, decode, eos=-1)
        texts.append(np.asarray(decoding.generate(run.model, params, request, decode).tokens))
    same = float(np.mean(texts[0] == texts[1]))
    note = "" if same == 1 else "WRONG, unless two logits are equal but for rounding"
    yield Row(case.key, "ids that are the CPU's", "share", same, note)


CHECKS = {"flash": check_flash, "decode": check_decode, "step": check_step, "greedy": check_greedy}


def measure_correctness(case: Case, settings: dict, rehearse: bool) -> Iterator[Row]:
    """Yields the rows of the check that the case's name begins with.

    Args:
      case: of the stage.
      settings: of the check.
      rehearse: unused.
    """
    yield from CHECKS[case.name.split()[0].rstrip(",")](case, settings)


MEASURES = {"machine": measure_machine, "correctness": measure_correctness}
