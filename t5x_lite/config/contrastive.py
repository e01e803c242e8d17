# SPDX-License-Identifier: Apache-2.0
"""Config of contrastive training: vectors of texts that belong together are brought together."""

from dataclasses import dataclass

from t5x_lite.config.checked import Checked, NotNegative, Positive


@dataclass(frozen=True)
class Contrastive(Checked):
    """Training of the vectors of `Model.readout` by contrast (InfoNCE; van den Oord et al., 2018).

    The inputs of each pair are to find their targets among all targets, and hard negatives
    (Files.negatives), of the batch on all devices, by the softmax of their products. Texts equal to
    the pair's own are no negatives.

    Attributes:
      temperature: what the products are divided by, unless Readout.temperature is trained.
      symmetric: the targets are to find their inputs too; the loss is the mean of both (CLIP).
      matching: weight of a second loss, of Readout.matching: pairs are told from each input with a
        negative of its targets, and each target with one of its inputs, both drawn from the batch
        by the softmax of their products (ALBEF, Li et al., 2021; CodeT5+); 0 has none.
    """

    temperature: Positive = 0.05
    symmetric: bool = False
    matching: NotNegative = 0.0
