# SPDX-License-Identifier: Apache-2.0
"""Trains the run that .gin files describe: python -m t5x_lite.train --help."""

import argparse
import sys

from t5x_lite import gin_arguments, processes

TEACHING = """\
Trains a model, evaluates it, and keeps everything in MODEL_DIR. The same command again goes on
from the newest checkpoint; a run that was killed ends with the same weights as one that was not.

examples
  python -m t5x_lite.train --gin_file=configs/runs/g2p.gin --gin.MODEL_DIR=runs/g2p
      the whole run
  ... --dry_run
      the resolved config, parameter count, shapes and placement; trains nothing, writes nothing
  ... --gin.TRAIN_STEPS=100 --gin.config.Schedule.peak=0.003
      --gin.NAME=VALUE sets any macro or field of the config; strings need no extra quotes
  ... --import=my_tasks
      imports my_tasks.py first, so that it can register seqio tasks
  ... --coordinator=10.0.0.2:8476 --processes=4 --process=0
      one of four processes that train together, each with its own devices; on TPU pods, SLURM and
      Kubernetes they find each other without these flags
  ... --profile
      a trace of five steps in MODEL_DIR/profile, for TensorBoard or Perfetto

what MODEL_DIR holds
  config.gin, vocabulary/          what is needed to read the weights
  checkpoints/<step>/              weights, optimizer, data position; the last ones and the best
  metrics.jsonl, tensorboard/      losses, speeds and held-out metrics by step
  predictions/                     what was decoded at each evaluation
  report.json, learning_curve.png  at the end

Ctrl-C and SIGTERM save first; a second one ends at once. Of several processes one is enough, and
all end; MODEL_DIR must be the same folder for all. Exit status: 0 finished, 1 refused
or failed with a reason, 75 another process was lost, 128 + signal when interrupted."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m t5x_lite.train",
        description=TEACHING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    gin_arguments.add(made)
    processes.add(made)
    made.add_argument("--dry_run", action="store_true", help="print what would be trained")
    made.add_argument("--profile", action="store_true", help="write a profiler trace")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; gives back its exit status."""
    known, extra = parser().parse_known_args(arguments)
    try:
        found = gin_arguments.bindings(extra)
        meeting = None if known.dry_run else processes.meeting(known)
        with processes.joined(meeting, "t5x_lite.train"):
            return command(known, found)
    except ValueError as error:
        print(f"t5x_lite.train: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # A disk that is full, read-only or gone: a traceback would say no more.
        print(f"t5x_lite.train: {error}. The same command goes on later.", file=sys.stderr)
        return 1


def command(known: argparse.Namespace, found: list[str]) -> int:
    gin_arguments.bring(known.modules)
    from t5x_lite import config_file

    run = config_file.load(known.gin_file, found)
    # After the config is read: a misspelt name is told at once, before jax takes its seconds.
    from t5x_lite.training import checkpoint, compilation, dry_run, interrupts, loop, memory

    memory.keep_freed()
    compilation.keep_compiled()
    if known.dry_run:
        print(dry_run.text(run))
        return 0
    checkpoint.tell_once()
    try:
        loop.train(run, profile=known.profile)
    except interrupts.Interrupted as error:
        print(f"t5x_lite.train: ended by {error}", file=sys.stderr)
        return 128 + error.number
    return 0


if __name__ == "__main__":
    sys.exit(main())
