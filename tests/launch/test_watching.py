# SPDX-License-Identifier: Apache-2.0
"""Launchers that watch a run destroy nothing on missing information, and come to an end."""

import os
import subprocess
from pathlib import Path

import pytest
from test_launch import POD, TRAINING, dry, launch, words_of

# What is asked of it is written down, and each answer is the next line of a file: states of the
# slice (two are errors), exit statuses of training, and what its newest start resumed.
FAKE = """#!/usr/bin/env bash
cd "$(dirname "$0")"
answer() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$*" in
  *describe*)
    now=$(answer states)
    case "$now" in
      NOT_FOUND) echo "ERROR: NOT_FOUND: Resource pod was not found" >&2; exit 1 ;;
      ERROR) echo "ERROR: the service is unavailable" >&2; exit 1 ;;
      *) echo "WARNING: an update is there" >&2; echo "$now" ;;
    esac ;;
  *"cat status"*) answer statuses ;;
  *"grep -o"*) answer resumed ;;
  *"tail -n"*) echo "step 7" ;;
  *) printf '%s\\n' "$*" | sed -E "s/.*(create|delete|scp|t5x_lite.train|uv venv).*/\\1/" >> done ;;
esac
case "$* $(head -n 1 scp 2>/dev/null)" in *scp*fails) sed -i 1d scp; exit 1 ;; esac
"""


def watched(path: Path, states: str, statuses: str, what: str = "run", **files: str):
    """The launcher against these answers: its calls, and how it ended.

    Args:
      path: folder of the answers.
      states: states of the slice, one after the other.
      statuses: exit statuses of training.
      what: command of the launcher.
      **files: further answers, by name of their file.
    """
    (path / "gcloud").write_text(FAKE)
    (path / "gcloud").chmod(0o755)
    answers = {"resumed": "", **files}
    answers |= {"states": "\n".join(states.split()), "statuses": "\n".join(statuses.split(","))}
    for name, text in answers.items():
        (path / name).write_text(text + "\n")
    words = ["tpu_vm.sh", what, *POD, "--poll=0", "--", *TRAINING]
    ended = launch(words, PATH=f"{path}:{os.environ['PATH']}")
    did = (path / "done").read_text().split("\n") if (path / "done").exists() else []
    known = ("create", "delete", "scp", "t5x_lite.train")
    return [each for each in did if each in known], ended


BEGIN = ["create", "scp", "t5x_lite.train"]


@pytest.mark.parametrize("lost", ["SUSPENDED", "FAILED"])
def test_a_slice_taken_away_is_asked_for_again_and_given_back_at_the_end(tmp_path, lost):
    states = f"NOT_FOUND WAITING_FOR_RESOURCES ACTIVE ACTIVE {lost} NOT_FOUND ACTIVE ACTIVE"
    did, ended = watched(tmp_path, states, ",0")
    assert ended.returncode == 0, ended.stderr
    assert did == [*BEGIN, "delete", *BEGIN, "delete"]
    assert "taken away" in ended.stderr and "WAITING_FOR_RESOURCES" in ended.stderr


def test_a_slice_that_is_gone_is_asked_for_again_without_a_deletion(tmp_path):
    did, ended = watched(tmp_path, "ACTIVE NOT_FOUND NOT_FOUND ACTIVE ACTIVE", ",0", what="watch")
    assert ended.returncode == 0, ended.stderr
    assert did == BEGIN


@pytest.mark.parametrize("word", ["ERROR", "SUSPENDING", "CREATING", "UNHEARD_OF"])
def test_what_is_no_clear_loss_destroys_nothing(tmp_path, word):
    states = f"ACTIVE {word or '_'} {word or '_'} ACTIVE {word or '_'} ACTIVE".replace(
        "_", "UNKNOWN"
    )
    did, ended = watched(tmp_path, states, ",,0", what="watch")
    assert ended.returncode == 0, ended.stderr
    assert did == []


def test_errors_while_a_slice_comes_back_are_asked_again(tmp_path):
    states = "ACTIVE SUSPENDED ERROR NOT_FOUND ERROR ACTIVE ACTIVE ACTIVE ACTIVE ACTIVE"
    did, ended = watched(tmp_path, states, ",0", what="watch", scp="fails")
    assert ended.returncode == 0, ended.stderr
    assert did == ["delete", "create", "scp", "scp", "t5x_lite.train"]


def test_training_that_lost_a_host_begins_again_and_a_mistake_does_not(tmp_path):
    did, ended = watched(tmp_path, "ACTIVE " * 9, ",75,,1", what="watch")
    assert did == ["t5x_lite.train"]
    assert ended.returncode == 1 and "ended with status 1" in ended.stderr


def test_starts_without_a_new_checkpoint_come_to_an_end(tmp_path):
    did, ended = watched(tmp_path, "ACTIVE " * 40, ",".join(["137"] * 40), what="watch")
    assert did == ["t5x_lite.train"] * 4
    assert ended.returncode == 1 and "5 starts without a new checkpoint" in ended.stderr
    progress = tmp_path / "progress"
    progress.mkdir()
    resumed = "".join(f"checkpoint of step {step}\n" for step in (0, 0, 0, 8, 8, 8, 8, 8, 8))
    killed = ",".join(["137"] * 40)
    did, ended = watched(progress, "ACTIVE " * 40, killed, what="watch", resumed=resumed)
    assert did == ["t5x_lite.train"] * 7


def test_a_job_of_slurm_counts_its_starts_in_its_log(tmp_path):
    words = ["slurm.sh", "--nodes=1", "--gpus=1", "--python=train", "--", *TRAINING]
    job = launch(dry(words)).stdout.partition("\n")[2]
    (tmp_path / "srun").write_text("#!/bin/sh\nhead -n 1 resumed\nsed -i 1d resumed\nexit 137\n")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho $@ >> queued\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    steps = ("", "", "8", "8", "8", "8", "8", "8")
    lines = [f"Going on from the checkpoint of step {step}." if step else "" for step in steps]
    (tmp_path / "resumed").write_text("\n".join(lines) + "\n")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    with open(tmp_path / "t5x_lite-7.log", "a") as log:
        for start in range(1, 8):
            subprocess.run(["bash", "-c", job], cwd=tmp_path, env=environment, stdout=log)
            queued = (tmp_path / "queued").read_text().count("requeue 7")
            assert queued == min(start, 6)
    assert "5 starts without a new checkpoint" in (tmp_path / "t5x_lite-7.log").read_text()


def test_words_of_the_user_are_quoted_in_remote_commands():
    words = ["tpu_vm.sh", "up", *POD, "--bucket=my bucket; rm -r ~"]
    printed = launch([*words, "--dry_run"]).stdout
    (line,) = [line for line in printed.splitlines() if "gcsfuse" in line]
    (remote,) = [word for word in words_of(line) if word.startswith("--command=")]
    assert words_of(remote.partition("gcsfuse ")[2].rstrip(")")) == [
        "--implicit-dirs",
        "my bucket; rm -r ~",
        "shared",
    ]
