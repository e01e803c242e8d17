# SPDX-License-Identifier: Apache-2.0
"""Programs that are planned for: a training step, and one step of the decoding loop."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from t5x_lite import config, decoding, model, sharding
from t5x_lite.checkpoints import train_state
from t5x_lite.config.training_run import TrainingRun, require_training
from t5x_lite.decoding import sampling, target
from t5x_lite.model import quantization
from t5x_lite.model.computation import cast_params
from t5x_lite.planning import aot
from t5x_lite.training import frozen_base, setup
from t5x_lite.training.flops import batch_rows, row_lengths, run_flops
from t5x_lite.utils.not_none import not_none

# Kind of memory.
REFERENCE = "reference weights"


class Decoding(NamedTuple):
    """Size of a decode step.

    Attributes:
      rows: rows at once.
      length: new tokens of each.
      inputs: ids of an input; None for Data.lengths.
      quantize: format of the layers' matrices, as "int8"; None for the dtype of activations.
    """

    rows: int
    length: int
    inputs: int | None = None
    quantize: str | None = None


class Step(NamedTuple):
    """A traced program.

    Attributes:
      trace: jax's trace of it.
      kinds: bytes that one chip holds of each kind of argument.
      tokens: of one run, all chips together.
      model_flops: FLOPs that the model needs for one run, all chips together.
      resident: bytes that one chip holds beside the program's arguments, for another program.
    """

    trace: Any
    kinds: dict[str, int]
    tokens: int
    model_flops: int
    resident: int = 0


def training(run: config.Run, devices: list) -> Step:
    """Traces the training step of a run for devices, which need not be there.

    Raises:
      ValueError: the run does not train, or what `setup.assemble_run` would refuse without the
        data.
    """
    run = require_training(run)
    sharding.use_mesh(run.mesh, devices)
    setup.check_batch(run.train)
    setup.check_lengths(run, sharding.context_size())
    shapes = aot.abstract_state(run)
    frozen = base_bytes(run)
    kinds = {
        "parameters": train_state.bytes_per_device(shapes.params),
        **frozen,
        "optimizer state": train_state.bytes_per_device(shapes.optimizer),
        "batch": train_state.bytes_per_device(aot.abstract_batch(run)),
    }
    tokens = batch_rows(run) * sum(row_lengths(run.model.batch_layout, run.data.lengths))
    # Samples are scored by a program of their own.
    resident = 0 if run.grpo is None else frozen.get(REFERENCE, 0)
    return Step(aot.trace_step(run, devices), kinds, tokens, run_flops(run), resident)


def base_bytes(run: TrainingRun) -> dict[str, int]:
    """Bytes of frozen weights on a chip: those under adapters, and a reference model's."""
    trees = {"frozen weights": frozen_base.base_shapes(run), REFERENCE: aot.reference_shapes(run)}
    return {
        name: train_state.bytes_per_device(tree) for name, tree in trees.items() if tree is not None
    }


def decode(run: config.Run, devices: list, size: Decoding) -> Step:
    """Traces one step of plain decoding: a token for every row, over a cache of all slots.

    Args:
      run: config of the run.
      devices: to decode on, which need not be there.
      size: rows and new tokens.

    Raises:
      ValueError: the model has no decoder, or the mesh cannot split the rows.
    """
    cfg = require_decoder(run.model, "--decode")
    sharding.use_mesh(run.mesh, devices)
    if size.rows % sharding.batch_shards():
        raise ValueError(
            f"--decode_rows={size.rows} cannot be split over {sharding.batch_shards()} parts of "
            "the mesh (data x fsdp): choose a multiple, or fewer parts"
        )
    params = decode_weights(cfg, size.quantize)
    encoded, row, cache, slots = decode_arguments(run, params, size)
    kinds = {
        "parameters": train_state.bytes_per_device(params),
        "cache": train_state.bytes_per_device((cache, encoded.cross_kv)),
    }
    inputs = 0 if encoded.input_mask is None else encoded.input_mask.shape[1]
    trace = decode_step(cfg).trace(params, encoded, row, row, cache)
    return Step(trace, kinds, size.rows, size.rows * token_flops(cfg, inputs, slots))


