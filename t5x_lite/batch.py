# SPDX-License-Identifier: Apache-2.0
"""What one training or scoring step reads, in the three layouts of `config.Model.layout`."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Rows of packed examples; numpy on the host, jax arrays on the mesh.

    Segments number the examples of a row from 1; 0 is padding. Positions count from 0 in each
    example. Loss weights are 1 where a target is to be predicted and 0 elsewhere.

    pair      inputs [b s] for the encoder, targets [b t] for the decoder.
    joined    a decoder alone: inputs and targets one after the other in targets [b t];
              prefix [b t] is true where the token belongs to the inputs; inputs are None.
    aligned   an encoder alone: targets[b, i] is to be predicted at inputs[b, i].

    The decoder's own inputs are not stored: they are the targets one place later within each
    segment, beginning with Model.start.
    """

    targets: Any
    target_segments: Any
    target_positions: Any
    loss_weights: Any
    inputs: Any = None
    input_segments: Any = None
    input_positions: Any = None
    prefix: Any = None
