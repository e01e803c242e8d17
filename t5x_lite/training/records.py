# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for later reading: metrics.jsonl, TensorBoard, the learning curve."""

import json
from pathlib import Path

METRICS = "metrics.jsonl"


class Records:
    """Appends lines of metrics to MODEL_DIR/metrics.jsonl and, if asked, TensorBoard."""

    def __init__(self, model_dir: Path, tensorboard: bool):
        self.lines = open(model_dir / METRICS, "a", buffering=1)  # noqa: SIM115
        self.board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(model_dir / "tensorboard"))

    def write(self, step: int, values: dict[str, float], prefix: str = "train") -> None:
        """One line {"step": ..., "train/loss": ...}; the prefix names what was measured."""
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        self.lines.write(json.dumps({"step": step} | named) + "\n")
        if self.board is None:
            return
        for name, value in named.items():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.lines.close()
        if self.board is not None:
            self.board.close()


def read(model_dir: Path) -> dict[str, dict[int, float]]:
    """Every recorded value by name and step; a step done again after a restart counts once."""
    values: dict[str, dict[int, float]] = {}
    for text in (model_dir / METRICS).read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            # The last line of a killed run may be half written.
            continue
        step = line.pop("step")
        for name, value in line.items():
            values.setdefault(name, {})[step] = value
    return {name: dict(sorted(points.items())) for name, points in values.items()}
