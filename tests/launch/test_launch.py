# SPDX-License-Identifier: Apache-2.0
"""Launchers print what they would run, it survives preemption, and installations are pinned."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
GOLDEN = Path(__file__).parents[1] / "golden"
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
    options = dict(capture_output=True, text=True, timeout=60)
    return subprocess.run(command, env=os.environ | environment, **options)


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
    for words, message in (
        (["--nodse=2"], "unknown flag --nodse=2"),
        (["--name="], "--name=VALUE"),
    ):
        done = launch([script, *first, *words])
        assert done.returncode == 1 and message in done.stderr
    assert "is missing" in launch([script, *first]).stderr


def test_shellcheck_finds_nothing():
    scripts = [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci" / "run"]
    shellcheck = Path(sys.executable).parent / "shellcheck"
    command = [shellcheck, "--external-sources", *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))


def applies(requirement: Requirement, python: str) -> bool:
    """True if a requirement's marker holds in this version of Python, on Linux."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    version = {"python_version": python, "python_full_version": f"{python}.0"}
    marker = requirement.marker
    return marker is None or marker.evaluate(default_environment() | linux | version)


def declared(python: str, extra: str = "test") -> list[Requirement]:
    """Direct dependencies, and those of an extra and the extras that it includes."""
    written = PROJECT["optional-dependencies"][extra]
    requirements = [Requirement(line) for line in PROJECT["dependencies"] + written]
    for requirement in [each for each in requirements if each.name == PROJECT["name"]]:
        for included in requirement.extras:
            requirements += declared(python, included)

    def own(requirement):
        return requirement.name == PROJECT["name"]

    return [each for each in requirements if applies(each, python) and not own(each)]


def pins(name: str, python: str) -> dict[str, Version]:
    """The versions that a constraints file has for a Python, by package."""
    text = (LAUNCH / "constraints" / f"{name}.txt").read_text()
    lines = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    lines = [requirement for requirement in lines if applies(requirement, python)]
    versions = {line.name: Version(str(line.specifier).removeprefix("==")) for line in lines}
    assert len(versions) == len(lines), "two versions of one package"
    return versions


@pytest.mark.parametrize("python", PYTHONS)
def test_newest_pins_lie_within_the_declared_ranges(python):
    versions = pins("newest", python)
    for requirement in declared(python):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_oldest_pins_are_the_declared_lower_ends():
    versions = pins("oldest", PYTHONS[0])
    for requirement in declared(PYTHONS[0]):
        ends = {end.operator: end.version for end in requirement.specifier}
        assert ends.keys() == {">=", "<"}, f"{requirement} is not a range with two ends"
        assert versions[canonicalize_name(requirement.name)] == Version(ends[">="]), requirement


def test_devices_take_the_same_jax_as_everybody():
    extras = PROJECT["optional-dependencies"]
    (jax,) = [line for line in PROJECT["dependencies"] if line.startswith("jax>")]
    for extra, name in (("tpu", "tpu"), ("cuda", "cuda12"), ("cuda13", "cuda13")):
        assert extras[extra] == [jax.replace("jax", f"jax[{name}]", 1)]


@pytest.mark.parametrize("name", ["newest", "oldest"])
def test_constraints_are_pins_alone_and_name_no_index(name):
    first, _, *lines = (LAUNCH / "constraints" / f"{name}.txt").read_text().splitlines()
    covered = PYTHONS if name == "newest" else PYTHONS[:1]
    assert first == f"# Python: {' '.join(covered)}"
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+( ; [^:/@]+)?", line), line


def test_python_without_tensorflow_wheels_leaves_seqio_out():
    assert {"tensorflow", "seqio"} <= pins("newest", "3.13").keys()
    assert not {"tensorflow", "tensorflow-text", "seqio"} & pins("newest", "3.14").keys()


# Writes down what it is called with; environments that it creates hold copies of it.
FAKE_PYTHON = """#!/usr/bin/env bash
name=$(basename "$0")
case "$*" in
  --version) echo "Python VERSION.0" ;;
  *version_info*) echo VERSION ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pytest" ;;
  *ensurepip* | *"pip list"* | *--report*) ;;
  *) echo "VERSION ${name%3*} $* ${PIP_CONSTRAINT##*/}" >> "$CALLS" ;;
esac
[ "$name" != pytest ] || echo "== 3 passed in 0.01s =="
case "$name $FAILS" in "pytest VERSION") exit 1 ;; esac
"""


