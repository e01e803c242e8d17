# SPDX-License-Identifier: Apache-2.0
"""DecoderLens (Langedijk et al., 2023): the decoder writes from what any encoder layer gives."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config, decoding, model, sharding
from t5x_lite.analysis import reading
from t5x_lite.decoding import acceptance, generation, loop, target
from t5x_lite.decoding.protocol import Prompts, Rules, Setting


class Shape(NamedTuple):
    """What an executable is compiled for."""

    cfg: config.Model
    length: int


def written(
    cfg: config.Model, params: Any, inputs: list[int], length: int, stops: tuple[int, ...]
) -> list[list[int]]:
    """What the decoder writes, greedily, from the encoder's states before each layer and after the
    last, through the encoder's final norm: layers + 1 rows of ids, at most `length` of them.

    All layers are rows of one batch, so it takes one reading and one decoding. params come from
    `decoding.prepare`.

    Raises:
      ValueError: the model has no encoder.
    """
    if cfg.encoder is None:
        raise ValueError(
            "DecoderLens lets the decoder read the layers of an encoder, and this model has none; "
            "its own layers are in the logit lens: .lens"
        )
    shape = Shape(decoding.precise(cfg), decoding.bucket(length))
    text = reading.Text(inputs, [cfg.start], 0)
    placed = reading.placed_for(cfg, text._replace(tokens=[cfg.start, cfg.start]))
    limit = np.int32(length)
    result = jax.device_get(compiled(shape, params, placed, limit, np.array(stops, np.int32)))
    layers = cfg.encoder.layers + 1
    pairs = zip(result.tokens[:layers, 0], result.lengths[:layers, 0], strict=True)
    return [ids[:count].tolist() for ids, count in pairs]


@functools.partial(jax.jit, static_argnums=0)
def compiled(shape: Shape, params: Any, placed: model.Given, limit, stops) -> generation.Result:
    cfg = shape.cfg
    transformer = model.Inspected(cfg, scan=False)
    states = transformer.apply({"params": params}, placed, method="encoded_by_layer")
    encoded, exists = as_rows(states, placed)
    rows = len(encoded)
    seen = jax.reshard(jnp.broadcast_to(exists, (rows, len(exists))), sharding.spec("batch length"))
    read = model.Read(transformer.apply({"params": params}, encoded, method="crossed"), seen)
    each = jax.reshard(jnp.ones(rows, jnp.int32), sharding.spec("batch"))
    prompts = Prompts((each * cfg.start)[:, None], each)
    slots = 1 + shape.length + 1
    cache = target.prefill(cfg, params, read, prompts, slots)
    rules = Rules(stops, each + limit, None)
    setting = Setting(target.of(cfg, params, read), rules, prompts)
    plain = loop.Plain()
    state = generation.started(setting, cache, slots, plain.begin(setting))
    state = loop.run(setting, plain, acceptance.Exact(), state)
    result = generation.written(state, prompts, shape.length, jnp.float32(0))
    return jax.tree.map(lambda x: jax.reshard(x, P()), result)


def as_rows(states, placed: model.Given):
    """The states of the first text as rows [layers + 1 s d], as many as the mesh can split (the
    last repeated), and which places of the text exist [s]."""
    first = jax.reshard(states, P())[:, 0]
    shards = sharding.batch_shards()
    missing = -len(first) % shards
    first = jnp.concatenate([first, jnp.repeat(first[-1:], missing, axis=0)])
    exists = jnp.arange(first.shape[1]) < jax.reshard(placed.inputs_length, P())[0]
    return jax.reshard(first, sharding.spec("batch length width")), exists
