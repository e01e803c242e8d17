# SPDX-License-Identifier: Apache-2.0
"""Training runs that a benchmark needs: finished if they are not, and what they recorded."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def finish(folder: Path, files: Sequence[str], bindings: Sequence[str]) -> None:
    """Trains the run of these .gin files and bindings in the folder to its end, unless it was.

    What it says goes to <folder>.log. Raises CalledProcessError where it fails.
    """
    if (folder / "report.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    named = [f"--gin_file={file}" for file in files]
    bound = [f"--gin.{each}" for each in (f"MODEL_DIR={folder}", *bindings)]
    print(f"{folder}: training", flush=True)
    with open(f"{folder}.log", "a") as log:
        command = [sys.executable, "-m", "t5x_lite.train", *named, *bound]
        subprocess.run(command, check=True, stdout=log, stderr=log)


def curve(folder: Path, name: str) -> dict[int, float]:
    """Values of metrics.jsonl under the name, by step."""
    with open(folder / "metrics.jsonl") as lines:
        rows = [json.loads(line) for line in lines]
    return {row["step"]: row[name] for row in rows if name in row}


def report(folder: Path) -> dict:
    """The report that the run ended with."""
    return json.loads((folder / "report.json").read_text())
