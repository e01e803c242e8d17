# SPDX-License-Identifier: Apache-2.0
"""Laws of reading: a fault of a checkpoint is reported in a sentence when it is opened."""

import dataclasses
import json
import struct

import fuzzing
import ml_dtypes
import numpy as np
import pytest
from conversion_toys import LLAMA, Drawn, write_hugging_face, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5x_lite.checkpoints import tensors
from t5x_lite.checkpoints.formats import safetensors_files
from t5x_lite.checkpoints.formats.huggingface import llama
from t5x_lite.checkpoints.formats.safetensors_files import INDEX
from t5x_lite.checkpoints.matching import MatchError
from t5x_lite.tokenizers.errors import SourceError

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def drawn():
    return Drawn(LLAMA)


@pytest.fixture
def whole(tmp_path, drawn):
    """A checkpoint in one file."""
    return write_hugging_face(tmp_path / "whole", llama, LLAMA, drawn)


@pytest.fixture
def parts(tmp_path, drawn):
    """The same in shards."""
    return write_hugging_face(tmp_path / "parts", llama, LLAMA, drawn, limit=4000)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def arrays(folder):
    source = safetensors_files.open_safetensors(folder)
    return {name: np.array(source.read(name)) for name in source.names}


def test_every_dtype_comes_back(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(3.5, ml_dtypes.bfloat16),
        "c": np.zeros((0, 4), np.float16),
        "d": np.array([True, False]),
        "e": np.arange(3, dtype=np.int64),
    }
    source = safetensors_files.open_safetensors(
        write_safetensors(tmp_path / "x.safetensors", tensors)
    )
    for name, array in tensors.items():
        got = source.read(name)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_shard_is_reported(parts, cut):
    shard = shards(parts)[1]
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(SourceError, match=shard.name):
        safetensors_files.open_safetensors(parts)


@pytest.mark.parametrize("length", [2**63, 10**9, 200_000_000, 10_000])
def test_a_giant_header_is_reported_and_not_read(tmp_path, length):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    with pytest.raises(SourceError, match="not a complete safetensors file"):
        safetensors_files.open_safetensors(tmp_path)


def with_header(file, header) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


@pytest.mark.parametrize(
    "header, message",
    [
        (b"not json", "no readable header"),
        (b"[]", "no readable header"),
        (b"[" * 100_000, "no readable header"),
        (b'{"a": 3}', "no readable header"),
        (b"\xff\xfe", "no readable header"),
        ({"a": {"dtype": "F12", "shape": [4], "data_offsets": [0, 16]}}, "F12"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, "does not fit"),
        ({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "not as they should"),
        ({"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}, "not as they should"),
        ({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}, "cut off"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, "cut off"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "after its last tensor"),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b' "a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
            "a stands twice",
        ),
        (
            {
                "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
            },
            "cut off",
        ),
    ],
)
def test_a_wrong_header_is_reported(tmp_path, header, message):
    with_header(tmp_path / "model.safetensors", header)
    with pytest.raises(SourceError, match=message):
        safetensors_files.open_safetensors(tmp_path)


def test_a_missing_shard_is_reported(parts):
    lost = shards(parts)[1]
    lost.unlink()
    with pytest.raises(SourceError, match=f"names the shard {lost.name}, which is not there"):
        safetensors_files.open_safetensors(parts)


def test_a_missing_index_is_reported(parts):
    (parts / INDEX).unlink()
    with pytest.raises(SourceError, match=f"no {INDEX}"):
        safetensors_files.open_safetensors(parts)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": 7}'],
)
def test_a_broken_index_is_reported(parts, content):
    (parts / INDEX).write_text(content)
    with pytest.raises(SourceError, match="not an index of safetensors"):
        safetensors_files.open_safetensors(parts)


def change_index(folder, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_that_disagrees_with_its_shards_is_reported(parts):
    kept = (parts / INDEX).read_text()
    name, file = next(iter(json.loads(kept)["weight_map"].items()))
    other = next(shard.name for shard in shards(parts) if shard.name != file)
    for change, message in (
        (lambda where: where.update({name: other}), f"{name} is not in {other}"),
        (lambda where: where.update({"more": other}), f"more is not in {other}"),
        (lambda where: where.pop(name), f"has {name}, which"),
        (lambda where: where.update({name: "../model.safetensors"}), "not a file beside it"),
    ):
        (parts / INDEX).write_text(kept)
        change_index(parts, change)
        with pytest.raises(SourceError, match=message.replace(".", r"\.")):
            safetensors_files.open_safetensors(parts)


def test_one_tensor_in_two_shards_is_reported(parts):
    first, second = shards(parts)[:2]
    content = safetensors_files.SafetensorsFiles([second])
    twice = {name: np.array(content.read(name)) for name in content.names}
    double = safetensors_files.SafetensorsFiles([first])
    name = next(iter(double.names))
    write_safetensors(second, twice | {name: np.array(double.read(name))})
    with pytest.raises(SourceError, match=f"{name} is in .* too"):
        safetensors_files.open_safetensors(parts)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "flax_model.msgpack", "a.ckpt"])
def test_pickles_are_refused_with_the_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(SourceError, match="safe_serialization=True"):
            safetensors_files.open_safetensors(path)


