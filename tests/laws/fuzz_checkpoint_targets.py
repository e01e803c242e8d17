# SPDX-License-Identifier: Apache-2.0
"""Readers of checkpoints: Hugging Face's folders of every family, .gguf files, T5X's, our runs."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from conversion_toys import (
    GPT2,
    LLAMA,
    SMALL,
    T5,
    UMT5,
    Drawn,
    ignore_progress,
    write_hugging_face,
    write_ours,
    write_safetensors,
)
from flax import serialization
from fuzz_target import Target, refill, write_json

from t5x_lite import config, model
from t5x_lite.checkpoints import (
    checkpoint_io,
    manager,
    run_folder,
    selection,
    tensors,
    transfer,
)
from t5x_lite.checkpoints.formats import huggingface, t5x, t5x_files
from t5x_lite.checkpoints.formats.huggingface import sentence_t5
from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, open_checkpoint
from t5x_lite.checkpoints.weights import layer_numbers, place_arrays
from t5x_lite.utils import bounded_files

# Bytes of a shard: most families are written as several, with an index.
SHARD = 4000
SENTENCE_T5 = config.Model(
    vocab=40,
    encoder=config.Stack(layers=2, **SMALL),
    tied=True,
    readout=config.Readout("vector", "mean", normalize=True),
)


def change_decoder(cfg: config.Model, **changes: Any) -> config.Model:
    """A model whose stacks have other fields; those of Model are in `model`."""
    fields = changes.pop("model", {})
    decoder = dataclasses.replace(cfg.decoder, **changes)
    encoder = cfg.encoder and dataclasses.replace(cfg.encoder, **changes)
    return dataclasses.replace(cfg, encoder=encoder, decoder=decoder, **fields)


GEMMA = change_decoder(
    LLAMA, activation="gelu", norm="rms_plus_one", model=dict(tied=True, scale_embedding=True)
)
WINDOWS = dict(post_norms=True, pattern=("sliding", "full", "full"), window=8)
PAIR = dataclasses.replace(
    change_decoder(GEMMA, post_norms=True),
    encoder=dataclasses.replace(GEMMA.decoder, post_norms=True),
    decoder_start_token_id=2,
)
MERGED = dict(merged=True, qk_norm=True, rotary_base=1e6, sliding_rotary_base=1e4)
# By model_type; gemma3 is the text part of a file that has other parts too.
FAMILIES = {
    "t5": T5,
    "mt5": T5,
    "umt5": UMT5,
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": change_decoder(LLAMA, qkv_bias=True),
    "qwen3": change_decoder(LLAMA, qk_norm=True, model=dict(add_bos=False)),
    "gemma": GEMMA,
    "gemma2": change_decoder(GEMMA, softcap=50.0, **WINDOWS),
    "gemma3_text": change_decoder(
        GEMMA, qk_norm=True, rotary_base=1e6, sliding_rotary_base=1e4, **WINDOWS
    ),
    "t5gemma": dataclasses.replace(PAIR, separate_embeddings=True),
    "t5gemma2": change_decoder(PAIR, window_form="halved", **MERGED, **WINDOWS, model=dict(eoi=39)),
}


def read_weights(weights: Any) -> None:
    """Reads every weight of a checkpoint."""
    for path, leaf in weights.leaves.items():
        for layer in layer_numbers(leaf):
            np.asarray(weights.read(path, layer)).sum()


def of_family(name: str, limit: int = SHARD) -> Target:
    """A target for Hugging Face's folders of one family.

    Args:
      name: its model_type.
      limit: bytes of a file of weights.
    """
    cfg, family = FAMILIES[name], huggingface.family_module(name)

    def make(folder: Path) -> None:
        refill(folder, lambda new: write_hugging_face(new, family, cfg, Drawn(cfg), limit))
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | {"model_type": name}, indent=1))

    return Target(make, read_hugging_face)


def read_hugging_face(folder: Path) -> None:
    """Reads config and weights of a Hugging Face folder."""
    read_weights(tensors.open_hugging_face_tensors(folder).weights())


def make_gemma3(folder: Path) -> None:
    """Writes a Gemma 3 whose config.json has its text part inside."""
    of_family("gemma3_text").make(folder)
    text = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(whole))


def make_sentence_t5(folder: Path) -> None:
    """Writes a Sentence-T5 with its modules."""
    family = huggingface.family_module("t5")
    refill(folder, lambda new: write_hugging_face(new, family, SENTENCE_T5, Drawn(SENTENCE_T5)))
    readout = config.Readout("vector", "mean", normalize=True, project=4)
    projected = dataclasses.replace(SENTENCE_T5, readout=readout)
    for name, content in sentence_t5.export_files(projected).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    weight = np.ones((4, SMALL["embed"]), np.float32)
    write_safetensors(folder / "2_Dense" / "model.safetensors", {"linear.weight": weight})


def make_gguf(folder: Path) -> None:
    """Writes a GPT-2 as a .gguf file."""
    import gguf_toys

    drawn = gguf_toys.converted("gpt2", gguf_toys.draw("gpt2"))
    gguf_toys.write(folder / "toy.gguf", "gpt2", drawn)


def of_quantized(architecture: str) -> Target:
    """A target for quantized .gguf files of one architecture."""

    def make(folder: Path) -> None:
        import gguf
        import gguf_toys

        drawn = gguf_toys.converted(architecture, gguf_toys.draw(architecture))
        kind = gguf.GGMLQuantizationType.Q8_0
        gguf_toys.write(folder / "toy.gguf", architecture, drawn, kind)

    return Target(make, read_gguf)


def read_gguf(folder: Path) -> None:
    """Reads config and weights of a .gguf file."""
    from t5x_lite.checkpoints.formats import gguf

    read_weights(tensors.map_gguf_tensors(gguf.GgufTensors(folder / "toy.gguf")).weights())


def make_note(folder: Path) -> None:
    """Writes the metadata of a checkpoint without their checksum."""
    make_run(folder)
    path = folder / manager.FOLDER / "0" / checkpoint_io.METADATA
    values = json.loads(path.read_text())["note"]
    for each in folder.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    write_json(folder, note=values)


def read_note(folder: Path) -> None:
    """Reads metadata under a checksum that fits, and what a run and a reader take from them."""
    values = bounded_files.read_json_object(folder / "note.json")
    with tempfile.TemporaryDirectory() as scratch:
        step = Path(scratch, manager.FOLDER, "0")
        (step / "note").mkdir(parents=True)
        check = checkpoint_io.metadata_checksum(values)
        content = json.dumps({"note": values, "check": check})
        (step / checkpoint_io.METADATA).write_text(content)
        metadata = selection.readable_metadata(step.parent)
        if not metadata:
            raise ValueError("metadata are damaged")
        selection.best_step(metadata)
        checkpoint_io.stored_shapes(metadata[0], "params")
        run_folder.read_saved_run(step)


def make_t5x(folder: Path) -> None:
    """Writes a T5X checkpoint."""
    pieces = transfer.group_by_tensor(Drawn(T5), T5, t5x.entries_to_write(T5, True))
    names = transfer.describe_tensors(Drawn(T5), pieces, None)
    transfer.write_t5x(Drawn(T5), pieces, folder, names, 7, ignore_progress)


def t5x_tree(folder: Path) -> dict:
    """The weights of a T5X checkpoint, which is removed."""
    make_t5x(folder)
    source = t5x_files.T5XTensors(folder)
    tree: dict = {}
    for name in source.names:
        *above, last = name.split("/")
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = np.array(source.read(name))
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {"version": 3, "optimizer": {"target": tree}}


def make_t5x_inline(folder: Path) -> None:
    """Writes a T5X checkpoint with its weights in one msgpack file."""
    tree = t5x_tree(folder)
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


def make_t5x_orbax(folder: Path) -> None:
    """Writes a T5X checkpoint with OCDBT."""
    tree = t5x_tree(folder)["optimizer"]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as writer:
        writer.save(folder.absolute() / "state", args=ocp.args.PyTreeSave(tree))


def read_t5x(folder: Path) -> None:
    """Reads the weights of a T5X checkpoint."""
    source = t5x_files.T5XTensors(folder)
    for name in source.names:
        source.read(name).sum()
    read_weights(open_checkpoint(folder, options=WEIGHTS_ONLY).weights())


def make_run(folder: Path) -> None:
    """Writes a run folder."""
    refill(folder, lambda new: write_ours(new, T5, Drawn(T5)))


def read_run(folder: Path) -> None:
    """Reads weights, config and params of a run folder."""
    read_weights(run_folder.SavedWeights(folder))
    run = run_folder.read_run_config(folder)
    params, _ = manager.load_params(folder)
    place_arrays(model.shapes(run.model), params, folder)


TARGETS = {
    **{name: of_family(name) for name in FAMILIES},
    "llama_single": of_family("llama", 10**9),
    "gemma3": Target(make_gemma3, read_hugging_face),
    "sentence_t5": Target(make_sentence_t5, read_hugging_face),
    "gguf": Target(make_gguf, read_gguf),
    "gguf_llama": of_quantized("llama"),
    "gguf_gemma3": of_quantized("gemma3"),
    "t5x": Target(make_t5x, read_t5x),
    "t5x_inline": Target(make_t5x_inline, read_t5x),
    "t5x_orbax": Target(make_t5x_orbax, read_t5x),
    "run": Target(make_run, read_run),
    "note": Target(make_note, read_note, ("metadata",)),
}
