# SPDX-License-Identifier: Apache-2.0
"""Renew the exact versions that the launch scripts install, in launch/constraints.

    pip install uv
    python launch/constraints.py

newest.txt holds the newest versions that the ranges in pyproject.toml allow, for every Python in
its classifiers; oldest.txt the lower ends of these ranges, for the oldest of these Pythons. Both
pin all that the test extra installs. held.txt lists what is kept below its newest version, and
why. After a renewal run .ci/run, which tests both.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "launch" / "constraints"


def supported_pythons() -> list[str]:
    """Python versions in the classifiers of pyproject.toml, the oldest first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"Python :: (\d+\.\d+)", "\n".join(project["classifiers"]))
    return sorted(versions, key=lambda version: int(version.partition(".")[2]))


def resolved(oldest_python: str, *options: str) -> str:
    """One `name==version` line for each package, with a marker where Pythons or systems differ."""
    # Neither a header nor annotations: they would name the package index of whoever renews.
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra=test"]
    command += ["--constraints=launch/constraints/held.txt"]
    command += ["--universal", f"--python-version={oldest_python}", *options]
    command += ["--upgrade", "--no-header", "--no-annotate", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("uv resolved nothing: see its message above (if it is missing: pip install uv)")
    return done.stdout


def main() -> None:
    """Write newest.txt and oldest.txt."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    pythons = supported_pythons()
    versions = {
        "newest": (pythons, resolved(pythons[0])),
        "oldest": (pythons[:1], resolved(pythons[0], "--resolution=lowest-direct")),
    }
    for name, (covered, pins) in versions.items():
        # launch/environment.sh looks its Python up in the first line.
        header = f"# Python: {' '.join(covered)}\n# Written by launch/constraints.py\n"
        (FOLDER / f"{name}.txt").write_text(header + pins)


if __name__ == "__main__":
    main()
