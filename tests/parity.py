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
from t5x_lite.conversion import huggingface, sources

INPUTS, TARGETS = 13, 9


class Pair(NamedTuple):
    """A model of transformers, the family that reads it, and ours made of the files it wrote."""

    theirs: torch.nn.Module
    family: ModuleType
    cfg: config.Model
    params: dict


class Ids(NamedTuple):
    """Inputs [b s], which of them exist (padded on both sides), and decoder inputs [b t]."""

    inputs: np.ndarray
    seen: np.ndarray
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
    source, family = sources.open(folder), huggingface.family_of(described)
    cfg = family.model(described, source.names)
    cfg = dataclasses.replace(cfg, activations="float32", dropout=0.0)
    return Pair(theirs, family, cfg, ours(source, cfg, family))


def drawn_ids(vocab: int, start: int, seed: int, rows: int = 3) -> Ids:
    """Rows padded left, right and not at all; ids from 3 on, which no family gives a meaning."""
    draw = np.random.default_rng(seed)
    place = np.arange(INPUTS)
    begins, ends = [3, 0, 0], [INPUTS, INPUTS - 4, INPUTS]
    seen = np.stack([(place >= begins[i]) & (place < ends[i]) for i in range(rows)])
    inputs = np.where(seen, draw.integers(3, vocab, (rows, INPUTS)), 0).astype(np.int32)
    decoder = draw.integers(3, vocab, (rows, TARGETS)).astype(np.int32)
    decoder[:, 0] = start
    return Ids(inputs, seen, decoder)


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
                attention_mask=tensor(ids.seen),
                decoder_input_ids=tensor(ids.decoder[:, i : i + 1]),
                use_cache=True,
                **cache_argument(theirs, cache),
            )
            cache = out.past_key_values
            logits.append(out.logits.numpy())
    return np.concatenate(logits, axis=1)


def their_inputs(ids: Ids) -> dict:
    return {"input_ids": tensor(ids.inputs), "attention_mask": tensor(ids.seen)}


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).long()


def our_results(pair: Pair, ids: Ids) -> tuple[np.ndarray, np.ndarray]:
    """Encoder output [b s d] and logits [b t v], teacher-forced."""
    cfg = cfg_from(pair.cfg, ids)

    def both(params, batch):
        read = batch.inputs, batch.input_segments, batch.input_positions
        return apply(cfg, params, *read, method="encode"), apply(cfg, params, batch)

    encoded, logits = jax.jit(both)(pair.params, batch_of(ids))
    return np.asarray(encoded), np.asarray(logits)


def our_cached_logits(pair: Pair, ids: Ids) -> np.ndarray:
    """Logits [b t v], token by token over a cache with room to spare."""
    cfg, rows = pair.cfg, ids.decoder.shape[0]

    def begin(params, batch):
        read = batch.inputs, batch.input_segments, batch.input_positions
        return apply(cfg, params, apply(cfg, params, *read, method="encode"), method="crossed")

    def step(params, tokens, index, cache, read):
        block = model.Block(tokens, index)
        hidden, cache = apply(cfg, params, block, cache, read, method="decode")
        return apply(cfg, params, hidden, method="logits"), cache

    read = model.Read(jax.jit(begin)(pair.params, batch_of(ids)), jnp.asarray(ids.seen))
    cache, logits = model.empty_cache(cfg, rows, TARGETS + 2), []
    step = jax.jit(step)
    for i in range(ids.decoder.shape[1]):
        index = jnp.full((rows,), i, jnp.int32)
        given, cache = step(pair.params, ids.decoder[:, i : i + 1], index, cache, read)
        logits.append(np.asarray(given))
    return np.concatenate(logits, axis=1)


def apply(cfg: config.Model, params, *args, **kwargs):
    return model.Transformer(cfg).apply({"params": params}, *args, **kwargs)


def cfg_from(cfg: config.Model, ids: Ids) -> config.Model:
    return dataclasses.replace(cfg, start=int(ids.decoder[0, 0]))


def batch_of(ids: Ids) -> Batch:
    """ids as a training batch: the targets are the decoder's inputs one place earlier."""
    targets = np.roll(ids.decoder, -1, axis=1)
    ones = np.ones_like(targets)
    where = positions(targets)
    weights = ones.astype(np.float32)
    seen = ids.seen.astype(np.int32)
    made = Batch(targets, ones, where, weights, ids.inputs, seen, positions(ids.inputs))
    return sharding.place_batch(made)


def positions(ids: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)


def assert_alike(pair: Pair, ids: Ids) -> None:
    """Encoder outputs, teacher-forced logits and cached logits agree to 1e-4 where tokens are."""
    encoded, logits = their_results(pair.theirs, ids)
    our_encoded, our_logits = our_results(pair, ids)
    np.testing.assert_allclose(our_encoded[ids.seen], encoded[ids.seen], atol=1e-4, rtol=0)
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

    given = jax.jit(jax.grad(loss))(pair.params)
    jax.tree.map_with_path(assert_gradient_alike, given, expected)


def their_gradients(theirs: torch.nn.Module) -> dict[str, np.ndarray]:
    """Gradients under the names that the weights have in a file; each tied weight once."""
    return {
        name.replace(".text_model.", "."): weight.grad.numpy()
        for name, weight in theirs.named_parameters()
        if weight.grad is not None
    }


def assert_gradient_alike(path, given, expected) -> None:
    scale = np.abs(expected).max()
    assert np.abs(np.asarray(given) - expected).max() <= 1e-3 * scale, jax.tree_util.keystr(path)


def assert_there_and_back(pair: Pair, kind: type, folder: Path, without: str = "") -> None:
    """Ours written as theirs loads without a missing or unexpected tensor, all bits the same.

    `without` are names, as a regular expression, that ours does not have.
    """
    state = state_of(pair.params, pair.cfg, pair.family)
    described = pair.family.config_json(pair.cfg)
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described))
    loaded, told = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    left_out = lambda name: without and re.match(without, name)
    assert [name for name in told["missing_keys"] if not left_out(name)] == []
    assert not told["unexpected_keys"] and not told["mismatched_keys"], told
    again = loaded.state_dict()
    for name, weight in pair.theirs.state_dict().items():
        if not left_out(name):
            np.testing.assert_array_equal(again[name].numpy(), weight.numpy(), err_msg=name)
    cfg = pair.family.model(described, state)
    assert dataclasses.replace(cfg, activations="float32") == pair.cfg
    jax.tree.map(np.testing.assert_array_equal, ours(State(state), cfg, pair.family), pair.params)
