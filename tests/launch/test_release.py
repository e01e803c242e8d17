# SPDX-License-Identifier: Apache-2.0
"""Laws of a release: wheel and sdist are whole, and work in an environment far from the clone.

Needs a package index. Pythons that are not on the machine are skipped.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

from t5x_lite.utils import packaged

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "launch" / "constraints" / "newest.txt"
LEFT_OUT = ("__pycache__", "*.egg-info", ".git", ".*_cache", ".venv*")
# Folders at the top that git ignores.
OUTPUTS = {"build", "dist", "runs", "site"}
# Files of the package that are not code.
DATA = ("configs/**/*.gin", "checkpoints/packaged/*/**/*", "demo/*.html", "py.typed")


class Distributions(NamedTuple):
    """The files of a release."""

    wheel: Path
    sdist: Path


def run(words: list, folder: Path, **options) -> subprocess.CompletedProcess:
    """A command of words, in a folder and in an environment that has no trace of the clone; options
    are those of subprocess.run."""
    keep = ("PATH", "LANG", "SSL_CERT_FILE", "XDG_CONFIG_DIRS")
    environment = {k: v for k, v in os.environ.items() if k in keep or k.startswith("PIP_")}
    environment |= {"HOME": str(folder), "JAX_PLATFORMS": "cpu", "PIP_CONSTRAINT": str(CONSTRAINTS)}
    return subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        **options,
    )


def check_run(words: list, folder: Path, **options) -> str:
    """Output of a command of words in a folder that ends well, with options as in `run`."""
    done = run(words, folder, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Path:
    """Folder of the programs that build and check distributions."""
    folder = tmp_path_factory.mktemp("tools")
    check_run([sys.executable, "-m", "venv", "venv"], folder)
    bin = folder / "venv" / "bin"
    done = run([bin / "pip", "install", "-q", "build", "twine"], folder)
    if done.returncode:
        pytest.skip(f"no package index here: {done.stderr.splitlines()[-1]}")
    return bin


@pytest.fixture(scope="module")
def distributions(tools, tmp_path_factory) -> Distributions:
    """A release as docs/releasing.md builds it: the wheel comes from the sdist."""
    folder = tmp_path_factory.mktemp("release")
    everywhere = shutil.ignore_patterns(*LEFT_OUT)

    def ignore(path: str, names: list[str]) -> set[str]:
        return everywhere(path, names) | (OUTPUTS & set(names) if Path(path) == ROOT else set())

    shutil.copytree(ROOT, folder / "clone", symlinks=True, ignore=ignore)
    check_run([tools / "python", "-m", "build", folder / "clone", "-o", folder / "dist"], folder)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return Distributions(wheel, sdist)


def package_files() -> set[str]:
    """Files of the package that a release has to have."""
    package = ROOT / "t5x_lite"
    folders = (package, ROOT / "kernels")
    code = {path for folder in folders for path in folder.rglob("*.py")}
    data = {path for pattern in DATA for path in package.glob(pattern) if path.is_file()}
    data |= {package / "configs" / path.relative_to(ROOT / "configs") for path in gin_files()}
    names = {str(path.relative_to(ROOT)) for path in code | data}
    return {name if name.startswith("t5x_lite/") else f"t5x_lite/{name}" for name in names}


def gin_files() -> list[Path]:
    return list((ROOT / "configs").rglob("*.gin"))


@pytest.mark.slow  # a build, and the installation of its tools
def test_both_distributions_have_every_file_and_pass_the_check_of_an_index(tools, distributions):
    checked = check_run([tools / "twine", "check", "--strict", *distributions], ROOT)
    assert checked.count("PASSED") == 2
    with zipfile.ZipFile(distributions.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        text = wheel.read(metadata).decode()
    assert names == package_files()
    with tarfile.open(distributions.sdist) as sdist:
        members = {name.partition("/")[2] for name in sdist.getnames()}
    assert package_files() <= members
    for field in ("Summary", "License-Expression", "Requires-Python", "Keywords", "Author"):
        assert f"\n{field}: " in text
    assert "Description-Content-Type: text/markdown" in text and "# t5x_lite" in text
    # Wheels of Python alone, far below the 100 MB that indexes take.
    assert distributions.wheel.name.endswith("-py3-none-any.whl")
    assert distributions.wheel.stat().st_size < 10e6


def find_python(version: str) -> str | None:
    """Python of a version: this one, one on the PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    versions = sorted(pyenv.glob(f"{version}.*/bin/python{version}"))
    for candidate in (f"python{version}", *versions):
        try:
            subprocess.run([candidate, "-c", "import venv, ensurepip"], check=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            continue
        return str(candidate)
    return None


class Installed(NamedTuple):
    """An environment with a release and nothing else, and an empty folder to work in."""

    bin: Path
    folder: Path


@pytest.fixture(
    scope="module", params=["3.12 wheel", "3.13 sdist", "3.14 wheel"], ids=lambda each: each
)
def installed(request, distributions, tmp_path_factory) -> Installed:
    version, _, kind = request.param.partition(" ")
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version} is here")
    folder = tmp_path_factory.mktemp("installed")
    check_run([python, "-m", "venv", folder / "venv"], folder)
    file = distributions.wheel if kind == "wheel" else distributions.sdist
    check_run([folder / "venv" / "bin" / "pip", "install", "-q", file], folder)
    (folder / "work").mkdir()
    return Installed(folder / "venv" / "bin", folder / "work")


