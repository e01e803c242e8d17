# SPDX-License-Identifier: Apache-2.0
"""An adapted checkpoint as a run folder, before training: the output of t5x_lite.adapt."""

from typing import NamedTuple

from t5x_lite import config
from t5x_lite.adaptation import initial_weights, vocabulary_compatibility
from t5x_lite.adaptation.adapted_weights import AdaptedWeights
from t5x_lite.adaptation.derive_config import Arrangement, derive_model
from t5x_lite.adaptation.initial_weights import Sources
from t5x_lite.adaptation.mapping import AdaptationPlan
from t5x_lite.checkpoints import run_folder
from t5x_lite.checkpoints.opening import ConversionOptions, open_checkpoint
from t5x_lite.checkpoints.outputs import CheckpointContents
from t5x_lite.checkpoints.text_settings import TextSettings
from t5x_lite.tokenizers import extended


class VocabularyExtension(NamedTuple):
    """Ids to add to a vocabulary.

    Attributes:
      names: texts that get one id each.
      sentinels: number of sentinels, with ids above those of the names.
      vocabulary: path of a vocabulary for a source without one, as in conversion; None otherwise.
    """

    names: tuple[str, ...] = ()
    sentinels: int = 0
    vocabulary: str | None = None


class AdaptedModel(NamedTuple):
    """An adapted model before its weights are read.

    Attributes:
      run: config with the derived model and the adaptation.
      sources: the opened checkpoints.
      text: vocabularies and chat template; None to adapt the weights alone.
    """

    run: config.Run
    sources: Sources
    text: TextSettings | None

    def contents(self) -> CheckpointContents:
        """The checkpoint without its weights, as conversion's writers take it."""
        # Without Run.adaptation: the weights are those of an adapted model already.
        run = run_folder.model_only_run("none", self.run.model)
        assert self.run.adaptation is not None
        return CheckpointContents(run, self.text, origin=self.run.adaptation.source)

    def weights(self, plan: AdaptationPlan) -> AdaptedWeights:
        """The weights of the adapted model, read one at a time."""
        assert self.run.adaptation is not None
        return AdaptedWeights(plan, self.sources.weights(), self.run.adaptation.rows, self.run.seed)


def plan_adapted_model(
    adaptation: config.Adaptation,
    arrangement: Arrangement,
    extension: VocabularyExtension,
    seed: int,
) -> AdaptedModel:
    """Opens the sources, extends the vocabulary and derives the model; no weight is read yet.

    Args:
      adaptation: config of the adaptation.
      arrangement: towers of the adapted model.
      extension: ids to add to the vocabulary.
      seed: seed of new weights.

    Raises:
      ValueError: a source does not exist, the sources differ in vocabulary, or a source lacks a
        tower that could become the requested one.
    """
    source = open_checkpoint(
        adaptation.source, options=ConversionOptions(vocabulary=extension.vocabulary)
    )
    encoder_source = adaptation.encoder_source
    encoder_source = (
        None
        if encoder_source is None
        else initial_weights.open_source("encoder_source", encoder_source)
    )
    text, vocab = None, 0
    if source.text is not None:
        inputs, targets = (
            extended.extend_vocabulary(each, extension.names, extension.sentinels)
            for each in source.text.vocabularies
        )
        vocabulary_compatibility.check_vocabularies(adaptation, inputs, targets)
        # A chat template formats one sequence: an encoder has no use for it.
        text = TextSettings(
            (inputs, targets), source.text.chat if arrangement.to == "decoder_only" else None
        )
        vocab = max(inputs.size, targets.size)
    config.require(
        text is not None or not (extension.names or extension.sentinels),
        f"{adaptation.source} is adapted without a vocabulary: there is nothing to add names or "
        "sentinels to",
    )
    model = derive_model(
        source.model, arrangement, vocab, None if encoder_source is None else encoder_source.model
    )
    run = config.Run(model_dir="none", model=model, adaptation=adaptation, seed=seed)
    return AdaptedModel(run, Sources(source, encoder_source), text)
