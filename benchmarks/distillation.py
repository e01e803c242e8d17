# SPDX-License-Identifier: Apache-2.0
"""Cost of a teacher: a training step with a live teacher, with its written logits, and without.

T5 1.1 small as the student, 4 rows of 256 + 64 ids, float32, Adafactor; the teacher is a decoder
alone with the student's decoder Stack and drawn weights, as its time does not depend on them. All
are compiled first and take turns step by step. Memory is what XLA says of the compiled step:
arguments (weights, optimizer, teacher, batch) and scratch.

  python benchmarks/distillation.py [--quick] [--top_k 32] [--model models/t5_1_1_small.gin]
      [--json FILE]

t5x_lite has to be installed (`pip install -e .`).
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np
import report

from t5x_lite import config, model, sharding
from t5x_lite.adaptation import distilled_batches
from t5x_lite.adaptation.teacher import Teacher
from t5x_lite.batch import Batch, TeacherLogits
from t5x_lite.checkpoints import train_state
from t5x_lite.config import gin_file
from t5x_lite.training import host, optimizer, schedules, write_teacher_logits
from t5x_lite.training import step as training_step

ROWS, INPUTS, TARGETS = 4, 256, 64


def student(file: str) -> config.Run:
    """The run of the benchmark, without a teacher."""
    bindings = ["MODEL_DIR=unused", "MIXTURE_OR_TASK_NAME=unused", "TRAIN_STEPS=1000"]
    bindings += [f"BATCH_SIZE={ROWS}", 'config.Model.dtype="float32"']
    bindings += [f'TASK_FEATURE_LENGTHS={{"inputs": {INPUTS}, "targets": {TARGETS}}}']
    bindings += ['config.Schedule.kind="constant"', "config.Schedule.peak=0.001"]
    return gin_file.load_run(["runs/common.gin", file], bindings)


def drawn(vocab: int) -> Batch:
    """Rows of one text each."""
    draw = np.random.default_rng(0)
    sides = []
    for length in (TARGETS, INPUTS):
        ids = draw.integers(2, vocab, (ROWS, length)).astype(np.int32)
        places = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
        sides.append((ids, np.ones_like(ids), places))
    return Batch(*sides[0], np.ones((ROWS, TARGETS), np.float32), *sides[1])


class Case:
    """A compiled step with its state and batch."""

    def __init__(self, run: config.Run, teacher: Teacher, batch: Batch, params: Any):
        axes = model.axes(run.model)
        schedule = schedules.learning_rate(run.schedule, run.train.steps)
        update = optimizer.make_optimizer(run.optimizer, schedule, axes)
        made = training_step.make_step(run, update, schedule, axes, teacher)
        self.batch, self.params = sharding.place_batch(batch), params
        self.state = train_state.begin_state(model.initialize(run.model, jax.random.key(0)), update)
        self.compiled = made.lower(self.state, self.batch, params).compile()
        self.seconds: list[float] = []

    def step(self) -> None:
        begin = time.perf_counter()
        found = self.compiled(self.state, self.batch, self.params)
        self.state, _ = jax.block_until_ready(found)
        self.seconds.append(time.perf_counter() - begin)


def cases(file: str, top_k: int) -> dict[str, Case]:
    """The four ways to train."""
    run = student(file)
    sharding.use_mesh(run.mesh)
    changes = {"encoder": None, "separate_embeddings": False, "eoi": None}
    lone = dataclasses.replace(run.model.decoder, merged=False)
    cfg = dataclasses.replace(run.model, decoder=lone, **changes)
    teacher, batch = Teacher("drawn", cfg, None, cfg.vocab), drawn(run.model.vocab)
    params = model.initialize(cfg, jax.random.key(1))
    whole = config.Distillation("drawn")
    best = dataclasses.replace(whole, top_k=top_k)
    teacher_data = distilled_batches.TeacherBatchBuilder(cfg, cfg.vocab).teacher_data(batch)
    read = jax.device_get(
        write_teacher_logits.jit_teacher(best, teacher)(params, sharding.place_batch(teacher_data))
    )
    with_whole = dataclasses.replace(run, distillation=whole)
    with_best = dataclasses.replace(run, distillation=best)
    live = batch._replace(teacher_data=teacher_data)
    stored = batch._replace(teacher_data=TeacherLogits(*read, teacher_data.known))
    return {
        "no teacher": Case(run, teacher, batch, None),
        "live, whole distribution": Case(with_whole, teacher, live, params),
        f"live, top {top_k}": Case(with_best, teacher, live, params),
        f"answers, top {top_k}": Case(with_best, teacher, stored, None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 turns instead of 15")
    parser.add_argument("--top_k", type=int, default=32)
    parser.add_argument("--model", default="models/t5_1_1_small.gin", help=".gin of the student")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    host.keep_freed()
    found = cases(options.model, options.top_k)
    for _ in range(2 + (3 if options.quick else 15)):
        for case in found.values():
            case.step()
    name, rows = f"{options.model} {ROWS} x ({INPUTS} + {TARGETS})", []
    medians = {way: statistics.median(case.seconds[2:]) for way, case in found.items()}
    for way, case in found.items():
        memory = case.compiled.memory_analysis()
        rows.append(report.Row(name, way, "seconds", medians[way]))
        rows.append(report.Row(name, way, "times no teacher", medians[way] / medians["no teacher"]))
        rows.append(report.Row(name, way, "arguments_mib", memory.argument_size_in_bytes / 2**20))
        rows.append(report.Row(name, way, "scratch_mib", memory.temp_size_in_bytes / 2**20))
    print(report.table(rows))
    if options.json:
        report.write(options.json, rows, ["jax", "jaxlib", "flax", "optax"])


if __name__ == "__main__":
    main()
