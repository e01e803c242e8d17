# SPDX-License-Identifier: Apache-2.0
"""Launchers print what they would run, and what they run survives preemption."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
GOLDEN = Path(__file__).parent / "golden"
TRAINING = ["--gin_file=configs/runs/pretrain.gin", "--gin.TASK=it's mine"]
POD = ["--name=pod", "--zone=us-west4-a", "--type=v5litepod-16"]
GKE = ["--cluster=ours", "--zone=us-east5-b", "--type=v6e-16", "--slices=2", "--name=pretrain"]
DRY = {
    "tpu_vm_run": ["tpu_vm.sh", "run", *POD, "--spot", "--bucket=mine", "--", *TRAINING],
    "tpu_vm_stop": ["tpu_vm.sh", "stop", *POD, "--project=ours"],
    "tpu_vm_logs": ["tpu_vm.sh", "logs", *POD],
    "xpk_create": ["xpk.sh", "create", *GKE, "--spot", "--bucket=mine"],
    "xpk_train": ["xpk.sh", "train", *GKE, "--bucket=mine", "--", *TRAINING],
    "xpk_image": ["xpk.sh", "train", *GKE, "--image=eu.example/ours", "--", *TRAINING],
    "xpk_delete": ["xpk.sh", "delete", *GKE],
    "slurm": ["slurm.sh", "--nodes=4", "--gpus=8", "--account=us", "--", *TRAINING],
}


def launch(words: list[str], **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", LAUNCH / words[0], *words[1:]]
    told = dict(capture_output=True, text=True, timeout=60)
    return subprocess.run(command, env=os.environ | environment, **told)


def dry(words: list[str]) -> list[str]:
    before = words.index("--") if "--" in words else len(words)
    return [*words[:before], "--dry_run", *words[before:]]


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_prints_the_commands(name):
    done = launch(dry(DRY[name]))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (GOLDEN / f"{name}.txt").read_text()


def words_of(text: str) -> list[str]:
    """A command's words, as bash sees them."""
    read = ["bash", "-c", f"printf '%s\\n' {text}"]
    return subprocess.run(read, capture_output=True, text=True).stdout.splitlines()


def test_what_a_dry_run_prints_is_what_a_shell_reads_back():
    printed = launch(dry(DRY["xpk_train"])).stdout
    (command,) = [word for word in words_of(printed) if word.startswith("--command=")]
    inner = command.removeprefix("--command=").partition("-m t5x_lite.train ")[2]
    assert words_of(inner) == TRAINING


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh", "slurm.sh"])
def test_help_has_examples_and_mistakes_are_named(script):
    done = launch([script, "--help"])
    assert done.returncode == 0 and "examples\n" in done.stdout
    first = ["run"] if script == "tpu_vm.sh" else ["train"] if script == "xpk.sh" else []
    for words, said in ((["--nodse=2"], "unknown flag --nodse=2"), (["--name="], "--name=VALUE")):
        done = launch([script, *first, *words])
        assert done.returncode == 1 and said in done.stderr
    assert "is missing" in launch([script, *first]).stderr


def test_shellcheck_finds_nothing():
    scripts = sorted(LAUNCH.glob("*.sh"))
    shellcheck = Path(sys.executable).parent / "shellcheck"
    command = [shellcheck, "--external-sources", *scripts]
    done = subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# A slice that is taken away while the second look is taken, and training that once loses a host:
# what is asked of it is written down, and each answer is the next line of a file.
FAKE = """#!/usr/bin/env bash
cd "$(dirname "$0")"
answer() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$*" in
  *describe*) answer states ;;
  *"cat status"*) answer statuses ;;
  *"tail -n"*) echo "step 7" ;;
  *) printf '%s\\n' "$*" | sed -E "s/.*(create|delete|scp|t5x_lite.train|uv venv).*/\\1/" >> done ;;
esac
"""


def watched(path: Path, states: str, statuses: str, what: str = "run"):
    """What the launcher did against these answers, and how it ended."""
    (path / "gcloud").write_text(FAKE)
    (path / "gcloud").chmod(0o755)
    (path / "states").write_text("\n".join(states.split()) + "\n")
    (path / "statuses").write_text("\n".join(statuses.split(",")) + "\n")
    words = ["tpu_vm.sh", what, *POD, "--poll=0", "--", *TRAINING]
    ended = launch(words, PATH=f"{path}:{os.environ['PATH']}")
    did = (path / "done").read_text().split("\n") if (path / "done").exists() else []
    known = ("create", "delete", "scp", "t5x_lite.train")
    return [each for each in did if each in known], ended


def test_a_slice_taken_away_is_asked_for_again_and_given_back_at_the_end(tmp_path):
    states = "NONE WAITING_FOR_RESOURCES ACTIVE ACTIVE SUSPENDED NONE ACTIVE ACTIVE ACTIVE"
    did, ended = watched(tmp_path, states, ",0")
    assert ended.returncode == 0, ended.stderr
    once = ["create", "scp", "t5x_lite.train"]
    assert did == [*once, "delete", *once, "delete"]
    assert "taken away" in ended.stderr and "WAITING_FOR_RESOURCES" in ended.stderr


def test_training_that_lost_a_host_begins_again_and_a_mistake_does_not(tmp_path):
    did, ended = watched(tmp_path, "ACTIVE " * 9, ",75,,1", what="watch")
    assert did == ["t5x_lite.train"]
    assert ended.returncode == 1 and "ended with status 1" in ended.stderr
