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
   8. at checkpoint.every: save; at evaluate.every: losses and decoded metrics, added to the
      checkpoint of the step (saved first: no failure of an evaluation costs steps)
   9. after a signal: save this step and raise Interrupted; the same command continues from there
     callbacks of the user (callbacks.py) are called beside these
  10. after the last step: save, evaluate, write report.json and the learning curve
"""

import contextlib
import json
import time
from collections.abc import Generator
from typing import Any

import jax

from t5x_lite import data, processes, sharding
from t5x_lite.checkpoints import checkpoint_io
from t5x_lite.checkpoints.manager import CheckpointManager
from t5x_lite.checkpoints.train_state import TrainState
from t5x_lite.cli.progress import Progress, stderr_console, waiting
from t5x_lite.config import gin_file
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.data.task import DataChangedError
from t5x_lite.training import frozen_base, model_dir, preflight, schedules, setup, weight_average
from t5x_lite.training.callbacks import CallbackList, RunMoment
from t5x_lite.training.held_out import HeldOut
from t5x_lite.training.preemption import Interrupted, PreemptionHandler
from t5x_lite.training.profiler import StepProfiler
from t5x_lite.training.reporting import curves, metric_writers, overview, run_report, trackers
from t5x_lite.training.reporting.metrics import Meter, RunTotals, step_cost
from t5x_lite.training.reporting.step_progress import StepProgress
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import is_address, parse_path


def train(
    run: TrainingRun,
    profile: bool = False,
    try_memory: bool = False,
    ignore_damaged: bool = False,
) -> dict[str, Any]:
    """Trains the run to its last step, from its newest checkpoint if there is one.

    Args:
      run: config of the run.
      profile: true to write a profile of a few steps to MODEL_DIR/profile.
      try_memory: true to begin even if the memory of the devices seems to be too small.
      ignore_damaged: true to begin anew where MODEL_DIR has only damaged checkpoints.

    Returns:
      the report, which is also MODEL_DIR/report.json. All its values but the times are a function
      of the config.

    Raises:
      ValueError: anything of the config, the data or MODEL_DIR that makes the run impossible.
      Interrupted: SIGTERM or Ctrl-C, after saving.
    """
    began = time.perf_counter()
    with model_dir.lock_shared(run.model_dir) as check_lock, PreemptionHandler() as handler:
        training = Training(run, handler, profile, check_lock)
        try:
            with handler.anytime():
                training.prepare(try_memory, ignore_damaged)
            training.run_steps()
            return training.finish(began)
        finally:
            training.close()


class Training:
    """A run in progress. `state` is replaced by every step; the rest is set by `prepare`.

    Attributes:
      state: weights, optimizer and counts.
      totals: seconds and tokens over all restarts.
      checkpoints, writer: None before `prepare`.
      progress: None before `run_steps`.
      teacher_params, base: None without a teacher or adapters.
    """

    state: TrainState
    totals: RunTotals
    checkpoints: Any
    writer: Any
    progress: Any
    teacher_params: Any
    base: frozen_base.FrozenBase | None

    # ---- Life of a run: preparation ----

    def __init__(self, run: TrainingRun, handler: PreemptionHandler, profile: bool, lock: Any):
        self.run, self.handler, self.check_lock = run, handler, lock
        self.path = parse_path(run.model_dir)
        self.console = stderr_console(quiet=not processes.is_first())
        self.held_out = HeldOut(run)
        self.saved_step: int | None = None
        self.profiler = StepProfiler(self.path / "profile", profile, self.log)
        self.compile_seconds = 0.0
        self.writer = self.checkpoints = self.progress = self.teacher_params = self.newest = None
        self.unreported: int | None = None  # the newest checkpoint, which may not be complete

    def prepare(self, try_memory: bool, ignore_damaged: bool) -> None:
        """Does all that comes before the first step: data, weights, compiled step, overview."""
        run = self.run
        model_dir.agree_on_config(run, self.log)
        trackers.check_installed(run.train.trackers)
        self.callbacks = CallbackList(run, self.log)
        with waiting(self.console, "Opening the data"):
            self.assembled = setup.assemble_run(run)
            if not try_memory:
                preflight.check_memory(run, self.assembled.shapes, self.assembled.teacher)
            self.held_out.evaluator = setup.make_evaluator(run)
        self.cost, statistics = step_cost(run), str(self.assembled.batches.statistics)
        table = overview.overview_table(run, self.assembled.shapes, self.cost.flops, statistics)
        self.console.print(table)
        for warning in schedules.list_warnings(run):
            self.log(f"Warning: {warning}")
        self.checkpoints = CheckpointManager(self.path, run.checkpoint)
        self.restore(ignore_damaged)
        self.start = int(self.state.step)
        self.open_writer()
        if self.start < run.train.steps:
            self.compile()
            if not try_memory:
                preflight.check_step_memory(self.step)

    def open_writer(self) -> None:
        """Writes config and vocabularies to MODEL_DIR, and opens the metric writer."""
        self.writer = metric_writers.NullMetricWriter()
        if not processes.is_first():
            return
        # A finished run of more steps stays as it is described.
        if self.start <= self.run.train.steps:
            model_dir.write_description(self.run, self.assembled.vocabularies)
        self.checkpoints.read_vocabulary()
        board, start = self.run.train.tensorboard, self.saved_step
        opened = trackers.make_trackers(self.path, self.run, start)
        self.writer = metric_writers.MetricWriter(self.path, board, start, self.log, opened)
        held_out = self.held_out
        # A kill comes between the checkpoint's metrics and the line with them, too.
        if held_out.values and not metric_writers.has_line(
            self.path, held_out.step, held_out.split
        ):
            self.writer.write(held_out.step, held_out.values, held_out.split)

    def restore(self, ignore_damaged: bool) -> None:
        """Sets the state of the newest usable checkpoint, or that of a new run."""
        with waiting(self.console, "Reading the frozen weights"), setup.initial_errors():
            self.base = frozen_base.load_base(self.run)
        with waiting(self.console, "Looking for a checkpoint"):
            restored = self.checkpoints.restore(self.assembled.shapes, self.log, ignore_damaged)
        if restored is None:
            with waiting(self.console, "Making the initial weights"):
                self.state = setup.initial_train_state(
                    self.assembled, self.console.print, self.base
                )
            self.totals = RunTotals()
            return
        self.state, note = restored
        self.state = weight_average.check_window(self.run, self.state, note)
        frozen_base.check_base(self.run, self.base, note.base)
        self.assembled.batches.restore(note.data)
        self.totals, self.saved_step = RunTotals.from_saved(note.totals), note.step
        if note.metrics:
            self.held_out.step, self.held_out.values = note.step, note.metrics
        self.log(f"Going on from the checkpoint of step {note.step}.")

    def compile(self) -> None:
        """Compiles the step for the first batch, and loads the teacher's weights."""
        began = time.perf_counter()
        batch = sharding.place_batch(self.assembled.first_batch(self.start))
        if self.assembled.teacher:
            self.teacher_params = self.assembled.teacher.params()
        with waiting(self.console, "Compiling the training step"):
            self.step = self.assembled.step.lower(self.state, batch, *self.constants()).compile()
        self.compile_seconds = time.perf_counter() - began
        # Gloo, between processes on CPU, gives up where one comes half a minute after the other.
        processes.barrier()
        self.log(overview.compiled_text(self.step, self.compile_seconds))

    def constants(self) -> tuple[Any, Any]:
        """Arguments of a step that no step changes: the teacher's weights, and the frozen ones."""
        return self.teacher_params, self.base.params if self.base else None

    # ---- Loop over steps ----

    def run_steps(self) -> None:
        """Runs the steps that are left."""
        stop = self.run.train.steps
        if self.start >= stop:
            of = f"of {stop} is" if self.start == stop else f"is beyond TRAIN_STEPS = {stop} and"
            self.log(f"This run is finished: step {self.start} {of} done.")
            return
        self.progress = StepProgress(
            Progress("step", stop, self.start, self.console),
            Meter(self.run.train, self.cost, self.totals),
        )
        batches = data.prefetch(self.assembled.batches, self.start, stop)
        try:
            self.evaluate_first()
            for done in range(self.start, stop):
                with self.saving_on_failure(done):
                    number, batch = next(batches)
                    weights = self.state.params, self.constants()
                    batch = self.assembled.draw_batch(number, batch, weights, self.progress.meter)
                self.call_back("before_step", number)
                self.profiler.before_step(number - self.start)
                self.take_step(number, batch, batches.waited)
                self.after_step(number + 1)
        finally:
            batches.close()
            self.profiler.close()
            self.progress.bar.close()

    def evaluate_first(self) -> None:
        """Evaluates adapted or initial weights before they train, and a checkpoint whose evaluation
        did not come to its end."""
        initial = self.run.adaptation or self.run.checkpoint.initial
        if self.start > 0 or initial:
            self.evaluate_if_due(self.start)

    def evaluate_if_due(self, done: int) -> None:
        """Evaluates after `done` steps if it is due and not done yet."""
        if self.held_out.is_due(done) and self.held_out.is_missing(done):
            with self.progress.pause():
                self.evaluate(done)

    @contextlib.contextmanager
    def saving_on_failure(self, done: int) -> Generator[None]:
        """Context of work besides the steps, such as the user's code: `done` steps are saved if it
        fails. A signal is answered at once."""
        try:
            with self.handler.anytime():
                yield
        except Interrupted:
            self.stop_for_signal(done)
        except DataChangedError:
            # The last steps may have read what should not be there.
            raise
        except Exception:
            # With several processes the others would wait for one that failed alone.
            if done > self.start and not processes.is_multiprocess():
                self.save_now(done)
                self.log(f"Saved step {done} before this failure:")
            raise

    def take_step(self, number: int, batch, waited: float) -> None:
        """Places a batch and starts the step.

        Args:
          number: steps done before this one.
          batch: rows of this host, numpy.
          waited: seconds that the loop has waited for batches so far.
        """
        self.progress.meter.record_batch(waited)
        placed = sharding.place_batch(batch)
        with jax.transfer_guard("disallow"):
            self.state, metrics = self.step(self.state, placed, *self.constants())
        self.newest = metrics
        self.progress.meter.record_step(number, metrics)

    def after_step(self, done: int) -> None:
        """Logs, saves and evaluates if it is due after `done` steps; stops after a signal."""
        run, evaluate = self.run, self.held_out.is_due(done)
        self.handler.reached(done)
        self.call_back("after_step", done)
        self.checkpoints.check_writer()
        self.progress.bar.advance(done)
        save = done == run.train.steps or done % run.checkpoint.every == 0
        if done % run.train.log_every == 0 or evaluate or save or self.handler.due:
            self.log_window(done)
        else:
            self.progress.show_if_due()
        if save or (evaluate and run.checkpoint.metric):
            with self.progress.pause():
                self.save(done)
        self.evaluate_if_due(done)
        if self.handler.due:
            self.stop_for_signal(done)

    # ---- Metrics and evaluation ----

    def log_window(self, done: int) -> None:
        """Closes the window of metrics: one line for writer and console."""
        self.writer.write(done, self.progress.close_window())

    def evaluate(self, done: int) -> None:
        """Measures the weights after `done` steps on the held-out split."""
        show = self.progress.show_decoded if self.progress else None
        with self.saving_on_failure(done):
            values = self.held_out.measure(self.state, self.base, done, show)
        if self.saved_step == done:
            self.checkpoints.add_metrics(done, values)
        self.writer.write(done, values, self.held_out.split, self.held_out.failures)
        for line in self.held_out.describe():
            self.log(line)
        self.call_back("after_evaluation", done, values, self.held_out.failures)

    def call_back(self, method: str, done: int, *arguments: Any) -> None:
        """Calls the user's callbacks.

        Args:
          method: name of their method.
          done: steps done.
          *arguments: its arguments after the moment.
        """
        if not self.callbacks.listens(method):
            return
        moment = RunMoment(self.run, done, self.state.params, self.newest)
        with self.saving_on_failure(done):
            self.callbacks.call(method, moment, *arguments)

    # ---- Checkpoints and signals ----

    def save(self, done: int) -> None:
        """Saves a checkpoint of `done` steps, unless it is saved already."""
        if self.saved_step == done:
            return
        self.check_lock()  # raises once another process has MODEL_DIR
        # What a kill leaves are all lines up to its newest checkpoint. A bucket is not waited for.
        self.writer.flush(wait=not is_address(self.path))
        note = checkpoint_io.CheckpointMetadata(
            step=done,
            config=gin_file.to_text(self.run),
            data=self.assembled.batches.state(),
            metrics=self.held_out.values_at(done),
            totals=vars(self.totals).copy(),
            base=self.base.digests if self.base else {},
        )
        self.checkpoints.save(self.state, note)
        complete, self.saved_step, self.unreported = self.unreported, done, done
        self.report_saved(complete, done)

    def report_saved(self, step: int | None, done: int) -> None:
        """Calls callbacks about the checkpoint of `step`, which is complete after `done` steps."""
        if step is not None:
            self.call_back("after_save", done, step, self.path / "checkpoints" / str(step))

    def save_now(self, done: int) -> None:
        """Saves `done` steps, their metrics included, and waits until that is on disk."""
        if self.progress is not None and self.progress.meter.window:
            self.log_window(done)
        self.save(done)
        self.checkpoints.wait()

    def stop_for_signal(self, done: int) -> None:
        """Saves and raises Interrupted with the signal."""
        ended = Interrupted(not_none(self.handler.number))
        if done == 0:
            self.log(f"{ended}: nothing is saved before the first step.")
            raise ended
        self.save_now(done)
        self.log(f"{ended}: saved step {done} in {self.path}. The same command goes on from there.")
        raise ended

    # ---- Report ----

    def finish(self, began: float) -> dict[str, Any]:
        """Writes report and learning curve, with an evaluation of the last step if it is missing;
        `began` is time.perf_counter() at the start of the process's run."""
        path, done = self.path / run_report.REPORT, int(self.state.step)
        if self.start >= self.run.train.steps and (report := model_dir.read_report(path, done)):
            self.log(f"Its report is {path}.")
            return report
        if self.held_out.is_missing(done):
            self.evaluate(done)
        with waiting(self.console, f"Writing the checkpoint of step {done}"):
            self.checkpoints.wait()
        self.report_saved(self.unreported, done)
        self.writer.flush()
        seconds = time.perf_counter() - began
        report = run_report.collect_report(self, seconds)
        if processes.is_first():
            write_atomically(path, json.dumps(report, indent=2) + "\n")
            self.log(f"finished at step {done}: {path}, {curves.try_to_draw(self.path)}")
        self.call_back("at_end", done, report)
        return report

    def close(self) -> None:
        """Closes the metric writer and the checkpoints."""
        with contextlib.ExitStack() as closing:
            for resource in (self.checkpoints, self.writer):
                if resource is not None:
                    closing.callback(resource.close)

    def log(self, text: str) -> None:
        """Prints a line, on the first process."""
        self.console.print(text, markup=False, soft_wrap=True)
