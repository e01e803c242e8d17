# SPDX-License-Identifier: Apache-2.0
"""A run from its config to its report: assemble, restore, step, tell, evaluate, save, finish."""

import json
import time
from pathlib import Path
from typing import Any

import jax

from t5x_lite import config, config_file, data, processes, sharding
from t5x_lite.training import archive, bar, costs, curves, folder, overview, records, setup
from t5x_lite.training.checkpoint import Checkpoints
from t5x_lite.training.interrupts import Interrupted, Interrupts
from t5x_lite.training.meter import Meter, Totals, Work
from t5x_lite.training.state import TrainState

REPORT = "report.json"
# A trace of the steps after the first ones, which wait for nothing any more.
PROFILED = range(3, 8)


def train(run: config.Run, profile: bool = False) -> dict[str, Any]:
    """Trains the run to its last step, from its newest checkpoint where there is one.

    Gives back the report, which is also MODEL_DIR/report.json. Every number of it is a function of
    the config; times are not.

    Raises:
      ValueError: anything of the config, the data or MODEL_DIR that makes the run impossible.
      Interrupted: SIGTERM or Ctrl-C, after saving.
    """
    began = time.perf_counter()
    with folder.held(Path(run.model_dir)), Interrupts() as interrupts:
        training = Training(run, interrupts, profile)
        try:
            with interrupts.anytime():
                training.prepare()
            training.go()
            return training.finish(began)
        finally:
            training.close()


