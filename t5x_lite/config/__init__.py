# SPDX-License-Identifier: Apache-2.0
"""One run as a tree of frozen dataclasses, which a .gin file fills and every module reads.

Nothing here imports jax, flax, gin or TensorFlow. `gin_file` turns .gin text into this tree and
back; `Run` is its root. A field has a default only where one value serves nearly everybody.
"""

from dataclasses import dataclass

# Dataclasses of other modules are bound by the same name as all others: config.Stack.layers.
from t5x_lite.config import preferences as run_preferences
from t5x_lite.config import windows
from t5x_lite.config.adaptation import Adaptation as Adaptation
from t5x_lite.config.adaptation import Distillation as Distillation
from t5x_lite.config.adaptation import ParamGroup as ParamGroup
from t5x_lite.config.architecture import Model as Model
from t5x_lite.config.canvas import Canvas as Canvas
from t5x_lite.config.canvas import check_canvas_run
from t5x_lite.config.checked import Checked, OutputPath, Seed, require
from t5x_lite.config.comparison import Compare as Compare
from t5x_lite.config.contrastive import Contrastive as Contrastive
from t5x_lite.config.data import Data as Data
from t5x_lite.config.data import Files as Files
from t5x_lite.config.data import HubDataset as HubDataset
from t5x_lite.config.data import Mixture as Mixture
from t5x_lite.config.data import TextSource as TextSource
from t5x_lite.config.data import Vocabulary as Vocabulary
from t5x_lite.config.decoding import Decode as Decode
from t5x_lite.config.draft_heads import DraftHeadLoss as DraftHeadLoss
from t5x_lite.config.draft_heads import DraftHeads as DraftHeads
from t5x_lite.config.layer_skip import LayerSkip as LayerSkip
from t5x_lite.config.lora import Lora as Lora
from t5x_lite.config.objectives import CausalLM as CausalLM
from t5x_lite.config.objectives import Denoisers as Denoisers
from t5x_lite.config.objectives import FillInTheMiddle as FillInTheMiddle
from t5x_lite.config.objectives import MaskedNames as MaskedNames
from t5x_lite.config.objectives import NameTags as NameTags
from t5x_lite.config.objectives import PrefixLM as PrefixLM
from t5x_lite.config.objectives import SpanCorruption as SpanCorruption
from t5x_lite.config.preferences import Grpo as Grpo
from t5x_lite.config.preferences import Preferences as Preferences
from t5x_lite.config.readout import SMOOTHED_KINDS
from t5x_lite.config.readout import Readout as Readout
from t5x_lite.config.stack import RotaryScaling as RotaryScaling
from t5x_lite.config.stack import Stack as Stack
from t5x_lite.config.training import Checkpoint as Checkpoint
from t5x_lite.config.training import Evaluate as Evaluate
from t5x_lite.config.training import Mesh as Mesh
from t5x_lite.config.training import Optimizer as Optimizer
from t5x_lite.config.training import Schedule as Schedule
from t5x_lite.config.training import Train as Train
from t5x_lite.config.training import WeightAverage as WeightAverage


