# SPDX-License-Identifier: Apache-2.0
"""Training of a twin by the train command, in a process of its own."""

import subprocess
import sys
from pathlib import Path

from t5x_lite import config
from t5x_lite.config import gin_file
from t5x_lite.utils import bounded_files
from t5x_lite.utils.atomic_files import write_atomically


class TrainingFailed(ValueError):
    """Training of a twin ended before its last step; `exit_status` is that of its process."""

    def __init__(self, folder: Path, status: int):
        super().__init__(
            f"training {folder} ended with status {status}; the same command goes on from its "
            "last checkpoint"
        )
        # A negative status of a child is a signal.
        self.exit_status = status if status > 0 else 128 - status


def train_twin(run: config.Run, modules: list[str]) -> dict:
    """Trains a run to its end, unless it is finished; returns its report.

    A run that was killed continues from its last checkpoint.

    Raises:
      TrainingFailed: the process failed, after it printed its message.
    """
    folder = Path(run.model_dir)
    finished = folder / "report.json"
    if not finished.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        written = folder.parent / f"{folder.name}.gin"
        write_atomically(written, gin_file.to_text(run))
        imports = [f"--import={module}" for module in modules]
        command = [sys.executable, "-m", "t5x_lite.train", f"--gin_file={written}", *imports]
        status = subprocess.run(command, check=False).returncode
        if status:
            raise TrainingFailed(folder, status)
    return bounded_files.read_json_object(finished)
