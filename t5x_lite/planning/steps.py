# SPDX-License-Identifier: Apache-2.0
"""The programs that are planned for: a training step, and one turn of the decoding loop."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from t5x_lite import config, decoding, model, sharding
from t5x_lite.decoding import sampling, target
from t5x_lite.training import ahead, costs, setup, state


class Decoding(NamedTuple):
    """What is decoded: rows at once, and new tokens of each; inputs are Data.lengths long."""

    rows: int
    length: int


class Step(NamedTuple):
    """A traced program, the bytes that one chip holds of each kind of argument, and what one run of
    it does on all chips: tokens, and FLOPs that the model needs."""

    trace: Any
    kinds: dict[str, int]
    tokens: int
    model_flops: int


def training(run: config.Run, devices: list) -> Step:
    """The training step of run for devices, which need not be there.

    Raises:
      ValueError: what `setup.assemble` would refuse without looking at the data.
    """
    sharding.use_mesh(run.mesh, devices)
    setup.check_batch(run.train)
    setup.check_lengths(run, sharding.context_size())
    shapes = ahead.abstract_state(run)
    kinds = {
        "parameters": state.size_per_device(shapes.params),
        "optimizer state": state.size_per_device(shapes.optimizer),
        "batch": state.size_per_device(ahead.abstract_batch(run)),
    }
    rows, lengths = run.train.batch_size, run.data.lengths
    tokens = rows * sum(costs.row_lengths(run.model.layout, lengths))
    flops = costs.step_flops(run.model, rows, lengths)
    return Step(ahead.traced(run, devices), kinds, tokens, flops)


def decode(run: config.Run, devices: list, how: Decoding) -> Step:
    """One turn of plain decoding for devices: a token for every row, over a cache of all slots.

    Raises:
      ValueError: the model has no decoder, or the mesh cannot split the rows.
    """
    if run.model.decoder is None:
        raise ValueError("An encoder alone decodes nothing: --decode needs a model with a decoder")
    sharding.use_mesh(run.mesh, devices)
    if how.rows % sharding.batch_shards():
        raise ValueError(
            f"--decode_rows={how.rows} cannot be split over {sharding.batch_shards()} parts of the "
            "mesh (data x fsdp): choose a multiple, or fewer parts"
        )
    cfg = run.model
    params = unstacked(cfg)
    read, row, cache, slots = arguments(run, params, how)
    kinds = {
        "parameters": state.size_per_device(params),
        "cache": state.size_per_device((cache, read.crossed)),
    }
    inputs = 0 if read.seen is None else read.seen.shape[1]
    trace = turn(cfg).trace(params, read, row, row, cache)
    return Step(trace, kinds, how.rows, how.rows * token_flops(cfg, inputs, slots))


def turn(cfg: config.Model):
    """What plain decoding does for a token of every row, jitted: the forward pass over the cache
    (which it takes over), the logits, and the choice."""

    def once(params, read, tokens, index, cache):
        transformer = target.of(cfg, params, read)
        hidden, cache = transformer.forward(tokens[:, None], index, cache)
        chosen = sampling.choose(transformer.logits(hidden), index[:, None] + 1, None)
        return chosen[:, 0], cache

    return jax.jit(once, donate_argnums=4)


def unstacked(cfg: config.Model) -> Any:
    """The shapes of weights as decoding reads them: layer by layer, in the dtype of activations."""
    narrow = lambda weight: weight.astype(cfg.activations)
    prepared = lambda params: model.unstack(jax.tree.map(narrow, params))
    return placed(jax.eval_shape(prepared, model.shapes(cfg)))


def arguments(run: config.Run, params: Any, how: Decoding):
    """Shapes of what was read of the inputs, of a number for each row, and of the cache; and how
    many slots this has: the prompt, and what is written."""
    cfg = run.model
    row = jax.ShapeDtypeStruct((how.rows,), jnp.int32, sharding=sharding.named("batch"))
    lengths, read, prompt = run.data.lengths if run.data else {}, model.Read(), 1
    if cfg.encoder is not None:
        length = decoding.bucket(lengths.get("inputs", 512))
        inputs = jax.ShapeDtypeStruct(
            (how.rows, length), jnp.int32, sharding=sharding.named("batch length")
        )
        reading = lambda params, inputs, length: target.read(cfg, params, inputs, length)
        read = placed(jax.eval_shape(reading, params, inputs, row))
    else:
        prompt = decoding.bucket(lengths.get("inputs", 1))
    slots = prompt + decoding.bucket(how.length) + 1
    cache = placed(jax.eval_shape(lambda: model.empty_cache(cfg, how.rows, slots, scan=False)))
    return read, row, cache, slots


def placed(shapes: Any) -> Any:
    """shapes with the placement that their types tell."""
    mesh = jax.sharding.get_mesh()

    def place(leaf):
        spec = leaf.sharding.spec if leaf.sharding else jax.sharding.PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes)


def token_flops(cfg: config.Model, inputs: int, slots: int) -> int:
    """Floating-point operations of one new token: two per weight of the decoder and of the table
    of logits, and attention over every slot and input."""
    stack = cfg.decoder
    projections = 2 * stack.heads + 2 * stack.key_heads
    if inputs and not stack.merged:
        # Keys and values of the inputs were made when they were read.
        projections += 2 * stack.heads
    weights = stack.embed * (stack.head_dim * projections + stack.mlp * (2 + stack.gated))
    scores = 2 * stack.heads * stack.head_dim * (slots + inputs)
    return 2 * (stack.layers * (weights + scores) + stack.embed * cfg.vocab)
