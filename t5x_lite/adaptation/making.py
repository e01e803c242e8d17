# SPDX-License-Identifier: Apache-2.0
"""An adapted checkpoint as a run folder, before training: what python -m t5x_lite.adapt writes."""

from typing import NamedTuple

from t5x_lite import config
from t5x_lite.adaptation import agreement, beginning
from t5x_lite.adaptation.adapted import Adapted
from t5x_lite.adaptation.beginning import Sources
from t5x_lite.adaptation.derived import Way, derive
from t5x_lite.adaptation.mapping import Plan
from t5x_lite.conversion import origins
from t5x_lite.conversion.origins import Asked, Origin, Text
from t5x_lite.data import grown


class Growth(NamedTuple):
    """What a vocabulary gets: texts of one id each, and sentinels above them. `vocabulary` is
    where the source has none, as conversion's command takes it.
    """

    names: tuple[str, ...] = ()
    sentinels: int = 0
    vocabulary: str | None = None


class Making(NamedTuple):
    """A run that has the derived model and how it is adapted, and what it is made of."""

    run: config.Run
    sources: Sources
    text: Text | None

    def origin(self) -> Origin:
        """The output as conversion's writers take it."""
        return Origin("adapted", self.run.model, self.text)

    def weights(self, plan: Plan) -> Adapted:
        return Adapted(plan, self.sources.weights(), self.run.adaptation.rows, self.run.seed)


def opened(how: config.Adaptation, way: Way, growth: Growth, seed: int) -> Making:
    """The sources opened, the vocabulary grown and the model derived; no weight is read yet.

    Raises:
      ValueError: a source is not there, has another vocabulary than the other, or has no tower
        that could become what is asked for.
    """
    source = origins.open(how.source, Asked(vocabulary=growth.vocabulary))
    other = how.encoder_source
    other = None if other is None else beginning.open_source("encoder_source", other)
    text, vocab = None, 0
    if source.text is not None:
        pair = [grown.grow(each, growth.names, growth.sentinels) for each in source.text.pair]
        agreement.check(how, *pair)
        # A conversation has one text after the other: nothing for an encoder.
        text = Text(tuple(pair), source.text.chat if way.to == "decoder_only" else None)
        vocab = max(each.size for each in pair)
    config.require(
        text is not None or not (growth.names or growth.sentinels),
        f"{how.source} is adapted without a vocabulary: there is nothing to add names or sentinels "
        "to",
    )
    made = derive(source.model, way, vocab, None if other is None else other.model)
    run = config.Run(model_dir="none", model=made, adaptation=how, seed=seed)
    return Making(run, Sources(source, other), text)
