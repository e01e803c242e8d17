# SPDX-License-Identifier: Apache-2.0
"""Does one optimizer step take at most the time of Hugging Face transformers on the same work?

T5 1.1 small with untied embeddings, 4 rows of 256 + 64 ids, Adafactor, on CPU: forward, backward
and update of 76,961,152 float32 weights, computed in float32 and in bfloat16 (ours by Model.dtype,
transformers under torch.autocast). Each system runs in a process of its own, on the same
cores, and they take turns step by step; a process that waits for its turn uses no core.

  python benchmarks/train_step.py [--quick] [--threads 2] [--json FILE]

t5x_lite has to be installed (`pip install -e .`), and the peer: `pip install torch==2.13.0
transformers`.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import report

ROWS, INPUTS, TARGETS, VOCAB = 4, 256, 64, 32128
RATE = 1e-3
PACKAGES = ["jax", "jaxlib", "flax", "optax", "torch", "transformers"]

Step = Callable[[], float]  # makes one optimizer step and gives the loss before it


def ids() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.integers(2, VOCAB, (ROWS, INPUTS)), draw.integers(2, VOCAB, (ROWS, TARGETS))


def ours(dtype: str) -> tuple[Step, int]:
    """The step of `t5x_lite.train` from the shipped configs, and the number of weights.

    Args:
      dtype: "float32" or "bfloat16", of activations and products.
    """
    import jax

    from t5x_lite import model, sharding
    from t5x_lite.batch import Batch
    from t5x_lite.checkpoints import train_state
    from t5x_lite.config import gin_file
    from t5x_lite.training import host, optimizer, schedules
    from t5x_lite.training import step as training_step

    host.keep_freed()
    bindings = ["MODEL_DIR=unused", "MIXTURE_OR_TASK_NAME=unused", "TRAIN_STEPS=1000"]
    bindings += [f"BATCH_SIZE={ROWS}", f'config.Model.dtype="{dtype}"']
    bindings += [f'TASK_FEATURE_LENGTHS={{"inputs": {INPUTS}, "targets": {TARGETS}}}']
    bindings += ['config.Schedule.kind="constant"', f"config.Schedule.peak={RATE}"]
    bindings += ["config.Train.z_loss=0.0"]  # the peer has none
    run = gin_file.load_run(["runs/common.gin", "models/t5_1_1_small.gin"], bindings)
    sharding.use_mesh(run.mesh)
    axes = model.axes(run.model)
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    update = optimizer.make_optimizer(run.optimizer, schedule, axes)
    advance = training_step.make_step(run, update, schedule, axes)
    now = train_state.begin_state(model.initialize(run.model, jax.random.key(0)), update)

    inputs, targets = (each.astype(np.int32) for each in ids())

    def layout(rows):
        return (
            np.ones_like(rows),
            np.broadcast_to(np.arange(rows.shape[1]), rows.shape),
        )

    weights = np.ones(targets.shape, np.float32)
    batch = Batch(targets, *layout(targets), weights, inputs, *layout(inputs))

    def step() -> float:
        nonlocal now
        now, metrics = jax.block_until_ready(advance(now, sharding.place_batch(batch)))
        return float(metrics.sums.loss / metrics.sums.weights)

    return step, sum(model.count(run.model).values())


def transformers(dtype: str) -> tuple[Step, int]:
    """The same of transformers: T5ForConditionalGeneration and its Adafactor, on torch.

    Args:
      dtype: "float32", or "bfloat16" for products under autocast.
    """
    import torch
    from transformers import Adafactor, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    cfg = T5Config(
        vocab_size=VOCAB,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_decoder_layers=8,
        num_heads=6,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    net = T5ForConditionalGeneration(cfg).train()
    # It ties the head to the embedding whatever the config says; T5 1.1 has both.
    net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.detach().clone())
    optimizer = Adafactor(
        net.parameters(), lr=RATE, scale_parameter=True, relative_step=False, warmup_init=False
    )
    inputs, targets = (torch.from_numpy(each) for each in ids())
    seen = torch.ones_like(inputs)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = net(input_ids=inputs, attention_mask=seen, labels=targets, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, sum(parameter.numel() for parameter in net.parameters())


SYSTEMS = {
    "t5x_lite": functools.partial(ours, "float32"),
    "transformers": functools.partial(transformers, "float32"),
    "t5x_lite, bfloat16": functools.partial(ours, "bfloat16"),
    "transformers, bfloat16": functools.partial(transformers, "bfloat16"),
}


def serve(system: str, threads: int) -> None:
    """Makes one step for every line of stdin and answers with what it took, as a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get among the answers

    def tell(**found):
        return print(json.dumps(found), file=answers)

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    try:
        step, parameters = SYSTEMS[system]()
    except ImportError as error:
        return tell(missing=str(error))
    tell(parameters=parameters)
    for _ in sys.stdin:
        begin, busy = time.perf_counter(), time.process_time()
        loss = step()
        passed, busy = time.perf_counter() - begin, time.process_time() - busy
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        tell(seconds=passed, cpu_seconds=busy, peak_mib=peak, loss=loss)


class Worker:
    """A system in a process of its own."""

    def __init__(self, system: str, threads: int):
        command = [sys.executable, __file__, "--serve", system, "--threads", str(threads)]
        limits = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | limits,
        )
        self.found = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def step(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(threads: int, turns: int) -> list[report.Row]:
    """Medians over the turns, after two that warm up."""
    case = f"t5_1_1_small 4 x (256 + 64), threads {threads}"
    workers, rows = {}, []
    for system in SYSTEMS:
        worker = Worker(system, threads)
        if "missing" in worker.found:
            note = f"not installed: {worker.found['missing']}"
            rows.append(report.Row(case, system, "seconds", None, note))
        else:
            workers[system] = worker
    if len({worker.found["parameters"] for worker in workers.values()}) != 1:
        raise RuntimeError(f"not the same work: {[w.found for w in workers.values()]} weights")
    measured = {system: [] for system in workers}
    for _ in range(2 + turns):
        for system, worker in workers.items():
            measured[system].append(worker.step())
    for metric in ("seconds", "cpu_seconds", "peak_mib"):
        for system, steps in measured.items():
            value = statistics.median(step[metric] for step in steps[2:])
            rows.append(report.Row(case, system, metric, value))
    for worker in workers.values():
        worker.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 turns instead of 15")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads of each system")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--serve", choices=SYSTEMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.threads)
    rows = measure(options.threads, turns=3 if options.quick else 15)
    print(report.table(rows))
    if options.json:
        report.write(options.json, rows, PACKAGES)


if __name__ == "__main__":
    main()
