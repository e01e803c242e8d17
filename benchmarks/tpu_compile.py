# SPDX-License-Identifier: Apache-2.0
"""Memory and memory traffic of a training step of T5 1.1 on a TPU.

Compiles the step (forward, backward, Adafactor; bfloat16 activations, batch over the chips) for
chips that need not be there, and reads the compiler's own figures, per chip. No product with
weights is made twice; what is cheaper than one, norms and activations, is made again in the
backward pass instead of kept. With --t5x the same work in T5X's own network, of which no layer is
scanned, its optimizer optax's Adafactor.

Compilers count the body of a loop once. So bytes accessed and FLOPs are those of two towers without
a loop, of 1 and 2 layers each, continued to all layers (--accessed; two more compilations). The
kernels' own are what they tell the compiler they cost.

Those bytes are of fast memory too: of a layer of T5 1.1 base at 512/114 three quarters are (7.6 GB,
of which 1.7 are HBM's), and copies to and from it count twice. "HBM GB" is what the planner counts
in the compiled program of all layers, loops by their trips: HBM alone, which is what time goes by.

  python benchmarks/tpu_compile.py [--cases base:2048:512:4 ...] [--topology v5e:2x2]
      [--attention pallas reference] [--accessed] [--t5x FOLDER] [--json FILE]

Needs the extra `test` (libtpu). A case is model:inputs:targets:rows of each chip.
"""

import argparse
import importlib.util
import os
import sys
import time
import types
from pathlib import Path

# Read when jax is imported: a chip is described, none is looked for.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

PACKAGES = ["jax", "jaxlib", "libtpu", "flax", "optax"]
SIZES = {  # layers of each tower, width, heads, mlp width; head size 64
    "small": (8, 512, 6, 1024),
    "base": (12, 768, 12, 2048),
    "large": (24, 1024, 16, 2816),
}
CASES = ["base:512:114:16", "base:512:114:64", "base:2048:512:4", "base:2048:512:8"]
CASES += ["base:2048:512:16", "base:8192:1024:1", "base:16384:2048:1", "large:2048:512:2"]
VOCAB = 32128


def ours(case: str, devices: list, attention: str, layers: int | None = None, unroll: int = 1):
    """The step of `t5x_lite.train` from the shipped configs, traced."""
    from t5x_lite.config import gin_file
    from t5x_lite.planning import aot

    size, inputs, targets, rows = case.split(":")
    bindings = ["MODEL_DIR=unused", "MIXTURE_OR_TASK_NAME=unused", "TRAIN_STEPS=100000"]
    bindings += [f"BATCH_SIZE={int(rows) * len(devices)}"]
    bindings += ['config.Schedule.kind="constant"', "config.Schedule.peak=0.001"]
    bindings += [f'TASK_FEATURE_LENGTHS={{"inputs": {inputs}, "targets": {targets}}}']
    bindings += [f'config.Model.attention="{attention}"', f"config.Train.unroll={unroll}"]
    if layers:
        bindings.append(f"config.Stack.layers={layers}")
    run = gin_file.load_run(["runs/common.gin", f"models/t5_1_1_{size}.gin"], bindings)
    return aot.trace_step(run, devices)


def t5x_network(folder: Path):
    """T5X's network module from its own files, without its package's imports."""
    for name in ("t5x", "t5x.examples", "t5x.examples.t5"):
        sys.modules.setdefault(name, types.ModuleType(name))
    for name in ("layers", "network"):
        full = f"t5x.examples.t5.{name}"
        file = folder / "t5x/examples/t5" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(full, file)
        sys.modules[full] = importlib.util.module_from_spec(spec)
        setattr(sys.modules["t5x.examples.t5"], name, sys.modules[full])
        spec.loader.exec_module(sys.modules[full])
    return sys.modules["t5x.examples.t5.network"]


