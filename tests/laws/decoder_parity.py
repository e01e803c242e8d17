# SPDX-License-Identifier: Apache-2.0
"""Lone decoders of transformers beside ours: the same weights, the same ids, both results."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.checkpoints import matching, tensors, transforms, weights
from t5x_lite.checkpoints.formats import huggingface, safetensors_files
from t5x_lite.checkpoints.weight_paths import flatten_tree

LENGTH = 11
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]


class Pair(NamedTuple):
    """A model of transformers and ours, loaded from the files that it saved.

    Attributes:
      theirs: the model of transformers.
      family: module of the conversion of its family.
      cfg: architecture of ours.
      params: weights of ours.
    """

    theirs: torch.nn.Module
    family: object
    cfg: config.Model
    params: dict


class Ids(NamedTuple):
    """Tokens [b t], and which of them exist: rows padded on the left, on the right, not at all."""

    tokens: np.ndarray
    exists: np.ndarray


class State:
    """Tensors in memory, read as if they lay in a file."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self.names = {name: (array.shape, array.dtype) for name, array in arrays.items()}

    def read(self, name, at=None):
        return self.arrays[name]


def cache_argument(theirs, cache) -> dict:
    """The cache as the keyword that `theirs.forward` takes: transformers 5.24 renamed it."""
    renamed = "cache" in inspect.signature(theirs.forward).parameters
    return {"cache" if renamed else "past_key_values": cache}


def drawn_sizes(seed: int) -> dict:
    """Sizes that have little to do with one another, under Llama's names in config.json."""
    draw = np.random.default_rng(seed)
    heads = int(draw.choice([2, 3, 5, 6]))
    key_heads = int(draw.choice([count for count in range(1, heads + 1) if heads % count == 0]))
    return dict(
        vocab_size=int(draw.integers(30, 60)),
        # transformers wants a multiple of the heads, also where head_dim is another.
        hidden_size=heads * int(draw.integers(4, 8)),
        intermediate_size=int(draw.integers(10, 40)),
        num_hidden_layers=int(draw.integers(2, 4)),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=2 * int(draw.integers(2, 7)),
    )


