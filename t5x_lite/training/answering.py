# SPDX-License-Identifier: Apache-2.0
"""Writes a teacher's answers to the batches of a run, so that training needs no teacher."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import jax

from t5x_lite import config, data, sharding
from t5x_lite.adaptation import answers, distillation
from t5x_lite.adaptation import teacher as teachers
from t5x_lite.batch import Answers
from t5x_lite.training import archive, divergence, folder, setup


def write(
    run: config.Run,
    output: str,
    steps: int,
    chunk: int,
    progress: Callable[[int, int], Callable[[int], None]],
) -> int:
    """Writes the answers for the first `steps` steps to the folder `output`, going on where it
    ended before; gives back how many are there.

    progress(done, bytes of all) makes what hears how many steps are done.

    Raises:
      ValueError: the teacher does not suit the run, the folder holds other answers, or the disk is
        too small.
    """
    check(run)
    sharding.use_mesh(run.mesh)
    setup.check_batch(run.train)
    batches = data.open_batches(run.data, run.model.layout, run.train.batch_size, run.seed)
    vocabularies = data.open_dataset(run.data, "train").vocabularies
    teacher = teachers.open_teacher(run, vocabularies)
    with folder.locked(Path(output)):
        params = teacher.params()
        told = answers.settings(run) | {"chunk": chunk, "weights": weights_digest(params)}
        place = answers.Folder(output, told)
        done, needed = place.done(), size(run, steps)
        check_space(output, needed * max(0, steps - done) // steps)
        heard = progress(done, needed)
        answer = jitted(run.distillation, teacher)
        reading = distillation.Reading(teacher.model, teacher.size)
        for first in range(place.first(), steps if done < steps else 0, chunk):
            found, rows = [], []
            for step in range(first, min(first + chunk, steps)):
                batch = batches.at(step)
                lesson = reading.lesson(batch)
                ids, logarithms = jax.device_get(answer(params, sharding.place_batch(lesson)))
                found.append(Answers(ids, logarithms, lesson.known))
                rows.append(answers.digests(batch))
                heard(step + 1)
            place.write(first, found, rows)
        return place.done()


def check(run: config.Run) -> None:
    """Raises ValueError for a run whose answers cannot be written."""
    cfg = run.distillation
    config.require(
        cfg is not None and run.train is not None and run.data is not None,
        "Run.distillation names the teacher: bind Run.distillation = @config.Distillation() and "
        "Distillation.teacher",
    )
    config.require(
        cfg.top_k is not None,
        "Distillation.top_k says how many ids are kept for every target: bind it (32, say)",
    )
    config.require(
        not run.data.stream,
        "Data.stream is read only forwards: answers need batches by their step",
    )
    config.require(
        jax.process_count() == 1,
        "Answers are written by one process, for all hosts of the run that uses them",
    )


def jitted(cfg: config.Distillation, teacher: teachers.Teacher):
    """ids [b t k] and log-probabilities [b t k + 1] as a function of params and a lesson."""

    @jax.jit
    def answer(params, lesson):
        said = teachers.logits(teacher, params, lesson)
        return divergence.best(said, cfg.top_k, cfg.temperature)

    return answer


def weights_digest(params) -> int:
    """One number that is another if any weight is."""
    found = jax.device_get(archive.digest_all(archive.flatten(params)))
    return zlib.crc32(json.dumps({name: int(found[name]) for name in sorted(found)}).encode())


def size(run: config.Run, steps: int) -> int:
    """Bytes of the answers to `steps` batches, about."""
    lengths = run.data.lengths
    row = sum(lengths.values()) if run.model.layout == "joined" else lengths["targets"]
    return steps * run.train.batch_size * row * (6 * run.distillation.top_k + 4)


def check_space(output: str, needed: int) -> None:
    free = shutil.disk_usage(output).free
    config.require(
        free > needed,
        f"The answers take {needed / 2**30:,.1f} GiB, but {output} has {free / 2**30:,.1f} GiB "
        "free: lower Distillation.top_k or --steps, or choose another --output",
    )
