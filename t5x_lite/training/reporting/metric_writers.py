# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run on disk: metrics.jsonl and TensorBoard."""

import json
import math
from pathlib import Path

METRICS = "metrics.jsonl"


class MetricWriter:
    """Appends lines of metrics to MODEL_DIR/metrics.jsonl, and to TensorBoard if it is wanted.

    If `new_run`, lines that are there are of one that ended before its first checkpoint:
    they are kept under another name.
    """

    def __init__(self, model_dir: Path, tensorboard: bool, new_run: bool):
        if new_run and (model_dir / METRICS).exists():
            (model_dir / METRICS).rename(free_name(model_dir / METRICS))
        self.lines = open(model_dir / METRICS, "a", buffering=1)
        if ends_torn(model_dir / METRICS):
            self.lines.write("\n")
        self.board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(model_dir / "tensorboard"))

    def write(self, step: int, values: dict[str, float], prefix: str = "train") -> None:
        """Writes one line {"step": ..., "train/loss": ...}.

        Args:
          step: steps done.
          values: metrics by name.
          prefix: names what was measured: "train", or a split.
        """
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        # JSON has no NaN: a loss that is not finite is null.
        plain = {name: value if math.isfinite(value) else None for name, value in named.items()}
        self.lines.write(json.dumps({"step": step} | plain) + "\n")
        if self.board is None:
            return
        for name, value in named.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self.lines.close()
        if self.board is not None:
            self.board.close()


class NullMetricWriter:
    """Metric writer of a process that writes nothing."""

    def write(self, step: int, values: dict[str, float], prefix: str = "train") -> None:
        """Ignores a line.

        Args:
          step: steps done.
          values: metrics by name.
          prefix: names what was measured: "train", or a split.
        """

    def close(self) -> None:
        """Does nothing."""


def ends_torn(path: Path) -> bool:
    """True if the last line is half written, as a full disk or a kill leaves it."""
    with open(path, "rb") as lines:
        return lines.seek(0, 2) > 0 and lines.seek(-1, 2) >= 0 and lines.read(1) != b"\n"


def free_name(path: Path) -> Path:
    """path with the first number that is free: metrics-1.jsonl."""
    number = 1
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return free


def read_metrics(model_dir: Path) -> dict[str, dict[int, float]]:
    """Reads every value of metrics.jsonl, by name and step; {} without such a file.

    Of a step that was repeated after a restart the last value counts; null is read as NaN.
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
