# SPDX-License-Identifier: Apache-2.0
"""Every twin trained with every seed, each by the train command in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

from t5x_lite import config, config_file


def train(run: config.Run, modules: list[str]) -> dict:
    """The report that the run ends with; trained to its end unless it was already.

    Killed and started again it goes on: the train command does.

    Raises:
      ValueError: training failed; what it said stands above.
    """
    folder = Path(run.model_dir)
    finished = folder / "report.json"
    if not finished.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        written = folder.parent / f"{folder.name}.gin"
        written.write_text(config_file.text(run), encoding="utf-8")
        imports = [f"--import={module}" for module in modules]
        command = [sys.executable, "-m", "t5x_lite.train", f"--gin_file={written}", *imports]
        status = subprocess.run(command, check=False).returncode
        if status:
            raise ValueError(
                f"training {folder} ended with status {status}; the same command goes on from its "
                "last checkpoint"
            )
    return json.loads(finished.read_text(encoding="utf-8"))