@dataclass(frozen=True)
class Run(Checked):
    """A whole run: everything that decides its numbers, and the folder they go to.

    Without `data`, `train` and `schedule` it is a converted checkpoint: it decodes, and a run that
    trains can begin with its weights.

    Attributes:
      model_dir: folder of the run's checkpoints, metrics and resolved config.
      model: architecture.
      data: what is read.
      train: length of the run and its step.
      schedule: learning rate.
      optimizer: update rule.
      evaluate: evaluation while it trains.
      checkpoint: checkpoints, and initial weights.
      decode: decoding, of evaluation and by default.
      mesh: devices.
      adaptation: initial weights from models of other shapes; None for none.
      distillation: teacher; None for none.
      contrastive: trains vectors of inputs and targets to find each other; None does not.
      lora: low-rank adapters, which train while the weights of Checkpoint.initial are frozen; None
        trains the weights.
      preferences: trains on pairs of texts, of which one is preferred; None does not.
      grpo: trains on rewards of the model's own samples; None does not.
      compare: comparison of twins (`python -m t5x_lite.compare`); None for none.
      seed: seed of weights, data order and dropout.
    """

    model_dir: OutputPath
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
    contrastive: Contrastive | None = None
    lora: Lora | None = None
    preferences: Preferences | None = None
    grpo: Grpo | None = None
    compare: Compare | None = None
    seed: Seed = 0

    def check(self):
        require(
            self.adaptation is None or self.checkpoint.initial is None,
            "Checkpoint.initial and Run.adaptation both say which weights the run begins with: "
            "bind one of them",
        )
        require(
            self.adaptation is None or self.model.draft_heads is None,
            "Run.adaptation has no weights for Model.draft_heads: train them in a run that begins "
            "with the adapted weights (Checkpoint.initial)",
        )
        if self.model.readout is not None and self.model.readout.kind != "vector":
            self.check_labels(self.model.readout)
        if self.lora is not None:
            self.check_lora()
        self.check_contrastive()
        check_canvas_run(self)
        if self.train is not None and self.train.layer_skip is not None:
            decoder = self.model.decoder
            require(decoder is not None, "Train.layer_skip is for a decoder's layers")
            assert decoder is not None
            self.train.layer_skip.check_layers(decoder.layers)
        if self.data is None:
            return
        run_preferences.check_preferences(self)
        require(
            self.model.batch_layout != "encoder_decoder" or "inputs" in self.data.lengths,
            'Data.lengths needs "inputs": the model has an encoder',
        )
        objective = self.data.objective
        parts = objective.parts if isinstance(objective, Denoisers) else (objective,)
        require(
            not (
                self.model.batch_layout == "encoder_decoder"
                and any(isinstance(part, CausalLM) for part in parts)
            ),
            "CausalLM has no inputs for the encoder: use PrefixLM or SpanCorruption",
        )
        vocabulary = self.data.declared_vocabulary
        lengths = windows.length_limits(self.data.lengths, self.model.batch_layout)
        if vocabulary is not None and vocabulary.sentinel_count is not None:
            for part in filter(None, parts):
                mode = vocabulary.most_ids(getattr(part, "mode", None))
                windows.check_sentinels(part, lengths, mode, vocabulary.sentinel_count)
        if self.distillation is not None:
            self.check_distillation(parts)

    def check_labels(self, readout: Readout) -> None:
        """Raises ValueError for parts of a run that are about text, where it trains on labels."""
        of_text = {
            "Data.objective": self.data and self.data.objective,
            "Run.distillation": self.distillation,
            "Run.adaptation": self.adaptation,
            "Train.layer_skip": self.train and self.train.layer_skip,
        }
        bound = [name for name, value in of_text.items() if value is not None]
        require(
            not bound,
            f"Readout.kind = {readout.kind!r} writes no text, which {' and '.join(bound)} is for: "
            "leave it out, or train the readout in a second run (Checkpoint.initial)",
        )
        require(
            self.data is None or self.data.readout in (None, readout),
            "Data.readout is another than Model.readout: leave Data.readout out",
        )
        require(
            self.train is None or self.train.label_smoothing == 0 or readout.kind in SMOOTHED_KINDS,
            f"Train.label_smoothing is for classes and tags, not for {readout.kind}: bind 0",
        )

    def check_lora(self) -> None:
        """Raises ValueError unless there is a base to adapt, and nothing else would train."""
        require(
            self.checkpoint.initial is not None,
            "Run.lora adapts the weights of a checkpoint: bind Checkpoint.initial "
            "(INITIAL_CHECKPOINT_PATH). Weights that Run.adaptation makes are one after "
            "python -m t5x_lite.adapt",
        )
        require(
            self.model.draft_heads is None,
            "Run.lora freezes Model.draft_heads too: train heads in a run without Run.lora",
        )

    def check_contrastive(self) -> None:
        """Raises ValueError unless vectors, and vectors alone, are trained by contrast."""
        readout = self.model.readout
        vectors = readout is not None and readout.kind == "vector"
        trains = self.train is not None and self.data is not None
        require(
            not (vectors and trains) or self.contrastive is not None,
            'Readout.kind = "vector" has no labels to train on: bind config.Run.contrastive = '
            "@config.Contrastive()",
        )
        if self.contrastive is None:
            return
        require(vectors, 'Run.contrastive trains vectors: bind Readout.kind = "vector"')
        require(
            self.distillation is None,
            "Run.contrastive trains vectors and Run.distillation logits: bind one of them",
        )
        require(
            (self.contrastive.matching > 0) == (readout is not None and readout.matching),
            "Contrastive.matching trains the classifier of Readout.matching: bind both or neither",
        )
        require(
            self.train is None or self.train.microbatches == 1,
            "Run.contrastive compares all texts of a batch at once: bind Train.microbatches = 1",
        )
        require(
            self.data is None or (self.data.objective is None and not self.data.pack),
            "Run.contrastive reads pairs of texts, one pair a row: leave out Data.objective and "
            "bind Data.pack = False",
        )

    def check_distillation(self, objectives: tuple) -> None:
        """Raises ValueError unless a decoder-only teacher can read these objectives."""
        require(
            self.model.decoder is not None,
            "Run.distillation is for a model with a decoder: a teacher predicts the next token",
        )
        require(
            not any(isinstance(part, FillInTheMiddle) for part in objectives),
            "Run.distillation needs targets in the order of their text, as a decoder-only teacher "
            "reads it: PrefixLM, CausalLM, SpanCorruption, or a task's own pairs",
        )
