# SPDX-License-Identifier: Apache-2.0
"""One run, as one tree of frozen dataclasses: what a .gin file fills and every room reads.

Nothing here imports jax, flax, gin or TensorFlow. `config_file` turns .gin text into this tree and
back; `Run` is its root. A field has a default only where one value serves nearly everybody.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

# Dataclasses of other modules are bound by the same name as all others: config.Stack.layers.
from t5x_lite import windows
from t5x_lite.adapting import Adaptation as Adaptation
from t5x_lite.adapting import Distillation as Distillation
from t5x_lite.adapting import Part as Part
from t5x_lite.architecture import Model as Model
from t5x_lite.architecture import Pooling as Pooling
from t5x_lite.architecture import RotaryScaling as RotaryScaling
from t5x_lite.architecture import Stack as Stack
from t5x_lite.comparing import Compare as Compare
from t5x_lite.denoising import CausalLM as CausalLM
from t5x_lite.denoising import Denoisers as Denoisers
from t5x_lite.denoising import FillInTheMiddle as FillInTheMiddle
from t5x_lite.denoising import PrefixLM as PrefixLM
from t5x_lite.denoising import SpanCorruption as SpanCorruption
from t5x_lite.heading import HeadLoss as HeadLoss
from t5x_lite.heading import Heads as Heads
from t5x_lite.skipping import LayerSkip as LayerSkip
from t5x_lite.typed import Checked, require
from t5x_lite.writing import Decode as Decode


@dataclass(frozen=True)
class Vocabulary(Checked):
    """How text becomes ids. `trained` makes a SentencePiece of `size` pieces from the task's text.

    `checkpoint` takes that of the checkpoint at `path`, of whatever make: what a run needs that
    begins with its weights. `extra_ids` adds sentinels at the top of the vocabulary (span
    corruption needs them), `names` below them texts that are one id each (UL2's mode tokens); those
    that a checkpoint has already are not added again.
    `sentinels` names pieces that are there already and serve as sentinels instead, with {} for
    their number: "<unused{}>".
    """

    kind: Literal["bytes", "sentencepiece", "tokenizer_json", "trained", "checkpoint"]
    path: str | None = None
    size: int | None = None
    extra_ids: int = 0
    names: tuple[str, ...] = ()
    sentinels: str | None = None

    def check(self):
        needs_path = self.kind in ("sentencepiece", "tokenizer_json", "checkpoint")
        require(not needs_path or self.path, f"Vocabulary.path is needed for kind {self.kind}")
        require(self.kind != "trained" or self.size, "Vocabulary.size is needed for kind trained")
        require(self.extra_ids >= 0, "Vocabulary.extra_ids cannot be negative")
        require(len(set(self.names)) == len(self.names), "Vocabulary.names has a name twice")
        require(
            self.sentinels is None or not self.extra_ids,
            "Vocabulary.sentinels names pieces that are there; Vocabulary.extra_ids adds new ones: "
            "bind one of them",
        )
        require(
            self.sentinels is None or "{}" in self.sentinels,
            'Vocabulary.sentinels needs {} for the number: "<unused{}>"',
        )

    @property
    def told_sentinels(self) -> int | None:
        """How many sentinels there are; None where only the vocabulary's own file says it."""
        bare = self.kind in ("bytes", "trained") and self.sentinels is None
        return self.extra_ids if bare or self.extra_ids else None

    def most_ids(self, text: str | None) -> int:
        """No more ids than these are what a text becomes: a blank before it, and its bytes."""
        if text is None:
            return 0
        return 1 if text in self.names else 1 + len(text.encode())


@dataclass(frozen=True)
class Files(Checked):
    """A user's own data, without Python: globs per split, and the names of the fields.

    `format` is read from the file's ending unless given. `inputs` None means text without a
    source (language modelling). A `text` file has one example per line (or is one, if
    `whole_files`): its targets. `broken` says what a line that cannot be read does: skip (counted)
    or stop.
    """

    name: str
    train: str
    vocabulary: Vocabulary
    validation: str | None = None
    test: str | None = None
    format: Literal["jsonl", "tsv", "text", "parquet"] | None = None
    inputs: str | None = None
    targets: str = "targets"
    metrics: tuple[str, ...] = ("exact_match",)
    whole_files: bool = False
    broken: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class Mixture(Checked):
    """Several tasks at once, by name or as Files; `rates` say in what proportion their examples
    are drawn. All must have the same vocabularies.
    """

    tasks: tuple[str | Files, ...]
    rates: tuple[float, ...]

    def check(self):
        require(len(self.tasks) > 0, "Mixture.tasks is empty")
        require(
            len(self.tasks) == len(self.rates),
            f"Mixture.rates needs one rate for each of the {len(self.tasks)} tasks; got "
            f"{len(self.rates)}",
        )
        require(all(rate > 0 for rate in self.rates), "Mixture.rates must be positive")


@dataclass(frozen=True)
class Data(Checked):
    """What is read and how it is laid out in rows.

    `task` names a built-in task or a registered seqio Task or Mixture, or is `Files` or a
    `Mixture`. `objective` None trains on the task's own inputs and targets; otherwise its text
    (the targets) is cut up by the objective. `lengths` are tokens per row: {"inputs": 64,
    "targets": 64}; a decoder alone uses their sum. `vocabulary` replaces that of a built-in task.
    `stream` reads the training split anew instead of caching its tokens, for sources too large for
    `cache_dir`.
    """

    task: str | Files | Mixture
    lengths: dict[str, int]
    objective: SpanCorruption | PrefixLM | CausalLM | FillInTheMiddle | Denoisers | None = None
    pack: bool = True
    eval_split: str = "validation"
    vocabulary: Vocabulary | None = None
    cache_dir: str = "~/.cache/t5x_lite"
    stream: bool = False

    def check(self):
        unknown = set(self.lengths) - {"inputs", "targets"}
        require(not unknown, f"Data.lengths has unknown features {sorted(unknown)}")
        require("targets" in self.lengths, 'Data.lengths needs "targets"')
        for feature, length in self.lengths.items():
            require(length >= 2, f'Data.lengths["{feature}"] must be at least 2; got {length}')

    @property
    def told_vocabulary(self) -> Vocabulary | None:
        """What the config says of the targets' vocabulary; None for a task that brings its own."""
        tasks = self.task.tasks if isinstance(self.task, Mixture) else (self.task,)
        told = (task.vocabulary for task in tasks if isinstance(task, Files))
        return self.vocabulary or next(told, None)


@dataclass(frozen=True)
class Optimizer(Checked):
    """The update rule by name: `adafactor` is T5's; `adamw` and any optax optimizer by its name.

    `options` go to the optimizer as they are (b1, b2, decay_rate ...). `clip_norm` limits the
    global norm of the gradient before it.
    """

    name: str = "adafactor"
    weight_decay: float = 0.0
    clip_norm: float | None = None
    options: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Schedule(Checked):
    """Learning rate against step. `warmup` steps rise linearly from 0 to `peak`.

    rsqrt: peak * sqrt(warmup / max(step, warmup)). linear and cosine fall to `floor` * peak at the
    last step. wsd: constant, then linear to the floor over the last `decay` of all steps.
    """

    kind: Literal["constant", "rsqrt", "linear", "cosine", "wsd"]
    peak: float
    warmup: int = 0
    floor: float = 0.0
    decay: float = 0.2

    def check(self):
        require(self.peak > 0, f"Schedule.peak must be positive; got {self.peak}")
        require(self.warmup >= 0, f"Schedule.warmup cannot be negative; got {self.warmup}")
        require(0 <= self.floor <= 1, f"Schedule.floor is a share of peak; got {self.floor}")
        require(0 < self.decay <= 1, f"Schedule.decay is a share of all steps; got {self.decay}")
        require(self.kind != "rsqrt" or self.warmup > 0, "Schedule.warmup must be set for rsqrt")


@dataclass(frozen=True)
class Train(Checked):
    """Length of the run and what a step does.

    `batch_size` counts rows over all hosts; `microbatches` splits it in time. `remat` says what a
    layer keeps for its backward pass: all, products with weights (the default: less memory, and
    faster on CPU too) or only its input. `unroll` is how many layers one turn of the scan over
    layers takes: narrow models train 1.5 times faster on CPU unrolled. `patience` is how many
    steps in a row may have a non-finite gradient (each is skipped) before the run stops. A weight
    trains as the first of `parts` that names it says, or as the schedule says. `cross_entropy` is
    from logits held `whole`, or made in `pieces` and again for the backward pass; auto is pieces
    where a kernel makes them or the whole would take more than 1 GiB of a device. `heads` is how
    the heads of Model.blockwise are trained; `layer_skip` teaches the decoder to exit early.
    """

    steps: int
    batch_size: int
    microbatches: int = 1
    label_smoothing: float = 0.0
    z_loss: float = 0.0001
    remat: Literal["none", "products", "layers"] = "products"
    unroll: int = 1
    patience: int = 10
    log_every: int = 10
    tensorboard: bool = True
    parts: tuple[Part, ...] = ()
    cross_entropy: Literal["auto", "whole", "pieces"] = "auto"
    heads: HeadLoss = HeadLoss()
    layer_skip: LayerSkip | None = None

    def check(self):
        for name in ("steps", "batch_size", "microbatches", "unroll", "patience", "log_every"):
            require(getattr(self, name) >= 1, f"Train.{name} must be at least 1")
        require(
            self.batch_size % self.microbatches == 0,
            f"Train.batch_size ({self.batch_size}) must be a multiple of Train.microbatches "
            f"({self.microbatches})",
        )
        require(0 <= self.label_smoothing < 1, "Train.label_smoothing must be in [0, 1)")
        late = [part.begin for part in self.parts if part.begin >= self.steps]
        require(
            not late,
            f"Part.begin = {late[:1]} is beyond the run's {self.steps} steps: its weights would "
            "never train. Bind Part.rate = 0 if that is meant",
        )


@dataclass(frozen=True)
class Evaluate(Checked):
    """When to evaluate, on how much, and with which metrics (none: the task's own).

    `every` 0 evaluates at the end only. `examples` limits how many are decoded; `batches` how many
    are scored for the loss.
    """

    every: int = 0
    examples: int = 500
    batches: int = 50
    batch_size: int = 64
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint(Checked):
    """When to save and what to keep: the last `keep`, and the best by `metric` where it is named.

    `initial` is a checkpoint whose weights the run begins with: a run folder, a Hugging Face
    folder, a .gguf file or a T5X checkpoint.
    """

    every: int = 1000
    keep: int = 3
    metric: str | None = None
    higher_is_better: bool = False
    initial: str | None = None

    def check(self):
        require(self.every >= 1, "Checkpoint.every must be at least 1")
        require(self.keep >= 1, "Checkpoint.keep must be at least 1")


@dataclass(frozen=True)
class Mesh(Checked):
    """Devices by axis. `data` and `fsdp` split the batch, `fsdp` and `tensor` split the weights,
    `context` the length of rows while they train, for rows too long for one device.

    -1 takes all devices that the other axes leave. `slices` says of how many slices the devices
    are, which only a data-centre network joins: `data`, their multiple, spans them, and all other
    axes stay within one.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    slices: int = 1

    def check(self):
        require(self.slices >= 1, f"Mesh.slices must be at least 1; got {self.slices}")
        sizes = (self.data, self.fsdp, self.tensor, self.context)
        require(all(size >= 1 or size == -1 for size in sizes), "Mesh axes are at least 1, or -1")
        require(sizes.count(-1) <= 1, "At most one Mesh axis can be -1")


@dataclass(frozen=True)
class Run(Checked):
    """A whole run: everything that decides its numbers, and the folder they go to.

    Without `data`, `train` and `schedule` it is a converted checkpoint: it decodes, and a run that
    trains can begin with its weights.
    """

    model_dir: str
    model: Model
    data: Data | None = None
    train: Train | None = None
    schedule: Schedule | None = None
    optimizer: Optimizer = Optimizer()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    decode: Decode = Decode()
    mesh: Mesh = Mesh()
    adaptation: Adaptation | None = None
    distillation: Distillation | None = None
    compare: Compare | None = None
    seed: int = 0

    def check(self):
        require(
            self.adaptation is None or self.checkpoint.initial is None,
            "Checkpoint.initial and Run.adaptation both say which weights the run begins with: "
            "bind one of them",
        )
        require(
            self.adaptation is None or self.model.blockwise is None,
            "Run.adaptation makes a model without Model.blockwise: train them in a run that begins "
            "with its weights (Checkpoint.initial)",
        )
        if self.train is not None and self.train.layer_skip is not None:
            require(self.model.decoder is not None, "Train.layer_skip is for a decoder's layers")
            self.train.layer_skip.check_layers(self.model.decoder.layers)
        if self.data is None:
            return
        require(
            self.model.layout != "pair" or "inputs" in self.data.lengths,
            'Data.lengths needs "inputs": the model has an encoder',
        )
        objective = self.data.objective
        parts = objective.parts if isinstance(objective, Denoisers) else (objective,)
        require(
            not (self.model.layout == "pair" and any(isinstance(part, CausalLM) for part in parts)),
            "CausalLM leaves the encoder nothing to read: use PrefixLM or SpanCorruption",
        )
        vocabulary = self.data.told_vocabulary
        lengths = windows.lengths_of(self.data.lengths, self.model.layout)
        if vocabulary is not None and vocabulary.told_sentinels is not None:
            for part in filter(None, parts):
                mode = vocabulary.most_ids(getattr(part, "mode", None))
                windows.check_sentinels(part, lengths, mode, vocabulary.told_sentinels)
        if self.distillation is not None:
            self.check_distillation(parts)

    def check_distillation(self, objectives: tuple) -> None:
        require(
            self.model.decoder is not None,
            "Run.distillation is for a model with a decoder: a teacher says what comes next",
        )
        require(
            all(part is None or isinstance(part, PrefixLM | CausalLM) for part in objectives),
            "Run.distillation needs targets that go on from their inputs, as a decoder-only "
            "teacher reads them: PrefixLM, CausalLM, or a task's own pairs",
        )