class Clone:
    """A copy of the scripts, with Pythons on the PATH that only write down what they are to run."""

    def __init__(self, path: Path, *versions: str):
        self.root, self.bin, self.log = path / "a clone", path / "bin", path / "calls"
        for folder in ("launch", ".ci"):
            shutil.copytree(ROOT / folder, self.root / folder)
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.bin.mkdir()
        for version in versions:
            self.add_python(self.bin / f"python{version}", version)

    def add_python(self, path: Path, version: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE_PYTHON.replace("VERSION", version))
        path.chmod(0o755)

    def run(self, script: str, *words: str, **changes: str):
        """The calls of Python since the last run of a script with words, in an environment with
        changes, and how it ended."""
        self.log.write_text("")
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "CALLS": str(self.log)}
        environment |= {"HOME": str(self.bin), "FAILS": ""} | changes
        command = ["bash", self.root / script, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return self.log.read_text().splitlines(), done


SCRIPTS = ["launch/test.sh", "launch/quickstart.sh", "launch/docs.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "flag, file", [("", "newest.txt"), ("--unpinned", ""), ("--oldest", "oldest.txt")]
)
def test_every_installation_is_pinned_but_with_unpinned(tmp_path, script, flag, file):
    calls, done = Clone(tmp_path, "3.11").run(script, *filter(None, [flag]), PYTHON="python3.11")
    if flag == "--oldest" and script != "launch/test.sh":
        assert done.returncode == 1 and "unknown flag --oldest" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    installing = [call for call in calls if "pip install" in call]
    assert installing and all(call.rpartition(" ")[2] == file for call in installing)
    assert all(("--upgrade" in call) == (flag == "--unpinned") for call in installing)


@pytest.mark.parametrize("script", [*SCRIPTS, "launch/constraints.py"])
def test_scripts_that_install_have_help(script):
    command = [sys.executable] if script.endswith(".py") else ["bash"]
    for flag in ("-h", "--help"):
        done = subprocess.run([*command, ROOT / script, flag], capture_output=True, text=True)
        assert done.returncode == 0 and script in done.stdout


def test_tests_install_again_only_after_a_change(tmp_path):
    clone = Clone(tmp_path, "3.13")
    arguments = ["-m", "not slow"]
    installed = [
        any(
            "pip install" in call
            for call in clone.run("launch/test.sh", *arguments, PYTHON="python3.13")[0]
        )
        for _ in range(2)
    ]
    assert installed == [True, False]
    with (clone.root / "pyproject.toml").open("a") as file:
        file.write("# another line")
    calls, done = clone.run("launch/test.sh", *arguments, PYTHON="python3.13")
    assert any("pip install" in call for call in calls)
    assert "pytest --numprocesses=2" in calls[-1] and "-m not slow" in calls[-1]


def test_a_python_without_pins_is_refused_and_may_go_without(tmp_path):
    clone = Clone(tmp_path, "3.13", "3.15")
    for words, python in (([], "3.15"), (["--oldest"], "3.13")):
        calls, done = clone.run("launch/test.sh", *words, PYTHON=f"python{python}")
        assert done.returncode == 1 and not calls
        assert f"this is {python}" in done.stderr and "--unpinned" in done.stderr
    calls, done = clone.run("launch/test.sh", "--unpinned", PYTHON="python3.15")
    assert done.returncode == 0 and calls


def test_an_environment_of_another_python_is_named(tmp_path):
    clone = Clone(tmp_path, "3.11", "3.13")
    assert clone.run("launch/test.sh", PYTHON="python3.11")[1].returncode == 0
    calls, done = clone.run("launch/test.sh", PYTHON="python3.13")
    assert done.returncode == 1 and not calls
    assert "remove .venv-test" in done.stderr


@pytest.mark.parametrize("fails", ["", "3.11", "3.14"])
def test_integration_runs_both_ends_and_fails_with_either(tmp_path, fails):
    clone = Clone(tmp_path, "3.11", "3.12")
    # A name on the PATH that does not run, as pyenv leaves them, and the Python behind it.
    (clone.bin / "python3.14").write_text("#!/bin/sh\nexit 127\n")
    (clone.bin / "python3.14").chmod(0o755)
    clone.add_python(tmp_path / "pyenv" / "versions" / "3.14.2" / "bin" / "python3.14", "3.14")
    calls, done = clone.run(".ci/run", FAILS=fails, PYENV_ROOT=str(tmp_path / "pyenv"))
    newest, oldest = [call for call in calls if " pytest " in call]
    assert newest.startswith("3.14") and newest.endswith("newest.txt") and "-m" not in newest
    assert oldest.startswith("3.11") and oldest.endswith("oldest.txt") and "-m not slow" in oldest
    *_, of_newest, of_oldest, last = done.stdout.splitlines()
    assert last == "== 3 passed in 0.01s =="
    assert (done.returncode != 0) == bool(fails)
    assert ("FAILED" in of_newest, "FAILED" in of_oldest) == (fails == "3.14", fails == "3.11")
    assert "installed in" in of_newest and "Python 3.14" in of_newest


def test_integration_takes_the_python_that_is_named(tmp_path):
    clone = Clone(tmp_path, "3.11", "3.12", "3.14")
    calls, done = clone.run(".ci/run", PYTHON="python3.12")
    assert done.returncode == 0, done.stderr
    assert [call[:4] for call in calls if " pytest " in call] == ["3.12", "3.11"]
