# SPDX-License-Identifier: Apache-2.0
"""Writes a teacher's logits for the batches of a run, so that training needs no teacher."""

import json
import shutil
import zlib
from collections.abc import Callable

import jax

from t5x_lite import config, data, sharding
from t5x_lite.adaptation import distilled_batches, teacher_logits
from t5x_lite.adaptation import teacher as teachers
from t5x_lite.batch import TeacherLogits
from t5x_lite.checkpoints import digests
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.training import model_dir, setup
from t5x_lite.training.losses import distillation
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import local_path


def write_teacher_logits(
    run: TrainingRun,
    output: str,
    steps: int,
    chunk: int,
    progress: Callable[[int, int], Callable[[int], None]],
) -> int:
    """Writes the teacher's logits for the first steps, continuing a folder that has some of them.

    Args:
      run: config of the run that will train on them.
      output: folder to write to.
      steps: number of steps.
      chunk: steps of a file.
      progress: called with (steps done, bytes of all); returns a callback for the steps done.

    Returns:
      the number of steps in the folder.

    Raises:
      ValueError: an unsuitable teacher, other logits in the folder, or too small a disk.
    """
    check_run(run)
    sharding.use_mesh(run.mesh)
    setup.check_batch(run.train)
    source = data.with_run_vocabulary(run).data
    batches = data.open_batches(source, run.model.layout, run.train.batch_size, run.seed)
    vocabularies = data.open_dataset(source, "train").vocabularies
    teacher = teachers.open_teacher(run, vocabularies)
    with model_dir.lock_folder(local_path(output)):
        params = teacher.params()
        settings = teacher_logits.logits_settings(run)
        settings |= {"chunk": chunk, "weights": weights_digest(params)}
        folder = teacher_logits.TeacherLogitsWriter(output, settings)
        done, needed = folder.done(), teacher_logits_bytes(run, steps)
        check_space(output, needed * max(0, steps - done) // steps)
        on_progress = progress(done, needed)
        top_k = jit_teacher(not_none(run.distillation), teacher)
        builder = distilled_batches.make_builder(teacher, vocabularies[1])
        for first in folder.missing(steps):
            logits, rows = [], []
            for step in range(first, min(first + chunk, steps)):
                batch = batches.at(step)
                read = builder.teacher_data(batch)
                ids, log_probabilities = jax.device_get(top_k(params, sharding.place_batch(read)))
                logits.append(TeacherLogits(ids, log_probabilities, read.known))
                rows.append(teacher_logits.row_digests(batch))
                on_progress(step + 1)
            folder.write(first, logits, rows)
        return folder.done()


def check_run(run: TrainingRun) -> None:
    """Raises ValueError for a run whose teacher logits cannot be written."""
    cfg = run.distillation
    config.require(
        cfg is not None,
        "Run.distillation names the teacher: bind Run.distillation = @config.Distillation() and "
        "Distillation.teacher",
    )
    config.require(
        not_none(cfg).top_k is not None,
        "Distillation.top_k says how many ids are kept for every target: bind it (32, say)",
    )
    config.require(
        not run.data.stream,
        "Data.stream is read only forward: answers need batches by their step",
    )
    config.require(
        jax.process_count() == 1,
        "Answers are written by one process, for all hosts of the run that uses them",
    )


def jit_teacher(cfg: config.Distillation, teacher: teachers.Teacher):
    """Jitted function of the teacher's params and a TeacherBatch: ids [b t k] and log-probabilities
    [b t k + 1]."""

    @jax.jit
    def answer(params, teacher_data):
        assert cfg.top_k is not None
        logits = teachers.compute_logits(teacher, params, teacher_data)
        return distillation.top_k_log_probabilities(logits, cfg.top_k, cfg.temperature)

    return answer


def weights_digest(params) -> int:
    """Checksum of all weights, the same as in earlier versions: their folders stay valid."""
    values = jax.device_get(digests.array_digests(flatten_tree(params), mixed=False))
    return zlib.crc32(json.dumps({name: int(values[name]) for name in sorted(values)}).encode())


def teacher_logits_bytes(run: TrainingRun, steps: int) -> int:
    """Approximate bytes of the logits of `steps` batches."""
    lengths = run.data.lengths
    row = sum(lengths.values()) if run.model.layout == "decoder_only" else lengths["targets"]
    assert run.distillation is not None and run.distillation.top_k is not None
    return steps * run.train.batch_size * row * (6 * run.distillation.top_k + 4)


def check_space(output: str, needed: int) -> None:
    """Raises ValueError if the disk of `output` has no more than `needed` bytes free."""
    free = shutil.disk_usage(output).free
    config.require(
        free > needed,
        f"The answers take {needed / 2**30:,.1f} GiB, but {output} has {free / 2**30:,.1f} GiB "
        "free: lower Distillation.top_k or --steps, or choose another --output",
    )