# Commands as messages, helps and the README have them, with less to do.
COMMANDS = (
    "--version",
    "train --gin_file=configs/runs/pretrain.gin --dry_run",
    "train --gin_file=configs/runs/quickstart.gin --gin.TRAIN_STEPS=8 --gin.MODEL_DIR=runs/q "
    "--gin.config.Evaluate.examples=8 --gin.config.Evaluate.batches=1",
    "eval --checkpoint=runs/q --split=test --examples=8 --batches=1",
    "infer --checkpoint=runs/q --text",
    "convert --from=runs/q --to=g2p_hf --format=huggingface --dtype=bfloat16",
    "infer --checkpoint=g2p_hf --text",
    "data --gin_file=configs/data/cmudict_g2p.gin --preview=1",
    "compare --gin_file=configs/runs/compare_g2p.gin --dry_run",
    "plan --gin_file=configs/runs/pretrain.gin --chips=h100x8",
    *(f"infer --checkpoint={name} --text" for name in packaged.packaged_names()),
)


@pytest.mark.exhaustive  # downloads and installs everything, for each Python
def test_commands_work_where_only_the_release_is(installed):
    bin, folder = installed
    for command in COMMANDS:
        check_run([bin / "t5x_lite", *command.split()], folder, input="cab\n")
    where = check_run([bin / "python", "-c", "import t5x_lite; print(t5x_lite.__file__)"], folder)
    assert Path(where.strip()).is_relative_to(bin.parent)


@pytest.mark.exhaustive
def test_every_command_has_its_help_there(installed):
    bin, folder = installed
    listed = check_run([bin / "t5x_lite"], folder)
    names = [line.split()[0] for line in listed.splitlines() if line.startswith("  ")]
    assert len(names) > 10
    for name in names:
        assert "usage:" in check_run([bin / "t5x_lite", name, "--help"], folder)


@pytest.mark.exhaustive
def test_messages_there_install_what_an_extra_requires(installed):
    bin, folder = installed
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    code = "import sys; from t5x_lite.utils import extras; "
    code += "print(extras.install_command(sys.argv[1]))"
    for extra in ("plan", "gguf", "demo", "serve", "buckets"):
        command = check_run([bin / "python", "-c", code, extra], folder).strip()
        words = command.removeprefix("pip install ").replace("'", "").split()
        wanted = {str(Requirement(each).name) for each in project["optional-dependencies"][extra]}
        assert {Requirement(word).name for word in words} == wanted


@pytest.mark.exhaustive
def test_nothing_of_the_clone_is_imported_at_the_start(installed):
    bin, folder = installed
    code = "import sys, t5x_lite.interactive; print('jax' in sys.modules, 'torch' in sys.modules)"
    assert check_run([bin / "python", "-c", code], folder).split() == ["False", "False"]