def decode_step(cfg: config.Model):
    """Jitted step of plain decoding for a token of every row: the forward pass over the cache
    (which is donated), the logits, and the choice."""

    def once(params, encoded, tokens, index, cache):
        transformer = target.make_target(cfg, params, encoded)
        hidden, cache = transformer.forward(tokens[:, None], index, cache)
        chosen = sampling.choose_tokens(transformer.logits(hidden), index[:, None] + 1, None)
        return chosen[:, 0], cache

    return jax.jit(once, donate_argnums=4)


def require_decoder(cfg: config.Model, option: str) -> config.Model:
    """The model, which has a decoder.

    Args:
      cfg: the model.
      option: of the command line, for the message.

    Raises:
      ValueError: it has none.
    """
    if cfg.decoder is None:
        raise ValueError(f"An encoder alone decodes nothing: {option} needs a model with a decoder")
    return cfg


def weight_shapes(cfg: config.Model, quantize: str | None = None) -> Any:
    """Shapes of stacked weights in the formats of decoding.

    Args:
      cfg: the model.
      quantize: format of the layers' matrices; None for the dtype of activations.

    Raises:
      ValueError: there is no such format, or its groups do not divide a fan-in.
    """

    def prepare(params: Any) -> Any:
        if quantize is not None:
            kind = quantization.parse_quantization(quantize)
            params = quantization.quantize_params(params, kind)
        return cast_params(params, cfg.dtype)

    return jax.eval_shape(prepare, model.shapes(cfg))


def decode_weights(cfg: config.Model, quantize: str | None = None) -> Any:
    """`weight_shapes` as decoding reads them, layer by layer."""
    return place_shapes(jax.eval_shape(model.unstack, weight_shapes(cfg, quantize)))


def decode_arguments(run: config.Run, params: Any, size: Decoding):
    """Shapes of a decode step's arguments.

    Args:
      run: config of the run.
      params: shapes of the weights.
      size: rows and new tokens.

    Returns:
      Shapes of the encoded inputs, of an integer per row [rows], and of the cache; and the number
      of the cache's slots, for the prompt and the new tokens.
    """
    cfg = run.model
    row = jax.ShapeDtypeStruct((size.rows,), jnp.int32, sharding=sharding.named_sharding("batch"))
    lengths, encoded, prompt = run.data.lengths if run.data else {}, model.EncoderMemory(), 1
    if cfg.encoder is not None:
        length = decoding.bucket_length(size.inputs or lengths.get("inputs", 512))
        inputs = jax.ShapeDtypeStruct(
            (size.rows, length), jnp.int32, sharding=sharding.named_sharding("batch length")
        )
        encode = functools.partial(target.encode_inputs, cfg)
        encoded = place_shapes(jax.eval_shape(encode, params, inputs, row))
    else:
        prompt = decoding.bucket_length(size.inputs or lengths.get("inputs", 1))
    slots = prompt + new_slots(size.length)
    cache = jax.eval_shape(lambda: model.empty_cache(cfg, size.rows, slots, scan=False))
    return encoded, row, place_shapes(cache), slots


def new_slots(length: int) -> int:
    """Cache slots for so many new tokens: those of a bucket, and one for the last."""
    return decoding.bucket_length(length) + 1


def place_shapes(shapes: Any) -> Any:
    """Shapes with the placement of their types."""
    mesh = jax.sharding.get_mesh()

    def place(leaf):
        spec = leaf.sharding.spec if leaf.sharding else jax.sharding.PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes)


def token_flops(cfg: config.Model, inputs: int, slots: int) -> int:
    """Floating-point operations of one new token: two per weight of the decoder and of the table
    of logits, and attention over every slot and input.

    Args:
      cfg: the model.
      inputs: number of encoded inputs.
      slots: of the cache.
    """
    stack = not_none(cfg.decoder)
    projections = 2 * stack.heads + 2 * stack.key_heads
    if inputs and not stack.merged:
        # Keys and values of the inputs were made when they were read.
        projections += 2 * stack.heads
    weights = stack.embed * (stack.head_dim * projections + stack.mlp * (2 + stack.gated))
    scores = 2 * stack.heads * stack.head_dim * (slots + inputs)
    return 2 * (stack.layers * (weights + scores) + stack.embed * cfg.vocab)