def test_nothing_at_all_is_reported(tmp_path):
    with pytest.raises(SourceError, match="There is no"):
        safetensors_files.open_safetensors(tmp_path / "absent")
    with pytest.raises(SourceError, match="no model.safetensors"):
        safetensors_files.open_safetensors(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match="not a .safetensors file"):
        safetensors_files.open_safetensors(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.update({Q + "x": a.pop(Q)}), f"{Q}: missing"),
        (lambda a: a.update(more=np.zeros(3, np.float32)), "more: no weight of ours"),
        (lambda a: a.update({Q: a[Q].T.copy()}), f"{Q}: has shape"),
        (lambda a: a.update({Q: a[Q].astype(np.int32)}), f"{Q}: is int32"),
        (lambda a: a.update({Q: a[Q].astype(ml_dtypes.float8_e4m3fn)}), f"{Q}: is float8"),
    ],
)
def test_what_does_not_match_is_reported_by_name(whole, change, message):
    tensors_by_name = arrays(whole)
    change(tensors_by_name)
    write_safetensors(whole / "model.safetensors", tensors_by_name)
    with pytest.raises(MatchError, match=message.replace(".", r"\.")):
        tensors.open_hugging_face_tensors(whole).weights()


def test_all_that_does_not_match_is_reported_and_may_be_allowed(whole):
    tensors_by_name = arrays(whole)
    tensors_by_name["vision.a"] = tensors_by_name["vision.b"] = np.zeros(3, np.float32)
    write_safetensors(whole / "model.safetensors", tensors_by_name)
    with pytest.raises(MatchError, match=r"2 places:(.|\n)*vision\.a(.|\n)*vision\.b"):
        tensors.open_hugging_face_tensors(whole).weights()
    opened = tensors.open_hugging_face_tensors(whole)
    assert opened.weights(["vision.*"]).names
    assert opened.plan(["vision.*"]).skipped.keys() == {"vision.a", "vision.b"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_values_that_are_no_numbers_are_reported(whole, value, dtype):
    tensors_by_name = {name: array.astype(dtype) for name, array in arrays(whole).items()}
    tensors_by_name[Q][3, 2] = value
    write_safetensors(whole / "model.safetensors", tensors_by_name)

    def read(*allow):
        weights = tensors.open_hugging_face_tensors(whole).weights(allow)
        return weights.read("decoder/layers/attention/query", 1)

    with pytest.raises(SourceError, match=f"{Q} has values that are NaN or infinite"):
        read()
    assert not np.isfinite(read("*q_proj*").astype(np.float32)).all()


def test_the_largest_numbers_are_numbers(whole):
    kept = arrays(whole)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        tensors_by_name = {name: array.astype(dtype) for name, array in kept.items()}
        tensors_by_name[Q][0, :2] = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min
        write_safetensors(whole / "model.safetensors", tensors_by_name)
        assert (
            tensors.open_hugging_face_tensors(whole)
            .weights()
            .read("decoder/layers/attention/query", 1)
            .size
        )


def test_copies_of_a_tied_table_must_be_equal(tmp_path):
    cfg = dataclasses.replace(LLAMA, tied=True)
    folder = write_hugging_face(tmp_path / "tied", llama, cfg, Drawn(cfg))
    config_json = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config_json))
    tensors_by_name = arrays(folder)
    tensors_by_name["lm_head.weight"] = tensors_by_name["model.embed_tokens.weight"].copy()
    write_safetensors(folder / "model.safetensors", tensors_by_name)
    opened = tensors.open_hugging_face_tensors(folder)
    assert opened.model.tied and opened.weights().names
    tensors_by_name["lm_head.weight"][0, 0] += 1
    write_safetensors(folder / "model.safetensors", tensors_by_name)
    with pytest.raises(SourceError, match="lm_head.weight should be the same"):
        tensors.open_hugging_face_tensors(folder).weights()


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "cannot be read"),
        ("[1]", "should hold an object"),
        ("{}", "no model_type"),
        ('{"model_type": "bert"}', "bert"),
        ('{"model_type": "llama"}', "config.json"),
    ],
)
def test_a_broken_config_json_is_reported(whole, content, message):
    (whole / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        tensors.open_hugging_face_tensors(whole)
    (whole / "config.json").unlink()
    with pytest.raises(SourceError, match="has no config.json"):
        tensors.open_hugging_face_tensors(whole)


@given(st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_broken_byte_of_a_file_is_refused_or_harmless(whole, data):
    """Never anything but ValueError: no crash, no other exception."""
    file = whole / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(0, header - 1))
    broken = bytes(content[:place]) + bytes([data.draw(st.integers(0, 255))])
    broken += bytes(content[place + 1 :])
    file.write_bytes(broken)
    try:
        weights = tensors.open_hugging_face_tensors(whole).weights()
        for path, (shape, _) in weights.names.items():
            layer = 0 if path.startswith("decoder/layers") else None
            assert weights.read(path, layer).shape == (shape if layer is None else shape[1:])
    except ValueError:
        pass
    finally:
        file.write_bytes(content)


def test_a_header_of_many_names_with_one_twice_is_refused_in_linear_time(tmp_path):
    row = '"n%d": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    names = [*range(150_000), 149_999]
    text = "{" + ", ".join(row % number for number in names) + "}"
    with_header(tmp_path / "model.safetensors", text.encode())
    with fuzzing.limits(), pytest.raises(SourceError, match="n149999 stands twice"):
        safetensors_files.open_safetensors(tmp_path)


@pytest.mark.parametrize("size", [1_000_004, 2 * 10**9])
@pytest.mark.parametrize("field", ["hidden_size", "head_dim", "intermediate_size"])
def test_a_size_that_no_tensor_has_is_refused_before_it_is_used(whole, field, size):
    path = whole / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: size}))
    words = "at most 1,048,576" if size > 2**20 else "does not fit the model"
    with fuzzing.limits(), pytest.raises(ValueError, match=words):
        tensors.open_hugging_face_tensors(whole).weights()
