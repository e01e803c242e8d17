# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run on disk: metrics.jsonl and TensorBoard."""

import json
import math
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5x_lite import processes
from t5x_lite.utils import bounded_files
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.paths import is_address
from t5x_lite.utils.remote_streams import upload_stream

METRICS, BOARD = "metrics.jsonl", "tensorboard"
# Lines that wait for a slow disk at most, and seconds to wait for it before a checkpoint.
QUEUED, FLUSH_SECONDS = 10_000, 10.0
# Seconds that the end of a run waits for a tracker: MLflow takes half a minute for a new database.
TRACKER_SECONDS = 120.0


class MetricWriter:
    """Metrics of a run in MODEL_DIR/metrics.jsonl, and for TensorBoard if it is wanted.

    No step is in either twice: what a run wrote after the checkpoint that it goes on from is
    removed. Of a run that ended before its first checkpoint the files are kept under other names.
    A file that cannot be written is reported once and left alone; training goes on.
    """

    def __init__(
        self,
        model_dir: Path,
        tensorboard: bool,
        start: int | None,
        report: Callable[[str], None] = print,
        trackers: dict[str, Callable[[], Any]] | None = None,
    ):
        """Starts the threads that write.

        Args:
          model_dir: MODEL_DIR.
          tensorboard: true to write for TensorBoard too.
          start: step of the checkpoint that the run goes on from; None for a new run.
          report: is called with one sentence about a file that cannot be written any more.
          trackers: opens the run of a service, by the service's name.
        """
        self.files = [WriterThread(lambda: JsonLines(model_dir, start), METRICS, report)]
        if tensorboard:
            self.files.append(WriterThread(lambda: EventFile(model_dir, start), BOARD, report))
        # A server may be far away: only the end of the run waits for it.
        self.trackers = [WriterThread(make, n, report) for n, make in (trackers or {}).items()]

    def write(
        self,
        step: int,
        values: dict[str, float],
        prefix: str = "train",
        failures: dict[str, str] | None = None,
    ) -> None:
        """Writes one line {"step": ..., "train/loss": ...}.

        Args:
          step: steps done.
          values: metrics by name.
          prefix: names what was measured: "train", or a split.
          failures: metrics that were not computed, with reasons.
        """
        named, reasons = (
            {f"{prefix}/{name}": value for name, value in by_name.items()}
            for by_name in (values, failures or {})
        )
        for file in (*self.files, *self.trackers):
            file.put((step, named, reasons))

    def flush(self, wait: bool = True) -> None:
        """Writes all lines so far; waits until they are on disk, FLUSH_SECONDS at most for a file,
        unless `wait` is false."""
        for file in self.files:
            file.flush(wait)

    def close(self) -> None:
        """Closes the files, and then the runs of trackers."""
        for file in self.files:
            file.close()
        for tracker in self.trackers:
            tracker.close(TRACKER_SECONDS)


class WriterThread(threading.Thread):
    """Thread that writes one file of metrics, so that a dead or slow disk holds nobody else.

    After an error, and where more than QUEUED lines wait, it reports once and takes no more.
    """

    def __init__(self, make: Callable[[], Any], name: str, report: Callable[[str], None]):
        """Starts the thread.

        Args:
          make: opens the file, in the thread at the first line.
          name: of the file, for messages.
          report: is called with one sentence when it stops.
        """
        super().__init__(daemon=True, name=name)
        self.make, self.report = make, report
        self.waiting: queue.Queue = queue.Queue(QUEUED)
        self.dropped = False
        self.start()

    def run(self) -> None:
        file = None
        try:
            while (item := self.waiting.get()) is not None:
                if isinstance(item, threading.Event):
                    if file is not None:
                        file.flush()
                    item.set()
                    continue
                file = file or self.make()
                file.write(*item)
            if file is not None:
                file.close()
        except Exception as error:  # whatever a disk or a library has against the line
            self.drop(f"{type(error).__name__}: {processes.first_line(error)}")

    def drop(self, reason: str) -> None:
        """Takes no more lines, and reports why."""
        if not self.dropped:
            self.dropped = True
            self.report(f"{self.name} is not written any more ({reason}); training goes on.")

    def put(self, item: Any) -> None:
        """Hands over a line, without waiting."""
        if self.dropped:
            return
        try:
            self.waiting.put_nowait(item)
        except queue.Full:
            self.drop(f"{QUEUED} lines wait for its disk")

    def flush(self, wait: bool = True, seconds: float = FLUSH_SECONDS) -> None:
        """Writes the lines so far; waits until that is done, and drops a file that takes longer
        than `seconds`, unless `wait` is false."""
        written, deadline = threading.Event(), time.monotonic() + seconds
        self.put(written)
        while wait and not self.dropped and not written.wait(0.02):
            if time.monotonic() > deadline:
                self.drop(f"its disk has not answered for {seconds:.0f} s")

    def close(self, seconds: float = FLUSH_SECONDS) -> None:
        """Ends the thread after the lines so far, for which it waits `seconds` at most."""
        self.flush(seconds=seconds)
        self.put(None)
        self.join(seconds)


