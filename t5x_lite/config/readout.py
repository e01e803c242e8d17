# SPDX-License-Identifier: Apache-2.0
"""Config of a readout: labels, a number or a vector in place of text."""

from dataclasses import dataclass
from typing import Literal

from t5x_lite.config.checked import (
    Checked,
    Length,
    Positive,
    ShareBelowOne,
    Width,
    require,
)

# Kinds whose outputs have names.
NAMED_KINDS = ("classes", "labels", "tags")
# Kinds that choose one of the labels: label smoothing and z-loss are for their softmax.
SMOOTHED_KINDS = ("classes", "tags")
# Begins the tag of a span's first token, and of its others; OUTSIDE is in no span.
BEGIN, INSIDE, OUTSIDE = "B-", "I-", "O"


@dataclass(frozen=True)
class Readout(Checked):
    """Labels of a text, a number or a vector, in place of the text that other models write.

    It reads the states at the tokens of the inputs: those of an encoder alone, of a decoder alone,
    or of the decoder of an encoder-decoder, which reads the inputs once more, shifted right, as in
    transformers' T5ForSequenceClassification.

    Attributes:
      kind: one of the labels (classes), any number of them (labels), a number, a label for each
        token (tags), or the pooled states themselves (vector).
      pooling: the state of the first or the last token, their mean, or their mean weighted by
        attention with a learned query. A decoder's last state alone has seen all of the text. Tags
        are read from every state.
      labels: their names; () in a run with data for those of the training split, in the order of
        the alphabet. Tags then have "O" first, and "B-NAME" and "I-NAME" of each name of a span;
        a tag of another form is the name of all tokens in a row that have it.
      dense: a layer with tanh before the output, as in T5's and BART's classification heads.
      bias: the output has a bias.
      dropout: rate of dropout of what the output reads.
      project: width of a vector after a projection without bias (Sentence-T5); None for none.
      normalize: divides a vector by its Euclidean norm.
      max_length: tokens at which a text that becomes a vector is cut, its end included; None for no
        cut.
      query_prompt: text before queries, texts that search (sentence-transformers' prompt "query").
      document_prompt: text before documents, texts that are found.
      temperature: the first value of a temperature that is trained with the vectors
        (Run.contrastive); None has none.
      matching: beside vectors, a classifier that reads two texts as one row, and tells whether they
        belong together (Contrastive.matching).
    """

    kind: Literal["classes", "labels", "number", "tags", "vector"]
    pooling: Literal["first", "last", "mean", "attention"] = "last"
    labels: tuple[str, ...] = ()
    dense: bool = False
    bias: bool = True
    dropout: ShareBelowOne = 0.0
    project: Width | None = None
    normalize: bool = False
    max_length: Length | None = None
    query_prompt: str = ""
    document_prompt: str = ""
    temperature: Positive | None = None
    matching: bool = False

    def check(self):
        names = ("project", "normalize", "max_length", "query_prompt", "document_prompt")
        bound = [name for name in (*names, "temperature", "matching") if getattr(self, name)]
        require(
            self.kind == "vector" or not bound,
            f"Readout.{', Readout.'.join(bound)} belongs to a vector, and Readout.kind is "
            f"{self.kind!r}: leave it out",
        )
        require(
            not self.labels or self.kind in NAMED_KINDS,
            f"Readout.labels names classes, labels or tags; a {self.kind} has none",
        )
        repeated = {name for name in self.labels if self.labels.count(name) > 1}
        require(not repeated, f"Readout.labels has {', '.join(sorted(repeated))} more than once")
        require("" not in self.labels, "Readout.labels has an empty name: leave it out, or name it")

    @property
    def size(self) -> int:
        """Number of outputs; raises ValueError before the labels are known."""
        if self.kind == "number":
            return 1
        require(
            len(self.labels) > 0,
            'Readout.labels is empty: bind names, such as ("no", "yes"), or name data with labels '
            "to train on",
        )
        return len(self.labels)


def tag_labels(names: tuple[str, ...]) -> tuple[str, ...]:
    """Labels of tags that mark spans of these names."""
    return (OUTSIDE, *(f"{sign}{name}" for name in names for sign in (BEGIN, INSIDE)))
