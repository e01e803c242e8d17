# SPDX-License-Identifier: Apache-2.0
"""DecoderLens (Langedijk et al., 2023): decoding from the states of each encoder layer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config, decoding, model, sharding
from t5x_lite.analysis import reading
from t5x_lite.decoding import generation, loop, target
from t5x_lite.decoding.acceptance import exact
from t5x_lite.decoding.beam_ranking import LengthPenalty
from t5x_lite.decoding.protocol import DecodeContext, Prompts, StoppingCriteria
from t5x_lite.decoding.result import Result, loop_result
from t5x_lite.model.computation import with_dtype_of


class LensShape(NamedTuple):
    """Static arguments of the compiled decoder: the model and the greatest length."""

    cfg: config.Model
    length: int


def decode_layers(
    cfg: config.Model, params: Any, inputs: list[int], length: int, stops: tuple[int, ...]
) -> list[list[int]]:
    """Decodes greedily from the encoder's states before each layer and after the last.

    The states pass through the encoder's final norm. All layers are rows of one batch, so it takes
    one encoding and one decoding.

    Args:
      cfg: config of the model.
      params: weights from `decoding.prepare_params`.
      inputs: ids for the encoder.
      length: the greatest number of ids to write.
      stops: ids that end a text.

    Returns:
      layers + 1 rows of ids.

    Raises:
      ValueError: the model lacks an encoder.
    """
    if cfg.encoder is None:
        raise ValueError(
            "DecoderLens lets the decoder read the layers of an encoder, and this model has none; "
            "its own layers are in the logit lens: .lens"
        )
    shape = LensShape(with_dtype_of(cfg, params), decoding.bucket_length(length))
    text = reading.ExplainedText(inputs, [cfg.decoder_start_token_id], 0)
    placed = reading.place_text(
        cfg, text._replace(tokens=[cfg.decoder_start_token_id, cfg.decoder_start_token_id])
    )
    limit = np.int32(length)
    result = jax.device_get(
        jit_decode_layers(shape, params, placed, limit, np.array(stops, np.int32))
    )
    layers = cfg.encoder.layers + 1
    pairs = zip(result.tokens[:layers, 0], result.lengths[:layers, 0], strict=True)
    return [ids[:count].tolist() for ids, count in pairs]


@functools.partial(jax.jit, static_argnums=0)
def jit_decode_layers(
    shape: LensShape, params: Any, placed: model.InspectionInputs, limit, stops
) -> Result:
    """Decodes a batch whose rows are the encoder's layers.

    Args:
      shape: static arguments.
      params: weights.
      placed: the text on the mesh.
      limit: int32, the greatest number of ids to write.
      stops: [n] int32 ids that end a text.
    """
    cfg = shape.cfg
    transformer = model.Inspected(cfg, scan=False)
    states = transformer.apply({"params": params}, placed, method=model.Inspected.encoded_by_layer)
    encoded, exists = as_rows(states, placed)
    rows = len(encoded)
    mask = jax.reshard(jnp.broadcast_to(exists, (rows, len(exists))), sharding.spec("batch length"))
    memory = model.EncoderMemory(
        transformer.apply({"params": params}, encoded, method=model.Transformer.cross_kv), mask
    )
    each = jax.reshard(jnp.ones(rows, jnp.int32), sharding.spec("batch"))
    prompts = Prompts((each * cfg.decoder_start_token_id)[:, None], each)
    slots = 1 + shape.length + 1
    cache = target.prefill(cfg, params, memory, prompts, slots)
    stopping = StoppingCriteria(stops, each + limit)
    context = DecodeContext(target.make_target(cfg, params, memory), stopping, prompts)
    plain = loop.Plain()
    state = generation.initial_state(context, cache, slots, plain.begin(context))
    state = loop.run_loop(context, plain, exact.Exact(), state)
    result = loop_result(state, prompts, shape.length, LengthPenalty(0.0))
    return jax.tree.map(lambda x: jax.reshard(x, P()), result)


def as_rows(states, placed: model.InspectionInputs):
    """States of the first text as rows [layers + 1 s d], and a mask of its positions [s].

    The last row is repeated until the mesh can split the rows.
    """
    first = jax.reshard(states, P())[:, 0]
    shards = sharding.batch_shards()
    missing = -len(first) % shards
    first = jnp.concatenate([first, jnp.repeat(first[-1:], missing, axis=0)])
    exists = jnp.arange(first.shape[1]) < jax.reshard(placed.inputs_length, P())[0]
    return jax.reshard(first, sharding.spec("batch length width")), exists