class Training:
    """A run in motion. `state` is replaced by every step; the rest is set by `prepare`."""

    state: TrainState
    totals: Totals

    def __init__(self, run: config.Run, interrupts: Interrupts, profile: bool):
        self.run, self.interrupts, self.profile = run, interrupts, profile
        self.path = Path(run.model_dir)
        self.console = bar.console(quiet=not processes.first())
        self.tell = lambda text: self.console.print(text, markup=False, soft_wrap=True)
        # The newest evaluation: of which step, and what it came to.
        self.measured: tuple[int, dict[str, float]] = (-1, {})
        self.last: dict[str, float] = {}
        self.saved_step: int | None = None
        self.tracing = False
        self.compile_seconds = self.evaluate_seconds = 0.0
        self.records = self.checkpoints = self.bar = None
        # The weights of the teacher, where there is one.
        self.teacher_params: Any = None

    def prepare(self) -> None:
        """Everything up to the first step: data, weights, compiled step, start-up table."""
        run = self.run
        folder.agree(run, self.tell)
        self.parts = setup.assemble(run)
        self.evaluator = setup.evaluator(run)
        self.work = work(run)
        statistics = str(self.parts.batches.statistics)
        self.console.print(overview.table(run, self.parts.shapes, self.work.flops, statistics))
        self.checkpoints = Checkpoints(self.path, run.checkpoint)
        self.restore()
        self.start = int(self.state.step)
        self.open_records()
        if self.start < run.train.steps:
            self.compile()

    def open_records(self) -> None:
        """What a reader needs, and where metrics go."""
        self.records = records.Nowhere()
        if processes.first():
            folder.write(self.run, self.parts.vocabularies)
            anew = self.saved_step is None
            self.records = records.Records(self.path, self.run.train.tensorboard, anew)

    def restore(self) -> None:
        """The newest usable checkpoint, or new weights."""
        found = self.checkpoints.restore(self.parts.shapes, self.tell)
        if found is None:
            self.state, self.totals = setup.begin(self.parts, self.console.print), Totals()
            return
        self.state, note = found
        self.parts.batches.restore(note.data)
        self.totals, self.saved_step = Totals(**note.totals), note.step
        if note.metrics:
            self.measured = note.step, note.metrics
        self.tell(f"Going on from the checkpoint of step {note.step}.")

    def compile(self) -> None:
        began = time.perf_counter()
        batch = sharding.place_batch(self.parts.batches.at(self.start))
        if self.parts.teacher:
            self.teacher_params = self.parts.teacher.params()
        self.step = self.parts.step.lower(self.state, batch, self.teacher_params).compile()
        self.compile_seconds = time.perf_counter() - began
        # Gloo, between processes on CPU, gives up where one comes half a minute after the other.
        processes.wait()
        memory = self.step.memory_analysis()
        scratch = f"{memory.temp_size_in_bytes / 2**20:,.1f} MiB" if memory else "unknown"
        self.tell(
            f"compiled in {self.compile_seconds:.1f} s; a step needs {scratch} per device for "
            "activations and scratch"
        )

    def go(self) -> None:
        """Every step that is left."""
        stop = self.run.train.steps
        if self.start >= stop:
            self.tell(f"This run is finished: step {self.start} of {stop} is done.")
            return
        self.bar = bar.Bar(self.console, self.start, stop)
        self.meter = Meter(self.run.train, self.work, self.totals)
        batches = data.prefetch(self.parts.batches, self.start, stop)
        try:
            self.measure_given()
            for number, batch in batches:
                self.trace(number)
                self.one_step(number, batch, batches.waited)
                self.after(number + 1)
        finally:
            batches.close()
            self.end_trace()
            self.bar.close()

    def measure_given(self) -> None:
        """What weights that were given are worth before they are trained on."""
        given = self.run.adaptation or self.run.checkpoint.initial
        if given and self.start == 0 and self.evaluator and self.run.evaluate.every:
            with self.meter.pause():
                self.evaluate(0)

    def one_step(self, number: int, batch, waited: float) -> None:
        self.meter.fetched(waited)
        placed = sharding.place_batch(batch)
        with jax.transfer_guard("disallow"):
            self.state, metrics = self.step(self.state, placed, self.teacher_params)
        self.meter.add(number, metrics)

    def after(self, done: int) -> None:
        """What is due after `done` steps; a signal is answered here."""
        run, last = self.run, done == self.run.train.steps
        self.interrupts.reached(done)
        self.bar.advance(done)
        evaluate = last or (run.evaluate.every and done % run.evaluate.every == 0)
        save = last or done % run.checkpoint.every == 0
        if done % run.train.log_every == 0 or evaluate or save or self.interrupts.due:
            self.read(done)
        elif self.bar.due() and (line := self.meter.glance()):
            self.bar.update(done, line)
        if evaluate and self.evaluator:
            with self.meter.pause():
                self.evaluate(done)
        if save or (evaluate and run.checkpoint.metric):
            with self.meter.pause():
                self.save(done)
        if self.interrupts.due:
            self.leave(done)

    def read(self, done: int) -> None:
        """One line of metrics, told everywhere."""
        self.last = self.meter.read()
        self.records.write(done, self.last)
        self.bar.update(done, self.last)

    def evaluate(self, done: int) -> None:
        began = time.perf_counter()
        try:
            with self.interrupts.anytime():
                values = self.evaluator(self.state.params, done, self.tell_decoded)
        except Interrupted:
            self.leave(done)
        self.evaluate_seconds += time.perf_counter() - began
        setup.check_metric(self.run.checkpoint, values)
        self.measured = done, values
        self.records.write(done, values, prefix=self.run.data.eval_split)
        words = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.tell(f"step {done} {self.run.data.eval_split}: {words}")

    def tell_decoded(self, examples: int) -> None:
        if self.bar is not None:
            self.bar.say(f"evaluating: {examples} decoded")

    def save(self, done: int) -> None:
        if self.saved_step == done:
            return
        step, values = self.measured
        note = archive.Note(
            step=done,
            config=config_file.text(self.run),
            data=self.parts.batches.state(),
            metrics=values if step == done else {},
            totals=vars(self.totals).copy(),
        )
        self.checkpoints.save(self.state, note)
        self.saved_step = done

    def leave(self, done: int) -> None:
        """Saves and ends the run as the signal asked."""
        ended = Interrupted(self.interrupts.number)
        self.save(done)
        self.checkpoints.wait()
        self.tell(
            f"{ended}: saved step {done} in {self.path}. The same command goes on from there."
        )
        raise ended

    def trace(self, number: int) -> None:
        """Starts and ends the profiler around a few steps."""
        if self.profile and number - self.start == PROFILED.start:
            jax.profiler.start_trace(str(self.path / "profile"))
            self.tracing = True
        if number - self.start == PROFILED.stop:
            self.end_trace()

    def end_trace(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False
            self.tell(f"profile of up to {len(PROFILED)} steps: {self.path / 'profile'}")

    def finish(self, began: float) -> dict[str, Any]:
        """The report and the learning curve; what a finished run lacks is made up for."""
        path = self.path / REPORT
        if self.start >= self.run.train.steps and path.exists():
            self.tell(f"Its report is {path}.")
            return json.loads(path.read_text())
        done = int(self.state.step)
        if self.evaluator and self.measured[0] != done:
            self.evaluate(done)
        self.checkpoints.wait()
        report = self.report(time.perf_counter() - began)
        if not processes.first():
            return report
        folder.replace(path, json.dumps(report, indent=2) + "\n")
        picture = curves.draw(self.path)
        self.tell(f"finished at step {done}: {path}, {picture}")
        return report

    def report(self, total_seconds: float) -> dict[str, Any]:
        """Held-out metrics by name, then what the training took.

        train_seconds is time spent in steps over all restarts; total_seconds is this process.
        """
        totals = self.totals
        seconds = max(totals.seconds, 1e-9)
        return {
            "steps": int(self.state.step),
            "split": self.run.data.eval_split if self.evaluator else None,
            **self.measured[1],
            "train_loss": self.last.get("loss"),
            "skipped_steps": int(self.state.skipped),
            "train_seconds": totals.seconds,
            "compile_seconds": self.compile_seconds,
            "evaluate_seconds": self.evaluate_seconds,
            "total_seconds": total_seconds,
            "trained_target_tokens": totals.target_tokens,
            "target_tokens_per_second": totals.target_tokens / seconds,
            "tokens_per_second": totals.tokens / seconds,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        }

    def close(self) -> None:
        for part in (self.records, self.checkpoints):
            if part is not None:
                part.close()


def work(run: config.Run) -> Work:
    """Positions and FLOPs of a step of this run, and the peak of all chips where it is known."""
    lengths, rows = run.data.lengths, run.train.batch_size
    peak = costs.peak(jax.devices()[0].device_kind)
    return Work(
        positions=rows * sum(costs.row_lengths(run.model.layout, lengths)),
        flops=costs.step_flops(run.model, rows, lengths),
        peak=peak and peak * jax.device_count(),
    )
