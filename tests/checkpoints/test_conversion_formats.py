# SPDX-License-Identifier: Apache-2.0
"""Laws of conversion between formats: there and back gives the same bits, whatever the layout."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tensorstore
from conversion_toys import (
    DTYPES,
    FAMILIES,
    GPT2,
    LLAMA,
    LONE,
    T5,
    UMT5,
    Drawn,
    assert_restores,
    assert_same,
    ignore_progress,
    write_hugging_face,
    write_ours,
)
from flax import serialization

from t5x_lite import config, sharding
from t5x_lite.checkpoints import matching, tensors, transfer, weights
from t5x_lite.checkpoints.checkpoint_io import DamagedCheckpointError
from t5x_lite.checkpoints.formats import huggingface, t5x, t5x_files
from t5x_lite.checkpoints.run_folder import SavedWeights
from t5x_lite.checkpoints.tensors import MappedTensors
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.tokenizers.errors import SourceError


@pytest.mark.parametrize(
    "name, dtype",
    [(name, "float32") for name in FAMILIES] + [("llama", "bfloat16"), ("gpt2", "float16")],
)
def test_hugging_face_there_and_back_is_bitwise(tmp_path, name, dtype):
    family, cfg = FAMILIES[name]
    drawn = Drawn(cfg, DTYPES[dtype])
    first = write_hugging_face(tmp_path / "first", family, cfg, drawn, limit=4000)
    opened = tensors.open_hugging_face_tensors(first)
    ours = write_ours(tmp_path / "ours", opened.model, opened.weights())
    assert_restores(ours, drawn)
    second = write_hugging_face(
        tmp_path / "second", family, opened.model, SavedWeights(ours), limit=4000
    )
    assert sorted(path.name for path in first.iterdir()) == sorted(
        path.name for path in second.iterdir()
    )
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_safetensors_reads_what_is_written(tmp_path):
    from safetensors import safe_open

    family, cfg = FAMILIES["llama"]
    drawn = Drawn(cfg)
    folder = write_hugging_face(tmp_path / "hf", family, cfg, drawn)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        got = file.get_tensor("model.layers.1.self_attn.o_proj.weight")
    wanted = drawn.read("decoder/layers/attention/out", 1).reshape(16, 8).T
    np.testing.assert_array_equal(got, wanted)


def test_load_places_weights_as_training_has_them(tmp_path):
    family, cfg = FAMILIES["llama"]
    drawn = Drawn(cfg, DTYPES["bfloat16"])
    opened = tensors.open_hugging_face_tensors(
        write_hugging_face(tmp_path / "hf", family, cfg, drawn)
    )
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    params = weights.place_weights(opened.weights(), opened.model)
    for path, leaf in flatten_tree(params, "/").items():
        assert leaf.dtype == np.float32 and leaf.sharding.mesh == jax.sharding.get_mesh()
        np.testing.assert_array_equal(np.asarray(leaf), drawn.arrays[path].astype(np.float32))


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scanned"])
@pytest.mark.parametrize(
    "cfg, dtype",
    [(T5, "float32"), (UMT5, "bfloat16"), (LONE, "float32")],
    ids=["t5", "umt5", "lone"],
)
def test_t5x_there_and_back_is_bitwise(tmp_path, cfg, scan, dtype):
    drawn = Drawn(cfg, DTYPES[dtype])
    to_t5x(tmp_path / "first", drawn, cfg, scan)
    opened = open_t5x(tmp_path / "first", cfg)
    ours = write_ours(tmp_path / "ours", cfg, opened.weights())
    assert_restores(ours, drawn)
    to_t5x(tmp_path / "second", SavedWeights(ours), cfg, scan)
    assert_same(open_t5x(tmp_path / "second", cfg).weights(), drawn)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def contents(folder):
    """Bytes of every file by path."""
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scanned"])
@pytest.mark.parametrize("cfg", [T5, UMT5, LONE], ids=["t5", "umt5", "decoder"])
def test_a_t5x_model_is_reported_by_its_shapes(tmp_path, cfg, scan):
    to_t5x(tmp_path / "made", Drawn(cfg), cfg, scan)
    model, assumed = t5x.infer_model(t5x_files.T5XTensors(tmp_path / "made").names)
    if scan:  # scalable_t5 has a bias in each layer
        towers = {
            name: stack and dataclasses.replace(stack, bias_per_layer=True)
            for name, stack in (("encoder", cfg.encoder), ("decoder", cfg.decoder))
        }
        cfg = dataclasses.replace(cfg, **towers)
    assert model == cfg and "gelu" in assumed


def test_a_bias_of_every_layer_is_not_taken_for_one_of_all(tmp_path):
    to_t5x(tmp_path / "made", Drawn(UMT5), UMT5, scan=True)
    with pytest.raises(SourceError, match="should both be (en|de)coder/bias"):
        write_ours(tmp_path / "ours", T5, open_t5x(tmp_path / "made", T5).weights())


def to_t5x(folder, source, cfg, scan):
    folder.mkdir()
    pieces = transfer.group_by_tensor(source, cfg, t5x.entries_to_write(cfg, scan))
    names = transfer.describe_tensors(source, pieces, None)
    transfer.write_t5x(source, pieces, folder, names, 7, ignore_progress)


def open_t5x(folder, cfg):
    source = t5x_files.T5XTensors(folder)
    return MappedTensors(folder, cfg, source, t5x.entries_to_read(cfg, source.names))


def as_t5x_writes(folder, drawn: Drawn, kind: str):
    """A checkpoint_7 of examples/t5 made with TensorStore and flax alone, after checkpoints.py.

    Args:
      folder: parent of the checkpoint.
      drawn: the weights.
      kind: form of the leaves, as of `placed`.
    """
    folder = folder / "checkpoint_7"
    folder.mkdir(parents=True)
    flat = {
        "token_embedder/embedding": drawn.arrays["embedding"],
        "decoder/logits_dense/kernel": drawn.arrays["head"],
    }
    for tower, self_attention in (("encoder", "attention"), ("decoder", "self_attention")):
        flat[f"{tower}/{tower}_norm/scale"] = drawn.arrays[f"{tower}/norm"]
        flat[f"{tower}/relpos_bias/rel_embedding"] = drawn.arrays[f"{tower}/bias"].T
        crossed = {"encoder_decoder_attention": "cross_attention"} if tower == "decoder" else {}
        for layer in range(drawn.leaves[f"{tower}/layers/mlp/norm"].layers):
            block, take = (
                f"{tower}/layers_{layer}",
                lambda n, i=layer, t=tower: drawn.read(f"{t}/layers/{n}", i),
            )
            for theirs, ours in ({self_attention: "attention"} | crossed).items():
                for name in ("query", "key", "value"):
                    kernel = take(f"{ours}/{name}")
                    flat[f"{block}/{theirs}/{name}/kernel"] = kernel.reshape(len(kernel), -1)
                out = take(f"{ours}/out")
                flat[f"{block}/{theirs}/out/kernel"] = out.reshape(-1, out.shape[-1])
                norm = theirs.replace("encoder_decoder", "cross")
                flat[f"{block}/pre_{norm}_layer_norm/scale"] = take(f"{ours}/norm")
            flat[f"{block}/pre_mlp_layer_norm/scale"] = take("mlp/norm")
            for theirs, ours in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
                flat[f"{block}/mlp/{theirs}/kernel"] = take(f"mlp/{ours}")
    tree = {}
    for name, array in flat.items():
        leaf = placed(folder, "target." + name.replace("/", "."), array, kind)
        *above, last = name.split("/")
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    state = {"step": np.int32(7), "param_states": {"token_embedder": {"embedding": np.ones(3)}}}
    whole = {"version": 3, "optimizer": {"target": tree, "state": state}}
    if kind == "placeholder":
        whole = {"_optimizer": whole["optimizer"], "flax_mutables": None}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(whole))
    return folder


def placed(folder, name: str, array: np.ndarray, kind: str):
    """A leaf of T5X's tree: the array itself, or the spec of the one that was written.

    Args:
      folder: the checkpoint.
      name: name of the weight.
      array: its values.
      kind: "inline" for the array itself, "placeholder" for its name, "old" or "new" for a spec.
    """
    if kind == "inline":
        return np.ascontiguousarray(array)
    about = {
        "driver": "zarr",
        "dtype": array.dtype.name,
        "kvstore": {"driver": "file", "path": str(folder / name)},
        "metadata": {
            "compressor": {"id": "gzip"},
            "shape": array.shape,
            # A chunk that does not divide the array, as partitions may not.
            "chunks": [max(1, size - 1) for size in array.shape],
        },
    }
    tensorstore.open(about, create=True).result().write(array).result()
    if kind == "placeholder":
        return f"PLACEHOLDER://{name}"
    spec = tensorstore.Spec(about).to_json()
    spec["kvstore"] = {"driver": "gfile", "path": f"{name}/"}
    if kind == "old":
        spec["path"] = spec["kvstore"].pop("path")
    return spec


@pytest.mark.parametrize("kind", ["tensorstore", "old", "inline", "placeholder"])
def test_checkpoints_as_t5x_writes_them_are_read(tmp_path, kind):
    drawn = Drawn(T5)
    folder = as_t5x_writes(tmp_path, drawn, kind)
    assert_same(open_t5x(folder, T5).weights(), drawn)
    # The MODEL_DIR of the run stands for its newest checkpoint.
    assert_same(open_t5x(tmp_path, T5).weights(), drawn)


def test_the_newest_t5x_layout_is_read(tmp_path):
    import orbax.checkpoint as ocp

    drawn = Drawn(LONE)
    to_t5x(tmp_path / "old", drawn, LONE, scan=True)
    source = t5x_files.T5XTensors(tmp_path / "old")
    tree = {}
    for name in source.names:
        *above, last = name.split("/")
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = source.read(name)
    state = {"target": tree, "state": {"step": np.int32(3)}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as writer:
        writer.save(tmp_path / "checkpoint_3" / "state", args=ocp.args.PyTreeSave(state))
    assert_same(open_t5x(tmp_path / "checkpoint_3", LONE).weights(), drawn)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("t5", {"positions": "alibi"}),
        ("t5", {"positions": "none"}),
        ("t5", {"positions": "bipe", "segment_length": 4}),
        ("t5", {"bias_vectors": True}),
        ("t5", {"qkv_norm": True}),
        ("t5", {"output_norm": True}),
        ("t5", {"chunk": 4}),
        ("llama", {"positions": "alibi"}),
        ("llama", {"rotary_span": 8}),
        ("llama", {"qkv_norm": True}),
        ("llama", {"output_norm": True}),
    ],
)
def test_no_other_format_takes_positions_or_norms_that_it_cannot_express(family, changes):
    module, base = FAMILIES[family]
    assert huggingface.family_for_export(base) is module
    stacks = {
        name: dataclasses.replace(stack, **changes)
        for name, stack in (("encoder", base.encoder), ("decoder", base.decoder))
        if stack is not None and not ("chunk" in changes and name == "decoder")
    }
    cfg, field = dataclasses.replace(base, **stacks), next(iter(changes))
    with pytest.raises(ValueError, match=rf"Stack\.{field}"):
        huggingface.family_for_export(cfg)
    with pytest.raises(ValueError, match="T5X cannot express"):
        t5x.entries_to_write(cfg, scan=False)


def test_t5x_refuses_models_it_cannot_express():
    for cfg in (LLAMA, GPT2):
        with pytest.raises(ValueError, match="T5X cannot express"):
            t5x.entries_to_write(cfg, scan=False)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a T5X checkpoint"),
        (b"\xc1garbage", "not a T5X checkpoint"),
        (b"model_checkpoint_path: 'model.ckpt-0'", "TensorFlow checkpoint"),
        (serialization.msgpack_serialize({"version": 3, "optimizer": {}}), "no weights"),
        (serialization.msgpack_serialize({"version": 1, "optimizer": {}}), "version 1"),
        (
            serialization.msgpack_serialize(
                {"version": 3, "optimizer": {"target": {"w": "PLACEHOLDER://../../etc"}}}
            ),
            "not a folder beside",
        ),
        (
            serialization.msgpack_serialize(
                {"version": 3, "optimizer": {"target": {"w": "PLACEHOLDER://absent"}}}
            ),
            "not a readable array",
        ),
    ],
)
def test_a_broken_t5x_tree_is_reported(tmp_path, content, message):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        t5x_files.T5XTensors(tmp_path)


def test_a_damaged_t5x_array_is_reported(tmp_path):
    folder = as_t5x_writes(tmp_path, Drawn(T5), "tensorstore")
    chunk = next(
        path
        for path in (folder / "target.token_embedder.embedding").iterdir()
        if path.name != ".zarray"
    )
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(SourceError, match="token_embedder.embedding cannot be read"):
        open_t5x(folder, T5).weights().read("embedding")


def test_damage_to_our_own_weights_is_reported_before_they_are_converted(tmp_path):
    ours = write_ours(tmp_path / "ours", LLAMA, Drawn(LLAMA))
    chunk = ours / "checkpoints/0/params/decoder.layers.mlp.gate/1.0.0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    saved = SavedWeights(ours)
    with pytest.raises(DamagedCheckpointError, match="decoder/layers/mlp/gate"):
        for layer in range(3):
            saved.read("decoder/layers/mlp/gate", layer)


def test_what_training_saved_is_read_layer_by_layer(tmp_path):
    from t5x_lite.checkpoints import checkpoint_io
    from t5x_lite.checkpoints.manager import CheckpointManager
    from t5x_lite.checkpoints.train_state import TrainState

    drawn = Drawn(LLAMA)
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    nested = {}
    for path, array in drawn.arrays.items():
        *above, last = path.split("/")
        inner = nested
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = jax.numpy.asarray(array)
    zero = jax.numpy.int32(0)
    saver = CheckpointManager(tmp_path, config.Checkpoint())
    saver.save(
        TrainState(zero, nested, {}, zero, zero), checkpoint_io.CheckpointMetadata(5, "config")
    )
    saver.close()
    write_ours(tmp_path / "other", LLAMA, drawn)
    (tmp_path / "config.gin").write_text((tmp_path / "other/config.gin").read_text())
    assert_same(SavedWeights(tmp_path), drawn)


def test_a_cast_is_rounded_once_and_overflow_is_reported(tmp_path):
    drawn = Drawn(LLAMA)
    ours = write_ours(tmp_path / "ours", LLAMA, drawn, np.dtype(DTYPES["bfloat16"]))
    got = SavedWeights(ours).read("embedding")
    np.testing.assert_array_equal(got, drawn.arrays["embedding"].astype(DTYPES["bfloat16"]))
    drawn.arrays["embedding"][0, 0] = 1e6
    with pytest.raises(SourceError, match="embedding has values too large for float16"):
        write_ours(tmp_path / "small", LLAMA, drawn, np.dtype(np.float16))


def test_what_is_missing_with_leave_is_new_as_for_training(tmp_path):
    family, cfg = FAMILIES["llama"]
    drawn = Drawn(cfg)
    folder = write_hugging_face(tmp_path / "hf", family, cfg, drawn)
    lost = "model.layers.1.mlp.up_proj.weight"
    opened = tensors.open_hugging_face_tensors(folder)
    opened.source.names = {k: v for k, v in opened.source.names.items() if k != lost}
    with pytest.raises(matching.MatchError, match=f"{lost}: missing"):
        opened.weights()
    allowed = opened.weights(["model.layers.1.mlp.*"])
    assert weights.equal_bits(
        allowed.read("decoder/layers/mlp/up", 0), drawn.read("decoder/layers/mlp/up", 0)
    )
    new = allowed.read("decoder/layers/mlp/up", 1)
    assert new.shape == (8, 16) and 0.1 < new.std() < 1


def test_a_run_folder_says_its_model_in_full(tmp_path):
    ours = write_ours(tmp_path / "ours", UMT5, Drawn(UMT5))
    assert SavedWeights(ours).run.model == UMT5
    note = json.loads((ours / "checkpoints/0/note/metadata").read_text())["note"]
    assert note["config"] == (ours / "config.gin").read_text()
