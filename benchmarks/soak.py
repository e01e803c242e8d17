# SPDX-License-Identifier: Apache-2.0
"""Does a run that is killed again and again end with the weights of one that never was?

One tiny run is trained to its end, and once more in a folder where its process is killed (SIGKILL)
at drawn moments: half of them while it starts (data, restore, compile), half of them some drawn
number of steps later, with the saves and deletions among them. Then both are compared bit by bit:
weights, optimizer, and the loss of every step. An interrupted soak goes on with the kills that are
left.

  python benchmarks/soak.py [--kills 200] [--seed 0] [--folder runs/soak] [--json FILE]
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import report

CLONE = Path(__file__).resolve().parents[1]
PACKAGES = ["jax", "numpy", "orbax-checkpoint", "tensorstore"]
SAVE_EVERY = 4
# A process is killed after at most MOST_STEPS; the run is longer than all of them get done.
MOST_STEPS, STEPS_A_KILL = 24, 12
# After the step, drawn too: it may be in the next one, or writing a checkpoint.
MOST_SECONDS = 0.3
PHASES = ("starting", "stepping", "saving")
BINDINGS = {
    "config.Stack.layers": 1,
    "config.Stack.embed": 32,
    "config.Stack.heads": 2,
    "config.Stack.mlp": 64,
    "config.Model.dropout": 0.1,
    "config.Train.log_every": 1,
    "config.Train.tensorboard": False,
    "config.Train.unroll": 1,
    "config.Evaluate.examples": 0,
    "config.Evaluate.batches": 0,
    "config.Checkpoint.metric": None,
    "config.Checkpoint.every": SAVE_EVERY,
    "config.Checkpoint.keep": 2,
}


def arguments(folder: Path, steps: int) -> list[str]:
    bound = BINDINGS | {"MODEL_DIR": f"{folder}", "TRAIN_STEPS": steps}
    file = f"--gin_file={CLONE}/configs/runs/quickstart.gin"
    return [file, *(f"--gin.{name}={value}" for name, value in bound.items())]


def work(given: list[str], log: Path) -> None:
    """One process of the run; what it says goes to the log."""
    with open(log, "a") as said:
        os.dup2(said.fileno(), sys.stdout.fileno())
        os.dup2(said.fileno(), sys.stderr.fileno())
    from t5x_lite import train

    sys.exit(train.main(given))


class Run:
    """One folder, trained by processes that start with everything imported."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        self.read: tuple[int, tuple] = (0, ())
        # Imports have no state and take most of a start: they are made once.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["t5x_lite.training.loop", "orbax.checkpoint"])

    def start(self) -> multiprocessing.Process:
        given = arguments(self.folder, self.steps), self.folder.with_suffix(".log")
        process = self.context.Process(target=work, args=given)
        process.start()
        return process

    def finish(self) -> None:
        """Trains to the end, unless that was done before."""
        if (self.folder / "report.json").exists():
            return
        process = self.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{self.folder} ended with {process.exitcode}: see its log")

    def recorded(self) -> tuple[int, tuple]:
        """The newest step that is recorded, and the state of the file that says so."""
        with contextlib.suppress(FileNotFoundError):
            file = (self.folder / "metrics.jsonl").stat()
            state = file.st_ino, file.st_mtime_ns, file.st_size
            if state != self.read[1]:
                content = (self.folder / "metrics.jsonl").read_bytes()
                self.read = content.count(b"\n"), state
        return self.read

    def kill(self, draw: random.Random, starting: float) -> dict:
        """Starts a process and kills it at a drawn moment; what it was doing then.

        Half of the moments are within `starting` seconds of the start, the others after a drawn
        number of steps.
        """
        early, share = draw.random() < 0.5, draw.random()
        wanted, later = draw.randint(1, MOST_STEPS), draw.uniform(0, MOST_SECONDS)
        resumed = (self.checkpoints() or [0])[-1]
        _, before = self.recorded()
        process, began, done = self.start(), time.monotonic(), 0
        while process.is_alive() and done < wanted:
            step, state = self.recorded()
            # Until its first step the record is that of the process before, which went further.
            done = step - resumed if state != before else 0
            if early and time.monotonic() - began > share * starting:
                break
            time.sleep(0.002)
        process.join(later)
        process.kill()
        process.join()
        if process.exitcode != -9:
            raise SystemExit(f"it ended by itself with {process.exitcode}: see the log")
        halves = list((self.folder / "checkpoints").glob("*tmp*"))
        phase = "saving" if halves else "stepping" if done > 0 else "starting"
        return {"phase": phase, "newest": self.checkpoints()[-1:]}

    def checkpoints(self) -> list[int]:
        """The steps that are saved."""
        found = (self.folder / "checkpoints").glob("*")
        return sorted(int(path.name) for path in found if path.name.isdecimal())


def soak(killed: Run, kills: int, seed: int, starting: float) -> list[dict]:
    """The kills, those of earlier invocations first; each has a draw of its own."""
    path = killed.folder.with_name("kills.jsonl")
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    began, before = time.monotonic(), len(done)
    with open(path, "a", buffering=1) as lines:
        for number in range(before, kills):
            done.append(killed.kill(random.Random(f"{seed} {number}"), starting))
            lines.write(json.dumps(done[-1]) + "\n")
            if number % 10 == 9 or number + 1 == kills:
                each = (time.monotonic() - began) / (number + 1 - before)
                left = each * (kills - number - 1) / 60
                print(f"{number + 1} of {kills} kills, about {left:.0f} minutes left", flush=True)
    return done


def losses(folder: Path) -> dict[int, float]:
    from t5x_lite.training.reporting import metric_writers

    return metric_writers.read_metrics(folder)["train/loss"]


def digests(folder: Path, step: int) -> dict:
    """Shape, dtype and digest of every weight and of the optimizer at the last step, read back."""
    from t5x_lite.checkpoints import checkpoint_io

    place = folder / "checkpoints" / str(step)
    note = checkpoint_io.read_metadata(place)
    for item in note.arrays:
        checkpoint_io.restore_arrays(place, item, note)
    return note.arrays


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--json", help="write the figures here too")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    steps = STEPS_A_KILL * given.kills
    whole, killed = (Run(given.folder / name, steps) for name in ("whole", "killed"))
    began = time.monotonic()
    whole.finish()
    print(f"undisturbed: {steps} steps in {time.monotonic() - began:.0f} s")
    report_ = json.loads((whole.folder / "report.json").read_text())
    starting = report_["total_seconds"] - report_["train_seconds"]
    kills = soak(killed, given.kills, given.seed, starting)
    killed.finish()
    same = {
        "weights and optimizer": digests(whole.folder, steps) == digests(killed.folder, steps),
        "loss of every step": losses(whole.folder) == losses(killed.folder),
    }
    rows = [report.Row("kills", phase, "count", float(count(kills, phase))) for phase in PHASES]
    rows += [report.Row("end", name, "bitwise equal", float(equal)) for name, equal in same.items()]
    rows.append(report.Row("end", "run", "steps", float(steps)))
    resumed = (killed.folder.with_suffix(".log")).read_text().count("Going on from the checkpoint")
    rows.append(report.Row("starts", "from a checkpoint", "count", float(resumed)))
    print(report.table(rows))
    if given.json:
        report.write(given.json, rows, PACKAGES)
    if not all(same.values()):
        raise SystemExit("the killed run is another one")


def count(kills: list[dict], phase: str) -> int:
    return sum(kill["phase"] == phase for kill in kills)


if __name__ == "__main__":
    main()