def drawn(described: transformers.PreTrainedConfig, seed: int, folder: Path) -> Pair:
    """A model with random weights, norms and biases included, and ours from its saved folder.

    Args:
      described: its config.
      seed: seed of the weights.
      folder: folder to save it in.
    """
    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_config(described, attn_implementation="eager", dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in theirs.parameters():
            noise = torch.randn(weight.shape, generator=draw)
            weight.copy_(weight + 0.3 * noise if weight.ndim == 1 else 0.3 * noise)
    theirs.save_pretrained(folder)
    return read(theirs, folder)


def read(theirs: torch.nn.Module, folder: Path) -> Pair:
    """Ours of the folder that theirs is saved in."""
    described = json.loads((folder / "config.json").read_text())
    source = safetensors_files.open_safetensors(folder)
    family = huggingface.family_of_config(described)
    cfg = family.parse_config(described, source.names)
    cfg = dataclasses.replace(cfg, dtype="float32", dropout=0.0)
    return Pair(theirs, family, cfg, ours(source, cfg, family))


def ours(source, cfg: config.Model, family) -> dict:
    """Our params of the tensors in source on one device; every tensor has to be accounted for.

    Args:
      source: tensors under the names of transformers.
      cfg: architecture.
      family: module of the conversion of the family.
    """
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    source = tensors.rename_tensors(source, family)
    plan = matching.plan_conversion(
        source.names,
        cfg,
        family.entries(cfg),
        ignored=family.ignored(cfg),
        duplicates=family.duplicates(cfg),
    )
    plan.check("the source")
    weights.check_duplicates(source, plan, family.duplicates(cfg), lambda name: False)
    return weights.place_weights(
        weights.ConvertedWeights(source, cfg, plan, lambda name: False), cfg
    )


def state_of(params: dict, cfg: config.Model, family) -> dict[str, np.ndarray]:
    """Our params as tensors of transformers.

    Args:
      params: our weights.
      cfg: architecture.
      family: module of the conversion of the family.
    """
    state, flat = {}, flatten_tree(params, "/")
    for piece in matching.map_weights(cfg, family.entries(cfg), matching.model_leaves(cfg)):
        values = np.asarray(flat[piece.entry.ours])
        values = values if piece.layer is None else values[piece.layer]
        array = state.setdefault(piece.theirs, np.zeros(piece.tensor_shape, values.dtype))
        transforms.write_weight(array, piece.layer_entry, piece.axes, piece.sizes, values)
    return state


def drawn_ids(vocab: int, start: int, seed: int) -> Ids:
    """Three rows that begin with the start token: padded left, right, and not at all.

    Args:
      vocab: size of the vocabulary.
      start: id of the start token.
      seed: seed of the draw.
    """
    draw = np.random.default_rng(seed)
    exists = np.ones((3, LENGTH), bool)
    exists[0, :3] = False
    exists[1, -4:] = False
    tokens = np.where(exists, draw.integers(0, vocab, exists.shape), 0)
    tokens[[0, 1, 2], exists.argmax(axis=1)] = start
    return Ids(tokens.astype(np.int32), exists)


def ids_of(pair: Pair, seed: int) -> Ids:
    """Ids drawn for the models of a pair."""
    return drawn_ids(pair.cfg.vocab, pair.cfg.decoder_start_token_id, seed)


def where(ids: Ids) -> np.ndarray:
    """Positions [b t], 0 for padding."""
    return np.maximum(np.cumsum(ids.exists, axis=1) - 1, 0).astype(np.int32)


def inputs(ids: Ids, columns=slice(None)) -> dict:
    """Arguments of theirs for some columns of ids, with all before them in its cache."""

    def tensor(array):
        return torch.from_numpy(np.array(array)).long()

    exists = ids.exists if columns.stop is None else ids.exists[:, : columns.stop]
    return {
        "input_ids": tensor(ids.tokens[:, columns]),
        "position_ids": tensor(where(ids)[:, columns]),
        "attention_mask": tensor(exists),
    }


def their_logits(theirs: torch.nn.Module, ids: Ids) -> np.ndarray:
    """Logits [b t v], in one pass."""
    with torch.no_grad():
        return theirs(**inputs(ids), use_cache=False).logits.numpy()


def their_cached_logits(theirs: torch.nn.Module, ids: Ids) -> np.ndarray:
    """Logits [b t v], token by token over a cache."""
    cache, logits = None, []
    with torch.no_grad():
        for i in range(LENGTH):
            step_inputs = inputs(ids, slice(i, i + 1))
            out = theirs(**step_inputs, use_cache=True, **cache_argument(theirs, cache))
            cache = out.past_key_values
            logits.append(out.logits.numpy())
    return np.concatenate(logits, axis=1)


def apply(cfg: config.Model, params, *args, **kwargs):
    """Applies a method of our model.

    Args:
      cfg: architecture.
      params: weights.
      *args: arguments of the method.
      **kwargs: method, if it is not `__call__`, and its keyword arguments.
    """
    return model.Transformer(cfg).apply({"params": params}, *args, **kwargs)


def batch_of(ids: Ids) -> Batch:
    """ids as a training batch: its targets are the tokens one place earlier."""
    targets = np.roll(ids.tokens, -1, axis=1)
    predicted = ids.exists & np.pad(ids.exists[:, 1:], ((0, 0), (0, 1)))
    return Batch(targets, ids.exists.astype(np.int32), where(ids), predicted.astype(np.float32))


def our_logits(pair: Pair, ids: Ids) -> np.ndarray:
    """Logits [b t v], teacher-forced, with the padding of ids."""
    forward = jax.jit(lambda params, batch: apply(pair.cfg, params, batch))
    return np.asarray(forward(pair.params, batch_of(ids)))


def our_cached_logits(pair: Pair, ids: Ids) -> np.ndarray:
    """Logits [b t v], token by token over a cache with room to spare; rows begin at its slot 0."""
    cfg, rows = pair.cfg, len(ids.tokens)

    @jax.jit
    def step(params, tokens, index, cache):
        block = model.TokenBlock(tokens, index)
        hidden, cache = apply(cfg, params, block, cache, method=model.Transformer.decode)
        return apply(cfg, params, hidden, method=model.Transformer.logits), cache

    begins = ids.exists.argmax(axis=1)
    tokens = np.stack([np.roll(ids.tokens[b], -begins[b]) for b in range(rows)])
    cache, logits = model.empty_cache(cfg, rows, LENGTH + 2), []
    for i in range(LENGTH):
        index = jnp.full((rows,), i, jnp.int32)
        step_logits, cache = step(pair.params, tokens[:, i : i + 1], index, cache)
        logits.append(np.asarray(step_logits))
    aligned = np.concatenate(logits, axis=1)
    return np.stack([np.roll(aligned[b], begins[b], axis=0) for b in range(rows)])


def assert_alike(pair: Pair, ids: Ids) -> None:
    """Logits agree to 1e-4 wherever there are tokens, in one pass and token by token."""
    expected = their_logits(pair.theirs, ids)[ids.exists]
    assert np.ptp(expected) > 0.5, "logits too small for the comparison to mean anything"
    for actual in (our_logits(pair, ids), our_cached_logits(pair, ids)):
        np.testing.assert_allclose(actual[ids.exists], expected, atol=1e-4, rtol=0)
    cached = their_cached_logits(pair.theirs, ids)[ids.exists]
    np.testing.assert_allclose(cached, expected, atol=1e-4, rtol=0)


def assert_gradients_alike(pair: Pair, ids: Ids) -> None:
    """The gradient of the mean cross-entropy, weight by weight, within 1e-3 of its largest."""
    batch = batch_of(ids)
    predicted = torch.from_numpy(batch.loss_weights)
    logits = pair.theirs(**inputs(ids), use_cache=False).logits.flatten(0, 1)
    labels = torch.from_numpy(batch.targets).long().flatten()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (torch.sum(losses * predicted.flatten()) / predicted.sum()).backward()
    their_gradients = State({name: w.grad.numpy() for name, w in pair.theirs.named_parameters()})
    expected = ours(their_gradients, pair.cfg, pair.family)

    def loss(params):
        likely = jax.nn.log_softmax(apply(pair.cfg, params, batch))
        chosen = jnp.sum(likely * jax.nn.one_hot(batch.targets, pair.cfg.vocab), axis=-1)
        return -jnp.sum(chosen * batch.loss_weights) / jnp.sum(batch.loss_weights)

    actual = jax.jit(jax.grad(loss))(pair.params)
    # A bias of keys moves all scores of a query alike: its gradient is rounding errors only.
    floor = 1e-4 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))

    def compare(path, actual, expected):
        largest = max(np.abs(expected).max(), floor)
        worst = np.abs(np.asarray(actual) - np.asarray(expected)).max()
        assert worst <= 1e-3 * largest, jax.tree_util.keystr(path)

    jax.tree.map_with_path(compare, actual, expected)


def assert_there_and_back(pair: Pair, ids: Ids, folder: Path) -> None:
    """Checks that transformers loads our export bit by bit, and that it converts back to ours.

    Args:
      pair: both models.
      ids: ids whose logits are compared.
      folder: folder to write.
    """
    folder.mkdir()
    state = state_of(pair.params, pair.cfg, pair.family)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(pair.family.config_json(pair.cfg)))
    loaded, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    lacking = {
        name: loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    assert not any(lacking.values()), lacking
    assert type(loaded) is type(pair.theirs)
    again = loaded.state_dict()
    for name, weight in pair.theirs.state_dict().items():
        np.testing.assert_array_equal(again[name].numpy(), weight.numpy(), err_msg=name)
    before, after = (
        their_logits(theirs, ids)[ids.exists] for theirs in (pair.theirs, loaded.eval())
    )
    np.testing.assert_array_equal(after, before)
    back = read(loaded, folder)
    assert back.cfg == pair.cfg
    jax.tree.map(np.testing.assert_array_equal, back.params, pair.params)
