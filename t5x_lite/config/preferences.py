# SPDX-License-Identifier: Apache-2.0
"""Config of preference tuning: from pairs of texts, or from rewards of sampled texts."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from t5x_lite.config.checked import (
    FAR,
    Checked,
    CountOrZero,
    Few,
    NotNegative,
    Positive,
    Range,
    ShareAboveZero,
    ShareBelowOne,
    SourcePath,
    require,
)
from t5x_lite.config.data import Files, HubDataset, Mixture

REFERENCED = ("dpo", "ipo")


@dataclass(frozen=True)
class Preferences(Checked):
    """Training on pairs of texts, of which one is preferred, in place of cross entropy.

    A pair is a record of `Files` with `rejected`. Each text has a score: the logarithm of its
    probability over that of a reference model (dpo, ipo), of its odds (orpo), or of its probability
    (simpo). With the margin m, the chosen text's score less the rejected one's, the losses are
    -log sigmoid(beta m) (dpo), (m - 1 / (2 beta))^2 (ipo), -log sigmoid(beta m - gamma) (simpo),
    and cross entropy per token of the chosen text - beta log sigmoid(m) (orpo).

    Attributes:
      loss: dpo (Rafailov et al., 2023), ipo (Azar et al., 2023), orpo (Hong et al., 2024) or simpo
        (Meng et al., 2024).
      beta: strength: the larger, the nearer dpo and ipo stay to the reference; orpo's lambda.
      length_normalized: log-probabilities are per token; those of orpo and simpo always are.
      gamma: margin that simpo aims at, times beta.
      reference: checkpoint of the frozen reference model, of the run's shapes; None is
        Checkpoint.initial, which with Run.lora is the model without its adapters.
    """

    loss: Literal["dpo", "ipo", "orpo", "simpo"] = "dpo"
    beta: Positive = 0.1
    length_normalized: bool = False
    gamma: NotNegative = 0.0
    reference: SourcePath | None = None

    @property
    def has_reference(self) -> bool:
        """True if the loss compares with a reference model."""
        return self.loss in REFERENCED

    @property
    def per_token(self) -> bool:
        """True if a text counts by the mean of its tokens' log-probabilities, not by their sum."""
        return self.length_normalized or not self.has_reference

    def check(self):
        require(
            self.reference is None or self.has_reference,
            f"Preferences.reference is for dpo and ipo; {self.loss} compares with no reference",
        )
        require(
            not self.gamma or self.loss == "simpo",
            f"Preferences.gamma is for simpo; Preferences.loss is {self.loss}",
        )


@dataclass(frozen=True)
class Grpo(Checked):
    """Policy gradients from rewards of the model's own samples (GRPO: Shao et al., 2024).

    Each step draws `samples` texts for each of Train.batch_size inputs and rewards them. The
    advantage of a text is its reward less the mean of its group, over the group's standard
    deviation.

    Attributes:
      reward: metric by name, of which more is better (exact_match, chrf, bleu) or less (per, wer:
        negated); compile, 1 for text that compiles as Python and 0 for other text; or
        function:MODULE.NAME, (input, texts, references) -> a number for each text.
      samples: texts of a group, two at least.
      temperature: of the samples; 1 samples from the distribution that is trained.
      top_k: samples among the k most probable tokens; 0 among all.
      top_p: samples among the fewest tokens whose probabilities sum to p; 1 among all.
      updates: optimizer updates by each batch of samples.
      clip: how far the ratio of probabilities after and before these updates may move from 1.
      clip_above: the same for ratios above 1, if it differs (Yu et al., 2025); None is `clip`.
      kl_weight: weight of the divergence from the reference model; 0 needs none.
      reference: checkpoint of the frozen reference model, of the run's shapes; None is
        Checkpoint.initial, which with Run.lora is the model without its adapters.
      divide_by_deviation: False leaves advantages undivided (Dr. GRPO: Liu et al., 2025).
      average: mean over the tokens of each text, then over texts (text); over all tokens (token:
        Yu et al., 2025); or the sum of each text's tokens over the most it may have, then the mean
        over texts (constant: Dr. GRPO).
    """

    reward: str
    samples: Annotated[int, Range(2, FAR)] = 8
    temperature: Annotated[float, Range(1e-6)] = 1.0
    top_k: CountOrZero = 0
    top_p: ShareAboveZero = 1.0
    updates: Few = 1
    clip: ShareBelowOne = 0.2
    clip_above: NotNegative | None = None
    kl_weight: NotNegative = 0.04
    reference: SourcePath | None = None
    divide_by_deviation: bool = True
    average: Literal["text", "token", "constant"] = "text"

    @property
    def has_reference(self) -> bool:
        """True if the loss compares with a reference model."""
        return self.kl_weight > 0

    def check(self):
        require(
            self.reference is None or self.has_reference,
            "Grpo.reference has no effect at Grpo.kl_weight = 0: bind a weight, or no reference",
        )


