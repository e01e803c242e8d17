# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.train: trains the run that .gin files describe."""

import argparse

from t5x_lite import processes
from t5x_lite.cli import gin_arguments
from t5x_lite.cli.command import Command
from t5x_lite.cli.parser import Parser

DESCRIPTION = """\
Trains a model, evaluates it, and keeps everything in MODEL_DIR. The same command again goes on
from the newest checkpoint; a run that was killed ends with the same weights as one that was not."""

EXAMPLES = """\
examples:
  python -m t5x_lite.train --gin_file=configs/runs/g2p.gin --gin.MODEL_DIR=runs/g2p
      the whole run
  ... --dry_run
      the resolved config, parameter count, shapes and placement, and all that the run would refuse
      before its first step; trains nothing, writes nothing to MODEL_DIR
  ... --gin.TRAIN_STEPS=100 --gin.config.Schedule.peak=0.003
      --gin.NAME=VALUE sets any macro or field of the config; strings need no extra quotes
  ... --import=my_tasks
      imports my_tasks.py first, so that it can register seqio tasks
  ... --coordinator=10.0.0.2:8476 --processes=4 --process=0
      one of four processes that train together, each with its own devices; on TPU pods, SLURM and
      Kubernetes they find each other without these flags
  ... --profile
      a trace of five steps in MODEL_DIR/profile, for TensorBoard or Perfetto

MODEL_DIR:
  config.gin, vocabulary/          what is needed to read the weights
  checkpoints/<step>/              weights, optimizer, data position; the last ones and the best
  metrics.jsonl, tensorboard/      losses, speeds and held-out metrics by step
  predictions/                     texts decoded at each evaluation
  report.json, learning_curve.png  at the end

Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 save first; a second one ends at once. Training goes on when a
program that reads its output ends. A signal to one of several processes ends all; MODEL_DIR must be
the same folder for all. Exit status: 0 finished, 2 refused with a reason, 1 failed on the way,
75 another process was lost, 128 + signal when interrupted."""


def parser() -> Parser:
    """Parser of the command."""
    command = Parser("train", description=DESCRIPTION, epilog=EXAMPLES)
    gin_arguments.add_gin(command)
    processes.add_arguments(command)
    command.add_argument("--dry_run", action="store_true", help="print what would be trained")
    command.add_argument(
        "--try_memory", action="store_true", help="train even if memory seems to be too small"
    )
    command.add_argument(
        "--ignore_damaged",
        action="store_true",
        help="begin at step 0 where MODEL_DIR has only damaged checkpoints, which are kept",
    )
    command.add_argument("--profile", action="store_true", help="write a profiler trace")
    return command


def train(args: argparse.Namespace) -> int:
    """Trains, alone or as one of several processes; returns the exit status."""
    meeting = None if args.dry_run else processes.parse_rendezvous(args)
    with processes.process_group(meeting, "t5x_lite.train"):
        return train_here(args)


def train_here(args: argparse.Namespace) -> int:
    """Trains in this process; returns the exit status."""
    from t5x_lite import data
    from t5x_lite.config.training_run import require_training

    run = require_training(data.load_run(args.gin_file, args.bindings))
    # After the config is read: a misspelled name is reported before jax takes its seconds.
    from t5x_lite.training import host, loop, preemption, preflight
    from t5x_lite.training.reporting import dry_run

    host.keep_freed()
    host.prepare_jax()
    run = host.with_device_dtype(run, args.gin_file, args.bindings)
    if args.dry_run:
        print(dry_run.describe_run(run))
        preflight.check_run(run, print, args.try_memory, args.ignore_damaged)
        return 0
    host.quiet_writer_logs()
    with host.surviving_output(), host.naming_lack_of_memory():
        try:
            loop.train(run, args.profile, args.try_memory, args.ignore_damaged)
        except preemption.Interrupted as error:
            preemption.end_process_soon(error.exit_status)
            # A good end for the other processes, which end after the same step.
            return COMMAND.interrupted(error)
    return 0


COMMAND = Command("train", parser, train, afterwards="the same command goes on later")
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
