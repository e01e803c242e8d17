# SPDX-License-Identifier: Apache-2.0
"""Config of training: optimizer, schedule, steps, evaluation, checkpoints, mesh of devices."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from t5x_lite.config.adaptation import ParamGroup
from t5x_lite.config.checked import (
    LARGEST_INT,
    Checked,
    Count,
    CountOrZero,
    Few,
    Finite,
    Length,
    NotNegative,
    Positive,
    Range,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    SourcePath,
    Width,
    require,
)
from t5x_lite.config.draft_heads import DraftHeadLoss
from t5x_lite.config.layer_skip import LayerSkip

# Devices along an axis; -1 takes all that are left.
AxisSize = Annotated[int, Range(1, LARGEST_INT, also=(-1,))]


@dataclass(frozen=True)
class Optimizer(Checked):
    """The update rule.

    Attributes:
      name: adafactor (T5's), adamw, or any optax optimizer by its name.
      weight_decay: decoupled weight decay.
      clip_norm: limit of the gradient's global norm, positive; None has none.
      options: keyword arguments of the optimizer, passed as they are: b1, b2, decay_rate ...
    """

    name: str = "adafactor"
    weight_decay: NotNegative = 0.0
    clip_norm: Positive | None = None
    options: dict[str, Finite] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Schedule(Checked):
    """Learning rate against step.

    Attributes:
      kind: constant; rsqrt: peak * sqrt(warmup / max(step, warmup)); linear and cosine: down to
        the floor at the last step; wsd: constant, then linear to the floor.
      peak: largest learning rate.
      warmup: steps that rise linearly from 0 to `peak`.
      floor: last learning rate as a share of `peak`.
      decay: share of all steps, at the end, over which wsd falls.
    """

    kind: Literal["constant", "rsqrt", "linear", "cosine", "wsd"]
    peak: Positive
    warmup: CountOrZero = 0
    floor: Share = 0.0
    decay: ShareAboveZero = 0.2

    def check(self):
        require(self.kind != "rsqrt" or self.warmup > 0, "Schedule.warmup must be set for rsqrt")


@dataclass(frozen=True)
class WeightAverage(Checked):
    """An averaged copy of the weights that train, kept beside them and saved with them.

    Attributes:
      kind: uniform: the mean of the weights after the last `last` of every `every` steps, of which
        the final step is one; before the first of these the copy is the weights. exponential:
        after each update the copy moves to the weights by a share of 1 - decay.
      last: weights in the uniform mean.
      every: steps from one of these to the next.
      decay: decay of the exponential average.
      warmup: after t updates the decay is at most (1 + t) / (warmup + t), so that the copy soon
        forgets the initial weights; 0 has no such limit.
      evaluate: evaluations measure the copy too, as average/loss and so on.
    """

    kind: Literal["uniform", "exponential"]
    last: Count = 5
    every: Count = 1000
    decay: ShareBelowOne = 0.999
    warmup: CountOrZero = 10
    evaluate: bool = False

    def first_step(self, steps: int) -> int:
        """Step after which the weights are the first of the uniform mean in a run of `steps`."""
        return steps - (self.last - 1) * self.every


@dataclass(frozen=True)
class Train(Checked):
    """Length of the run and the training step.

    Attributes:
      steps: number of steps.
      batch_size: rows of a step over all hosts.
      microbatches: equal parts that the batch is split into, computed one after the other.
      label_smoothing: probability moved from the target to all ids alike.
      z_loss: weight of log(Z)^2, which keeps the softmax normalizer near 1.
      remat: what a layer keeps for its backward pass: all (none), products with weights (minimal:
        less memory, and faster on CPU too), or only its input (full).
      unroll: layers per turn of the scan over layers; narrow models train 1.5 times faster on CPU
        unrolled.
      max_consecutive_skips: steps in a row that may have a non-finite gradient or update before the
        run stops; each of them is skipped.
      log_every: steps between lines of metrics.
      tensorboard: writes metrics for TensorBoard too.
      trackers: services that metrics go to as well: wandb (Weights & Biases) and mlflow, which take
        server, project and credentials from their own environment variables.
      callbacks: classes of the user that are called while the run goes on, as MODULE.NAME; they are
        derived from t5x_lite.training.callbacks.Callback.
      param_groups: weights with a learning-rate rule of their own; each belongs to the first group
        that names it, and the rest trains by the schedule.
      cross_entropy: logits held all at once (full), or computed a part of the vocabulary at a time
        and again for the backward pass (chunked). auto is chunked where a kernel does it, or where
        all logits would take more than 1 GiB of a device.
      draft_head_loss: the loss of `Model.draft_heads`.
      layer_skip: trains the decoder to exit early; None does not.
      average: an averaged copy of the weights; None keeps none.
    """

    steps: Count
    batch_size: Length
    microbatches: Length = 1
    label_smoothing: ShareBelowOne = 0.0
    z_loss: NotNegative = 0.0001
    remat: Literal["none", "minimal", "full"] = "minimal"
    unroll: Few = 1
    max_consecutive_skips: Count = 10
    log_every: Count = 10
    tensorboard: bool = True
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    callbacks: tuple[str, ...] = ()
    param_groups: tuple[ParamGroup, ...] = ()
    cross_entropy: Literal["auto", "full", "chunked"] = "auto"
    draft_head_loss: DraftHeadLoss = DraftHeadLoss()
    layer_skip: LayerSkip | None = None
    average: WeightAverage | None = None

    def check(self):
        for name in ("trackers", "callbacks"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"Train.{name} has a name twice")
        require(
            self.batch_size % self.microbatches == 0,
            f"Train.batch_size ({self.batch_size}) must be a multiple of Train.microbatches "
            f"({self.microbatches})",
        )
        late = [group.begin for group in self.param_groups if group.begin >= self.steps]
        require(
            not late,
            f"ParamGroup.begin = {late[:1]} is beyond the run's {self.steps} steps: its weights "
            "would never train. Bind ParamGroup.rate = 0 if that is meant",
        )
        average = self.average
        require(
            average is None or average.kind != "uniform" or average.first_step(self.steps) > 0,
            "WeightAverage.last and WeightAverage.every reach further back than the run's "
            f"{self.steps} steps: lower one of them",
        )


@dataclass(frozen=True)
class Evaluate(Checked):
    """Schedule, size and metrics of evaluations.

    Attributes:
      every: steps between evaluations; 0 evaluates at the end only.
      examples: most examples that are decoded.
      batches: most batches that are scored for the loss.
      batch_size: rows decoded or scored at once.
      metrics: names of metrics; empty takes the task's own.
    """

    every: CountOrZero = 0
    examples: CountOrZero = 500
    batches: CountOrZero = 50
    batch_size: Width = 64
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint(Checked):
    """Schedule of checkpoints, those to keep, and the initial weights of the run.

    Attributes:
      every: steps between checkpoints.
      keep: newest checkpoints that are kept.
      metric: name of a metric whose best checkpoint is kept too; None keeps none.
      higher_is_better: the best is the largest value of `metric`.
      initial: checkpoint whose weights the run begins with: a run folder, a Hugging Face folder, a
        .gguf file, a T5X checkpoint, or a model of the hub by name,
        owner/name[@revision][:file.gguf].
    """

    every: Count = 1000
    keep: Count = 3
    metric: str | None = None
    higher_is_better: bool = False
    initial: SourcePath | None = None


@dataclass(frozen=True)
class Mesh(Checked):
    """Devices by axis; -1 takes all devices that the other axes leave.

    Attributes:
      data: splits the batch.
      fsdp: splits the batch and the weights.
      tensor: splits the weights.
      context: splits the length of rows while they train, for rows too long for one device.
      slices: number of slices that the devices belong to, joined by a data-center network alone;
        `data`, a multiple of it, spans them, and all other axes stay within one.
    """

    data: AxisSize = -1
    fsdp: AxisSize = 1
    tensor: AxisSize = 1
    context: AxisSize = 1
    slices: Count = 1

    def check(self):
        sizes = (self.data, self.fsdp, self.tensor, self.context)
        require(sizes.count(-1) <= 1, "At most one Mesh axis can be -1")