def check_preferences(run: Any) -> None:
    """Raises ValueError unless data, model and step of a `config.Run` suit its preferences.

    Whatever draws at random in a step is refused: probabilities before and after it, and those of
    the reference, are compared.
    """
    tasks = run.data.task.tasks if isinstance(run.data.task, Mixture) else (run.data.task,)
    paired = [isinstance(task, Files | HubDataset) and task.rejected is not None for task in tasks]
    scored = any(isinstance(task, Files) and task.reference is not None for task in tasks)
    preferences, grpo = run.preferences, run.grpo
    if run.train is not None:
        require(
            preferences is not None or not any(paired),
            "Files.rejected names texts that are not to be learned: bind config.Run.preferences = "
            "@config.Preferences(), or Files.rejected = None",
        )
    if preferences is None and grpo is None:
        return
    require(
        preferences is None or grpo is None,
        "Run.preferences and Run.grpo are two objectives: bind one of them",
    )
    name = "Run.preferences" if grpo is None else "Run.grpo"
    require(run.model.decoder is not None, f"{name} is for a model with a decoder")
    require(
        run.data.objective is None,
        f"{name} reads inputs and targets of a task: bind Data.objective = None",
    )
    if preferences is not None:
        check_pairs(run, preferences, all(paired), scored)
    check_step(run, name)
    settings = preferences or grpo
    require(
        not settings.has_reference
        or scored
        or settings.reference is not None
        or run.checkpoint.initial is not None,
        f"{name} compares with a reference model: bind {type(settings).__name__}.reference, or "
        "Checkpoint.initial (INITIAL_CHECKPOINT_PATH)",
    )


def check_pairs(run: Any, preferences: Preferences, paired: bool, scored: bool) -> None:
    """Raises ValueError unless every task of a run has pairs, in a form that can be read.

    Args:
      run: the run.
      preferences: its preferences.
      paired: true if every task is of pairs.
      scored: true if a file has log-probabilities of a reference.
    """
    require(
        paired,
        "Run.preferences trains on pairs of texts: bind Files.rejected, the field of the text that "
        "is not preferred, beside Files.targets, that of the preferred one",
    )
    require(
        not run.data.stream,
        "Data.stream reads examples one by one, and Run.preferences needs pairs: bind "
        "Data.stream = False",
    )
    require(
        not scored or not isinstance(run.data.task, Mixture),
        "Files.reference is for a single task: leave out the Mixture, or bind "
        "Preferences.reference in its place",
    )
    require(
        not scored or preferences.has_reference,
        f"Files.reference is for dpo and ipo; {preferences.loss} compares with no reference",
    )
    require(
        not scored or preferences.reference is None,
        "Files.reference and Preferences.reference both say what to compare with: bind one of them",
    )


def check_step(run: Any, name: str) -> None:
    """Raises ValueError for a field of a run that its objective `name` leaves no place for."""
    lora = run.lora
    bound = {
        "Model.dropout": run.model.dropout,
        "Lora.dropout": lora is not None and lora.dropout,
        "Model.draft_heads": run.model.draft_heads is not None,
        "Model.readout": run.model.readout is not None,
        "Run.distillation": run.distillation is not None,
        "Run.contrastive": run.contrastive is not None,
    }
    train = run.train
    if train is not None:
        bound |= {
            "Train.label_smoothing": train.label_smoothing,
            "Train.layer_skip": train.layer_skip is not None,
        }
    for field, value in bound.items():
        off = "0.0" if field.endswith(("dropout", "smoothing")) else "None"
        require(not value, f"{name} compares probabilities of texts: bind {field} = {off}")
    if train is not None and run.grpo is not None and run.grpo.updates > 1:
        require(
            not any(group.begin or group.warmup for group in train.param_groups),
            "ParamGroup.begin and ParamGroup.warmup count updates, and Grpo.updates makes several "
            "of a step: bind Grpo.updates = 1, or leave them 0",
        )