class JsonLines:
    """metrics.jsonl, opened to go on after step `start`, or anew if that is None."""

    def __init__(self, model_dir: Path, start: int | None):
        path = model_dir / METRICS
        if start is None:
            set_aside(path)
        elif path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and step_of(line) <= start]
            if kept != lines:
                write_atomically(path, "".join(kept))
        self.lines = path.open("a", buffering=1, encoding="utf-8")

    def write(self, step: int, values: dict[str, float], failures: dict[str, str]) -> None:
        """Appends a line.

        Args:
          step: steps done.
          values: metrics by their whole names.
          failures: metrics that were not computed, with reasons.
        """
        # JSON has no NaN: a loss that is not finite is null.
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": step} | plain | ({"not_computed": failures} if failures else {})
        self.lines.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Uploads the lines so far to a bucket; on a disk they are already."""
        upload_stream(self.lines)

    def close(self) -> None:
        """Closes the file."""
        self.lines.close()


class EventFile:
    """A new file of events for TensorBoard, which drops what older files have after `start`.

    Written record by record: tensorboardX's own SummaryWriter has a thread, and waits for ever
    once that thread is dead.
    """

    def __init__(self, model_dir: Path, start: int | None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.writer import Event, SessionLog

        folder = model_dir / BOARD
        if start is None:
            set_aside(folder)
        # tensorboardX writes to a disk; the file of a bucket is uploaded from there.
        self.folder, self.remote = folder, is_address(folder)
        self.local = Path(tempfile.mkdtemp(prefix="t5x_lite-events-")) if self.remote else folder
        self.local.mkdir(exist_ok=True)
        # tensorboardX's names have the second of their start, and there may be two in one.
        number = len(list_names(folder))
        self.events = EventsWriter(str(self.local / "events"), f".{os.getpid()}.{number}")
        if start is not None:
            begin = SessionLog(status=SessionLog.START)
            self.events.write_event(Event(wall_time=time.time(), step=start + 1, session_log=begin))

    def write(self, step: int, values: dict[str, float], failures: dict[str, str]) -> None:
        """Appends an event with all values.

        Args:
          step: steps done.
          values: metrics by their whole names.
          failures: not written here.
        """
        from tensorboardX import summary
        from tensorboardX.writer import Event

        scalars = [summary.scalar(name, value).value[0] for name, value in values.items()]
        merged = summary.Summary(value=scalars)
        self.events.write_event(Event(wall_time=time.time(), step=step, summary=merged))
        self.events.flush()

    def flush(self) -> None:
        """Uploads the events so far to a bucket; on a disk they are already."""
        for path in self.local.iterdir() if self.remote else ():
            (self.folder / path.name).write_bytes(path.read_bytes())

    def close(self) -> None:
        """Closes the file."""
        self.events.close()
        if self.remote:
            self.flush()
            shutil.rmtree(self.local)


class NullMetricWriter:
    """Metric writer of a process that writes nothing."""

    def write(
        self,
        step: int,
        values: dict[str, float],
        prefix: str = "train",
        failures: dict[str, str] | None = None,
    ) -> None:
        """Ignores a line.

        Args:
          step: steps done.
          values: metrics by name.
          prefix: names what was measured: "train", or a split.
          failures: metrics that were not computed, with reasons.
        """

    def flush(self, wait: bool = True) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def list_names(folder: Path) -> list[str]:
    """Names in a folder; [] where there is none, as a bucket has no empty ones."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def set_aside(path: Path) -> None:
    """Gives a file or folder that is there the first free number: metrics-1.jsonl."""
    number = 1
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    if path.exists():
        path.rename(free)


def step_of(text: str) -> float:
    """Step of a line of metrics.jsonl; infinite if it is not one."""
    line = parse_line(text)
    return math.inf if line is None else line["step"]


def parse_line(text: str) -> dict | None:
    """A line of metrics.jsonl; None if it is not one, as after a kill or a full disk."""
    try:
        line = bounded_files.parse_json(text)
    except ValueError:
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if isinstance(step, int) and 0 <= step < 2**63 else None


def has_line(model_dir: Path, step: int, prefix: str) -> bool:
    """True if something was recorded at a step.

    Args:
      model_dir: MODEL_DIR.
      step: steps done.
      prefix: names what was measured: "train", or a split.
    """
    recorded = read_metrics(model_dir)
    return any(step in recorded[name] for name in recorded if name.startswith(f"{prefix}/"))


def is_small(value: Any) -> bool:
    """True for an integer that is in the range of floats."""
    return isinstance(value, int) and value.bit_length() < 1000


def read_metrics(model_dir: Path) -> dict[str, dict[int, float]]:
    """Reads every number of metrics.jsonl, by name and step; {} without such a file.

    Of a step that was repeated after a restart the last value counts; null is read as NaN.
    """
    if not (model_dir / METRICS).exists():
        return {}
    values: dict[str, dict[int, float]] = {}
    text = (model_dir / METRICS).read_text(encoding="utf-8", errors="replace")
    for line in filter(None, map(parse_line, text.splitlines())):
        step = line.pop("step")
        for name, value in line.items():
            # No run has written an integer beyond every float.
            if value is None or isinstance(value, float) or is_small(value):
                values.setdefault(name, {})[step] = math.nan if value is None else value
    return {name: dict(sorted(points.items())) for name, points in values.items()}
