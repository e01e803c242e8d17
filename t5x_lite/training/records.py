# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for later reading: metrics.jsonl, TensorBoard, the learning curve."""

import json
import math
from pathlib import Path

METRICS = "metrics.jsonl"


class Records:
    """Appends lines of metrics to MODEL_DIR/metrics.jsonl and, if asked, TensorBoard.

    A run that begins `anew` finds lines only of one that ended before its first checkpoint: they
    are kept under another name.
    """

    def __init__(self, model_dir: Path, tensorboard: bool, anew: bool):
        if anew and (model_dir / METRICS).exists():
            (model_dir / METRICS).rename(free_name(model_dir / METRICS))
        self.lines = open(model_dir / METRICS, "a", buffering=1)  # noqa: SIM115
        if torn(model_dir / METRICS):
            self.lines.write("\n")
        self.board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(model_dir / "tensorboard"))

    def write(self, step: int, values: dict[str, float], prefix: str = "train") -> None:
        """One line {"step": ..., "train/loss": ...}; the prefix names what was measured."""
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        # JSON has no NaN: a loss that is not finite is null.
        plain = {name: value if math.isfinite(value) else None for name, value in named.items()}
        self.lines.write(json.dumps({"step": step} | plain) + "\n")
        if self.board is None:
            return
        for name, value in named.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.lines.close()
        if self.board is not None:
            self.board.close()


class Nowhere:
    """The records of a process that writes none."""

    def write(self, step: int, values: dict[str, float], prefix: str = "train") -> None:
        pass

    def close(self) -> None:
        pass


def torn(path: Path) -> bool:
    """Whether the last line is half written, as a full disk or a kill leaves it."""
    with open(path, "rb") as lines:
        return lines.seek(0, 2) > 0 and lines.seek(-1, 2) >= 0 and lines.read(1) != b"\n"


def free_name(path: Path) -> Path:
    """path with the first number that makes it new: metrics-1.jsonl."""
    number = 1
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return free


def read(model_dir: Path) -> dict[str, dict[int, float]]:
    """Every recorded value by name and step, {} without records.

    A step done again after a restart counts once; null is read as NaN.
    """
    if not (model_dir / METRICS).exists():
        return {}
    values: dict[str, dict[int, float]] = {}
    for text in (model_dir / METRICS).read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            # The last line of a killed run may be half written.
            continue
        step = line.pop("step")
        for name, value in line.items():
            values.setdefault(name, {})[step] = math.nan if value is None else value
    return {name: dict(sorted(points.items())) for name, points in values.items()}
