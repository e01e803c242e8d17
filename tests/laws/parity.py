# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders of transformers beside ours: the same weights, the same ids, both results."""

import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from decoder_parity import State, cache_argument, ours, state_of
from safetensors.numpy import save_file

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.checkpoints.formats import huggingface, safetensors_files

INPUTS, TARGETS = 13, 9


class Pair(NamedTuple):
    """A model of transformers and ours, loaded from the files that it saved.

    Attributes:
      theirs: the model of transformers.
      family: module of the conversion of its family.
      cfg: architecture of ours.
      params: weights of ours.
    """

    theirs: torch.nn.Module
    family: ModuleType
    cfg: config.Model
    params: dict


class Ids(NamedTuple):
    """Token ids of a parity test.

    Attributes:
      inputs: [b s] ids of the encoder.
      exists: [b s] False for padding, which is on both sides.
      decoder: [b t] decoder inputs.
    """

    inputs: np.ndarray
    exists: np.ndarray
    decoder: np.ndarray


def shaken(theirs: torch.nn.Module, seed: int) -> torch.nn.Module:
    """theirs with every weight drawn anew, norms and biases away from where they begin."""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in theirs.named_parameters():
        noise = torch.randn(weight.shape, generator=draw)
        with torch.no_grad():
            if weight.ndim == 1:
                weight.add_(0.3 * noise)
            else:
                table = "embed_tokens" in name or "shared" in name or "relative" in name
                weight.copy_(noise * (1.0 if table else weight.shape[-1] ** -0.5))
    return theirs.eval()


def read(theirs: torch.nn.Module, folder: Path) -> Pair:
    """Ours of the folder that theirs is saved in."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    theirs.save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    source, family = (
        safetensors_files.open_safetensors(folder),
        huggingface.family_of_config(described),
    )
    cfg = family.parse_config(described, source.names)
    cfg = dataclasses.replace(cfg, dtype="float32", dropout=0.0)
    return Pair(theirs, family, cfg, ours(source, cfg, family))


def drawn_ids(vocab: int, start: int, seed: int, rows: int = 3) -> Ids:
    """Random ids in rows padded left, right and not at all.

    Args:
      vocab: size of the vocabulary; ids are drawn from 3 on, as no family gives those a meaning.
      start: start token of the decoder.
      seed: seed of the draw.
      rows: number of rows.
    """
    draw = np.random.default_rng(seed)
    place = np.arange(INPUTS)
    begins, ends = [3, 0, 0], [INPUTS, INPUTS - 4, INPUTS]
    exists = np.stack([(place >= begins[i]) & (place < ends[i]) for i in range(rows)])
    inputs = np.where(exists, draw.integers(3, vocab, (rows, INPUTS)), 0).astype(np.int32)
    decoder = draw.integers(3, vocab, (rows, TARGETS)).astype(np.int32)
    decoder[:, 0] = start
    return Ids(inputs, exists, decoder)


def their_results(theirs, ids: Ids) -> tuple[np.ndarray, np.ndarray]:
    """Encoder output [b s d] and logits [b t v], in one pass."""
    with torch.no_grad():
        out = theirs(**their_inputs(ids), decoder_input_ids=tensor(ids.decoder), use_cache=False)
    return out.encoder_last_hidden_state.numpy(), out.logits.numpy()


def their_cached_logits(theirs, ids: Ids) -> np.ndarray:
    """Logits [b t v], token by token over a cache."""
    cache, logits = None, []
    with torch.no_grad():
        encoded = theirs.get_encoder()(**their_inputs(ids))
        for i in range(ids.decoder.shape[1]):
            out = theirs(
                encoder_outputs=encoded,
                attention_mask=tensor(ids.exists),
                decoder_input_ids=tensor(ids.decoder[:, i : i + 1]),
                use_cache=True,
                **cache_argument(theirs, cache),
            )
            cache = out.past_key_values
            logits.append(out.logits.numpy())
    return np.concatenate(logits, axis=1)


def their_inputs(ids: Ids) -> dict:
    """Keyword arguments of an encoder of transformers."""
    return {"input_ids": tensor(ids.inputs), "attention_mask": tensor(ids.exists)}


def tensor(array: np.ndarray) -> torch.Tensor:
    """A numpy array as a torch tensor of int64."""
    return torch.from_numpy(np.array(array)).long()


def our_results(pair: Pair, ids: Ids) -> tuple[np.ndarray, np.ndarray]:
    """Encoder output [b s d] and logits [b t v], teacher-forced."""
    cfg = cfg_from(pair.cfg, ids)

    def both(params, batch):
        read = batch.inputs, batch.input_segments, batch.input_positions
        return apply(cfg, params, *read, method=model.Transformer.encode), apply(cfg, params, batch)

    encoded, logits = jax.jit(both)(pair.params, batch_of(ids))
    return np.asarray(encoded), np.asarray(logits)


def our_cached_logits(pair: Pair, ids: Ids) -> np.ndarray:
    """Logits [b t v], token by token over a cache with room to spare."""
    cfg, rows = pair.cfg, ids.decoder.shape[0]

    def begin(params, batch):
        read = batch.inputs, batch.input_segments, batch.input_positions
        return apply(
            cfg,
            params,
            apply(cfg, params, *read, method=model.Transformer.encode),
            method=model.Transformer.cross_kv,
        )

    def step(params, tokens, index, cache, read):
        block = model.TokenBlock(tokens, index)
        hidden, cache = apply(cfg, params, block, cache, read, method=model.Transformer.decode)
        return apply(cfg, params, hidden, method=model.Transformer.logits), cache

    read = model.EncoderMemory(jax.jit(begin)(pair.params, batch_of(ids)), jnp.asarray(ids.exists))
    cache, logits = model.empty_cache(cfg, rows, TARGETS + 2), []
    step = jax.jit(step)
    for i in range(ids.decoder.shape[1]):
        index = jnp.full((rows,), i, jnp.int32)
        step_logits, cache = step(pair.params, ids.decoder[:, i : i + 1], index, cache, read)
        logits.append(np.asarray(step_logits))
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


def cfg_from(cfg: config.Model, ids: Ids) -> config.Model:
    """cfg with the start token of ids."""
    return dataclasses.replace(cfg, decoder_start_token_id=int(ids.decoder[0, 0]))


def batch_of(ids: Ids) -> Batch:
    """ids as a training batch: the targets are the decoder's inputs one place earlier."""
    targets = np.roll(ids.decoder, -1, axis=1)
    ones = np.ones_like(targets)
    where = positions(targets)
    weights = ones.astype(np.float32)
    exists = ids.exists.astype(np.int32)
    batch = Batch(targets, ones, where, weights, ids.inputs, exists, positions(ids.inputs))
    return sharding.place_batch(batch)


