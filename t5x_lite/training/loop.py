# SPDX-License-Identifier: Apache-2.0
"""A training run, from its config to its report.

Life of a run, all of it in `train`:
   1. lock MODEL_DIR, and refuse it if it holds the run of another config
   2. assemble mesh, data, optimizer and step; show the overview; open the held-out split
   3. restore the newest usable checkpoint, or begin with new, adapted or initial weights
   4. write config and vocabularies to MODEL_DIR; compile the step for the first batch
   5. evaluate initial weights before they train
   6. per step: place the prefetched batch, run the step, keep its metrics on the device
   7. every log_every steps: one line of metrics to the console, metrics.jsonl and TensorBoard
   8. at evaluate.every: losses and decoded metrics; at checkpoint.every: save (evaluation first,
      so that a checkpoint carries the metrics that choose the best one)
   9. after a signal: save this step and raise Interrupted; the same command continues from there
  10. after the last step: evaluate, save, write report.json and the learning curve
"""

import json
import time
from pathlib import Path
from typing import Any

import jax

from t5x_lite import config, data, processes, sharding
from t5x_lite.checkpoints import checkpoint_io
from t5x_lite.checkpoints.manager import CheckpointManager
from t5x_lite.checkpoints.train_state import TrainState
from t5x_lite.cli.progress import Progress, stderr_console
from t5x_lite.config import gin_file
from t5x_lite.training import flops, model_dir, preflight, schedules, setup
from t5x_lite.training.preemption import Interrupted, PreemptionHandler
from t5x_lite.training.reporting import curves, metric_writers, overview, progress_line
from t5x_lite.training.reporting.metrics import Meter, RunTotals, StepCost
from t5x_lite.utils.atomic_files import write_atomically

REPORT = "report.json"
# Steps of a profile: not the first ones, which still wait for the input pipeline to fill.
PROFILED_STEPS = range(3, 8)


def train(run: config.Run, profile: bool = False, try_memory: bool = False) -> dict[str, Any]:
    """Trains the run to its last step, from its newest checkpoint if there is one.

    Args:
      run: config of the run.
      profile: true to write a profile of a few steps to MODEL_DIR/profile.
      try_memory: true to begin even if the memory of the devices seems to be too small.

    Returns:
      the report, which is also MODEL_DIR/report.json. All its values but the times are a function
      of the config.

    Raises:
      ValueError: anything of the config, the data or MODEL_DIR that makes the run impossible.
      Interrupted: SIGTERM or Ctrl-C, after saving.
    """
    began = time.perf_counter()
    with model_dir.lock_shared(Path(run.model_dir)), PreemptionHandler() as handler:
        training = Training(run, handler, profile, try_memory)
        try:
            with handler.anytime():
                training.prepare()
            training.run_steps()
            return training.finish(began)
        finally:
            training.close()