def t5x(case: str, devices: list, folder: Path):
    """The same step with T5X's network, traced."""
    network = t5x_network(folder)
    size, *numbers = case.split(":")
    inputs, targets, rows = map(int, numbers)
    layers, embed, heads, mlp = SIZES[size]
    cfg = network.T5Config(
        vocab_size=VOCAB, dtype=jnp.bfloat16, emb_dim=embed, num_heads=heads, head_dim=64,
        num_encoder_layers=layers, num_decoder_layers=layers, mlp_dim=mlp,
        mlp_activations=("gelu", "linear"), dropout_rate=0.0, logits_via_embedding=False,
    )  # fmt: skip
    transformer, update = network.Transformer(cfg), optax.adafactor(1e-3)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    jax.set_mesh(mesh)

    def ids(length):
        return jnp.zeros((1, length), jnp.int32)

    def begin():
        return transformer.init(
            jax.random.key(0), ids(inputs), ids(targets), ids(targets), enable_dropout=False
        )["params"]

    def step(params, state, source, shifted, target):
        def loss(params):
            logits = transformer.apply(
                {"params": params}, source, shifted, target, enable_dropout=False
            ).astype(jnp.float32)
            log_z = jax.nn.logsumexp(logits, axis=-1)
            chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
            return jnp.mean(log_z - chosen + 1e-4 * jnp.square(log_z))

        value, gradient = jax.value_and_grad(loss)(params)
        change, state = update.update(gradient, state, params)
        return optax.apply_updates(params, change), state, value

    def placed(shapes, spec):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
            shapes,
        )

    shapes = jax.eval_shape(begin)
    state = placed(jax.eval_shape(update.init, shapes), P())
    params = placed(shapes, P())
    rows *= len(devices)
    batch = [jax.ShapeDtypeStruct((rows, length), jnp.int32) for length in (inputs, targets)]
    source, target = placed(batch, P("data"))
    return jax.jit(step, donate_argnums=(0, 1)).trace(params, state, source, target, target)


def compiled(trace) -> tuple[object | None, float, str]:
    """The executable (None where it does not fit), seconds, and its program or the complaint."""
    from t5x_lite.planning import compiled as planning

    began = time.perf_counter()
    try:
        executable, program = planning.compile_program(trace.lower())
        return executable, time.perf_counter() - began, program
    except jax.errors.JaxRuntimeError as error:
        said = [line for line in str(error).splitlines() if "Used" in line or "exceeded" in line]
        return None, time.perf_counter() - began, " ".join(said)[:200] or str(error)[:200]


def moved(program: str) -> int:
    """Bytes of HBM that a program reads and writes, loops by their trips.

    Raises:
      ValueError: the program does not say how often a loop runs; its body would count once.
    """
    from t5x_lite.planning import counted, hlo, trips

    module = hlo.parse_module(program)
    executions = trips.executions(module)
    if executions.unknown:
        raise ValueError(f"No trip count for {', '.join(executions.unknown)}: bytes would be wrong")
    return counted.program_cost(module, executions).moved


def cost(executable) -> tuple[float, float]:
    """Bytes accessed and FLOPs, loops counted once."""
    found = executable.cost_analysis()
    return found["bytes accessed"], found["flops"]


def continued(case: str, devices: list, attention: str) -> tuple[float, float]:
    """Bytes accessed and FLOPs of all layers, from steps of 1 and 2 unrolled layers."""
    layers = SIZES[case.split(":")[0]][0]
    one, two = (
        cost(compiled(ours(case, devices, attention, count, unroll=count))[0]) for count in (1, 2)
    )
    return tuple(a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True))


def measured(case: str, system: str, trace, accessed) -> list[report.Row]:
    executable, seconds, said = compiled(trace)
    if executable is None:
        return [report.Row(case, system, "peak GB", None, f"does not fit: {said}")]
    rows = [
        report.Row(case, system, "peak GB", executable.memory_analysis().peak_memory_in_bytes / 1e9)
    ]
    rows.append(report.Row(case, system, "HBM GB", moved(said) / 1e9))
    if accessed:
        touched, flops = accessed(executable)
        rows.append(report.Row(case, system, "accessed GB", touched / 1e9))
        rows.append(report.Row(case, system, "TFLOP", flops / 1e12))
    return [*rows, report.Row(case, system, "compile seconds", seconds)]


def rows_of(case: str, devices: list, options: argparse.Namespace) -> list[report.Row]:
    rows = []
    for attention in options.attention:
        system = "t5x_lite" if attention == "pallas" else "t5x_lite, plain XLA"
        accessed = None
        if options.accessed:

            def accessed(_, attention=attention):
                return continued(case, devices, attention)

        rows += measured(case, system, ours(case, devices, attention), accessed)
    if options.t5x:
        trace = t5x(case, devices, Path(options.t5x))
        rows += measured(case, "T5X", trace, cost)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--topology", default="v5e:2x2")
    choices = ["pallas", "reference"]
    parser.add_argument("--attention", nargs="+", choices=choices, default=choices[:1])
    parser.add_argument("--accessed", action="store_true", help="also bytes accessed and FLOPs")
    parser.add_argument("--t5x", help="a clone of google-research/t5x, compiled beside ours")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    devices = list(topologies.get_topology_desc(options.topology, platform="tpu").devices)
    rows = []
    for case in options.cases:
        new = rows_of(case, devices, options)
        print(report.table(new), flush=True)
        rows += new
        if options.json:
            report.write(options.json, rows, PACKAGES)


if __name__ == "__main__":
    main()