def positions(ids: np.ndarray) -> np.ndarray:
    """Positions [b t], from 0 in each row."""
    return np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)


def assert_alike(pair: Pair, ids: Ids) -> None:
    """Encoder outputs, teacher-forced logits and cached logits agree to 1e-4 where tokens are."""
    encoded, logits = their_results(pair.theirs, ids)
    our_encoded, our_logits = our_results(pair, ids)
    np.testing.assert_allclose(our_encoded[ids.exists], encoded[ids.exists], atol=1e-4, rtol=0)
    np.testing.assert_allclose(our_logits, logits, atol=1e-4, rtol=0)
    cached = their_cached_logits(pair.theirs, ids)
    np.testing.assert_allclose(our_cached_logits(pair, ids), cached, atol=1e-4, rtol=0)


def assert_gradients_alike(pair: Pair, ids: Ids) -> None:
    """The gradient of the mean cross-entropy, weight by weight, within 1e-3 of its largest."""
    batch = batch_of(ids)
    labels = tensor(np.asarray(batch.targets))
    out = pair.theirs(**their_inputs(ids), decoder_input_ids=tensor(ids.decoder), use_cache=False)
    torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten()).backward()
    expected = ours(State(their_gradients(pair.theirs)), pair.cfg, pair.family)

    def loss(params):
        logits = apply(cfg_from(pair.cfg, ids), params, batch)
        chosen = jnp.sum(
            jax.nn.log_softmax(logits) * jax.nn.one_hot(batch.targets, pair.cfg.vocab), -1
        )
        return -jnp.mean(chosen)

    actual = jax.jit(jax.grad(loss))(pair.params)
    jax.tree.map_with_path(assert_gradient_alike, actual, expected)


def their_gradients(theirs: torch.nn.Module) -> dict[str, np.ndarray]:
    """Gradients under the names that the weights have in a file; each tied weight once."""
    return {
        name.replace(".text_model.", "."): weight.grad.numpy()
        for name, weight in theirs.named_parameters()
        if weight.grad is not None
    }


def assert_gradient_alike(path, actual, expected) -> None:
    """Checks a gradient within 1e-3 of its largest entry.

    Args:
      path: key path of the weight.
      actual: our gradient.
      expected: their gradient.
    """
    scale = np.abs(expected).max()
    assert np.abs(np.asarray(actual) - expected).max() <= 1e-3 * scale, jax.tree_util.keystr(path)


def assert_there_and_back(pair: Pair, kind: type, folder: Path, without: str = "") -> None:
    """Checks that transformers loads our export bit by bit, without missing or unexpected tensors.

    Args:
      pair: both models.
      kind: class of the model in transformers.
      folder: folder to write.
      without: regular expression of names that ours lacks.
    """
    state = state_of(pair.params, pair.cfg, pair.family)
    described = pair.family.config_json(pair.cfg)
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described))
    loaded, loading = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)

    def left_out(name):
        return without and re.match(without, name)

    assert [name for name in loading["missing_keys"] if not left_out(name)] == []
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"], loading
    again = loaded.state_dict()
    for name, weight in pair.theirs.state_dict().items():
        if not left_out(name):
            np.testing.assert_array_equal(again[name].numpy(), weight.numpy(), err_msg=name)
    cfg = pair.family.parse_config(described, state)
    assert dataclasses.replace(cfg, dtype="float32") == pair.cfg
    jax.tree.map(np.testing.assert_array_equal, ours(State(state), cfg, pair.family), pair.params)