class Training:
    """A run in progress. `state` is replaced by every step; the rest is set by `prepare`.

    Attributes:
      state: weights, optimizer and counts.
      totals: seconds and tokens over all restarts.
    """

    state: TrainState
    totals: RunTotals

    # ---- Life of a run: preparation ----

    def __init__(
        self, run: config.Run, handler: PreemptionHandler, profile: bool, try_memory: bool
    ):
        self.run, self.handler = run, handler
        self.profile, self.try_memory = profile, try_memory
        self.path = Path(run.model_dir)
        self.console = stderr_console(quiet=not processes.is_first())
        # The newest evaluation: its step and its metrics.
        self.held_out: tuple[int, dict[str, float]] = (-1, {})
        self.last_metrics: dict[str, float] = {}
        self.saved_step: int | None = None
        self.profiling = False
        self.compile_seconds = self.evaluate_seconds = 0.0
        self.writer = self.checkpoints = self.bar = None
        # Weights of the teacher, if there is one.
        self.teacher_params: Any = None

    def prepare(self) -> None:
        """Does all that comes before the first step: data, weights, compiled step, overview."""
        run = self.run
        model_dir.agree_on_config(run, self.log)
        self.assembled = setup.assemble_run(run)
        if not self.try_memory:
            preflight.check_memory(run, self.assembled.shapes)
        self.evaluator = setup.make_evaluator(run)
        self.cost = step_cost(run)
        statistics = str(self.assembled.batches.statistics)
        self.console.print(
            overview.overview_table(run, self.assembled.shapes, self.cost.flops, statistics)
        )
        for warning in schedules.list_warnings(run):
            self.log(f"Warning: {warning}")
        self.checkpoints = CheckpointManager(self.path, run.checkpoint)
        self.restore()
        self.start = int(self.state.step)
        self.open_writer()
        if self.start < run.train.steps:
            self.compile()

    def open_writer(self) -> None:
        """Writes config and vocabularies to MODEL_DIR, and opens the metric writer."""
        self.writer = metric_writers.NullMetricWriter()
        # A finished run of more steps stays as it is described.
        if processes.is_first() and self.start <= self.run.train.steps:
            model_dir.write_description(self.run, self.assembled.vocabularies)
            new_run = self.saved_step is None
            self.writer = metric_writers.MetricWriter(
                self.path, self.run.train.tensorboard, new_run
            )

    def restore(self) -> None:
        """Sets the state of the newest usable checkpoint, or that of a new run."""
        restored = self.checkpoints.restore(self.assembled.shapes, self.log)
        if restored is None:
            self.state = setup.initial_train_state(self.assembled, self.console.print)
            self.totals = RunTotals()
            return
        self.state, note = restored
        self.assembled.batches.restore(note.data)
        self.totals, self.saved_step = RunTotals(**note.totals), note.step
        if note.metrics:
            self.held_out = note.step, note.metrics
        self.log(f"Going on from the checkpoint of step {note.step}.")

    def compile(self) -> None:
        """Compiles the step for the first batch, and loads the teacher's weights."""
        began = time.perf_counter()
        batch = sharding.place_batch(self.assembled.batches.at(self.start))
        if self.assembled.teacher:
            self.teacher_params = self.assembled.teacher.params()
        self.step = self.assembled.step.lower(self.state, batch, self.teacher_params).compile()
        self.compile_seconds = time.perf_counter() - began
        # Gloo, between processes on CPU, gives up where one comes half a minute after the other.
        processes.barrier()
        memory = self.step.memory_analysis()
        scratch = f"{memory.temp_size_in_bytes / 2**20:,.1f} MiB" if memory else "unknown"
        self.log(
            f"compiled in {self.compile_seconds:.1f} s; a step needs {scratch} per device for "
            "activations and scratch"
        )

    # ---- Loop over steps ----

    def run_steps(self) -> None:
        """Runs the steps that are left."""
        stop = self.run.train.steps
        if self.start >= stop:
            of = f"of {stop} is" if self.start == stop else f"is beyond TRAIN_STEPS = {stop} and"
            self.log(f"This run is finished: step {self.start} {of} done.")
            return
        self.bar = Progress("step", stop, self.start, self.console)
        self.bar.label("first steps")
        self.meter = Meter(self.run.train, self.cost, self.totals)
        batches = data.prefetch(self.assembled.batches, self.start, stop)
        try:
            self.evaluate_initial()
            for number, batch in batches:
                self.profile_step(number)
                self.take_step(number, batch, batches.waited)
                self.after_step(number + 1)
        finally:
            batches.close()
            self.end_profile()
            self.bar.close()

    def evaluate_initial(self) -> None:
        """Evaluates adapted or initial weights before they train."""
        initial = self.run.adaptation or self.run.checkpoint.initial
        if initial and self.start == 0 and self.evaluator and self.run.evaluate.every:
            with self.meter.pause():
                self.evaluate(0)

    def take_step(self, number: int, batch, waited: float) -> None:
        """Places a batch and starts the step.

        Args:
          number: steps done before this one.
          batch: rows of this host, numpy.
          waited: seconds that the loop has waited for batches so far.
        """
        self.meter.record_batch(waited)
        placed = sharding.place_batch(batch)
        with jax.transfer_guard("disallow"):
            self.state, metrics = self.step(self.state, placed, self.teacher_params)
        self.meter.record_step(number, metrics)

    def after_step(self, done: int) -> None:
        """Logs, evaluates and saves if it is due after `done` steps; stops after a signal."""
        run, last = self.run, done == self.run.train.steps
        self.handler.reached(done)
        self.bar.advance(done)
        evaluate = last or (run.evaluate.every and done % run.evaluate.every == 0)
        save = last or done % run.checkpoint.every == 0
        if done % run.train.log_every == 0 or evaluate or save or self.handler.due:
            self.log_window(done)
        elif self.bar.due() and (line := self.meter.peek()):
            self.show_metrics(line)
        if evaluate and self.evaluator:
            with self.meter.pause():
                self.evaluate(done)
        if save or (evaluate and run.checkpoint.metric):
            with self.meter.pause():
                self.save(done)
        if self.handler.due:
            self.stop_for_signal(done)

    # ---- Metrics and evaluation ----

    def log_window(self, done: int) -> None:
        """Closes the window of metrics: one line for writer and console."""
        self.last_metrics = self.meter.close_window()
        self.writer.write(done, self.last_metrics)
        self.show_metrics(self.last_metrics)

    def show_metrics(self, values: dict[str, float]) -> None:
        """Shows a line of metrics: always beside a live progress bar, else now and then."""
        if self.bar.live or self.bar.due() or self.bar.done == self.bar.total:
            left = (self.bar.total - self.bar.done) * values["step_seconds"]
            self.bar.show(progress_line.format_metrics(values, left))

    def evaluate(self, done: int) -> None:
        """Measures the weights after `done` steps on the held-out split."""
        began = time.perf_counter()
        try:
            with self.handler.anytime():
                values = self.evaluator(self.state.params, done, self.show_decoded)
        except Interrupted:
            self.stop_for_signal(done)
        self.evaluate_seconds += time.perf_counter() - began
        setup.check_metric(self.run.checkpoint, values)
        self.held_out = done, values
        self.writer.write(done, values, prefix=self.run.data.eval_split)
        words = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.log(f"step {done} {self.run.data.eval_split}: {words}")

    def show_decoded(self, examples: int) -> None:
        """Shows the number of examples decoded so far."""
        if self.bar is not None:
            self.bar.label(f"evaluating: {examples} decoded")

    # ---- Checkpoints and signals ----

    def save(self, done: int) -> None:
        """Saves a checkpoint of `done` steps, unless it is saved already."""
        if self.saved_step == done:
            return
        step, values = self.held_out
        note = checkpoint_io.CheckpointMetadata(
            step=done,
            config=gin_file.to_text(self.run),
            data=self.assembled.batches.state(),
            metrics=values if step == done else {},
            totals=vars(self.totals).copy(),
        )
        self.checkpoints.save(self.state, note)
        self.saved_step = done

    def stop_for_signal(self, done: int) -> None:
        """Saves and raises Interrupted with the signal."""
        ended = Interrupted(self.handler.number)
        self.save(done)
        self.checkpoints.wait()
        self.log(f"{ended}: saved step {done} in {self.path}. The same command goes on from there.")
        raise ended

    # ---- Profile ----

    def profile_step(self, number: int) -> None:
        """Starts and ends the profiler around PROFILED_STEPS."""
        if self.profile and number - self.start == PROFILED_STEPS.start:
            jax.profiler.start_trace(str(self.path / "profile"))
            self.profiling = True
        if number - self.start == PROFILED_STEPS.stop:
            self.end_profile()

    def end_profile(self) -> None:
        """Ends a profile that was started."""
        if self.profiling:
            jax.profiler.stop_trace()
            self.profiling = False
            self.log(f"profile of up to {len(PROFILED_STEPS)} steps: {self.path / 'profile'}")

    # ---- Report ----

    def finish(self, began: float) -> dict[str, Any]:
        """Writes report and learning curve; evaluates if the last step was not evaluated.

        Args:
          began: time.perf_counter() at the start of the process's run.
        """
        path = self.path / REPORT
        if self.start >= self.run.train.steps and path.exists():
            self.log(f"Its report is {path}.")
            return json.loads(path.read_text())
        done = int(self.state.step)
        if self.evaluator and self.held_out[0] != done:
            self.evaluate(done)
        self.checkpoints.wait()
        report = self.report(time.perf_counter() - began)
        if not processes.is_first():
            return report
        write_atomically(path, json.dumps(report, indent=2) + "\n")
        picture = curves.draw_learning_curve(self.path)
        self.log(f"finished at step {done}: {path}, {picture}")
        return report

    def report(self, total_seconds: float) -> dict[str, Any]:
        """Collects held-out metrics by name, and times and sizes of the training.

        train_seconds is time spent in steps over all restarts; total_seconds is of this process.
        """
        totals = self.totals
        seconds = max(totals.seconds, 1e-9)
        return {
            "steps": int(self.state.step),
            "split": self.run.data.eval_split if self.evaluator else None,
            **self.held_out[1],
            "train_loss": self.last_metrics.get("loss"),
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
        """Closes the metric writer and the checkpoints."""
        for resource in (self.writer, self.checkpoints):
            if resource is not None:
                resource.close()

    def log(self, text: str) -> None:
        """Prints a line, on the first process."""
        self.console.print(text, markup=False, soft_wrap=True)


def step_cost(run: config.Run) -> StepCost:
    """Positions and FLOPs of a step of this run, and the peak of all chips if it is known."""
    lengths, rows = run.data.lengths, run.train.batch_size
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    return StepCost(
        positions=rows * sum(flops.row_lengths(run.model.layout, lengths)),
        flops=flops.step_flops(run.model, rows, lengths),
        peak=peak and peak * jax.device_count(),
    )
