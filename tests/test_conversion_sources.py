# SPDX-License-Identifier: Apache-2.0
"""Laws of reading: whatever is wrong with a checkpoint is told in a sentence, at the door."""

import dataclasses
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from conversion_toys import LLAMA, Drawn, write_hugging_face, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5x_lite.conversion import sources, tensors
from t5x_lite.conversion.huggingface import llama
from t5x_lite.conversion.matching import MatchError
from t5x_lite.conversion.sources import INDEX, SourceError

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
    source = sources.open(folder)
    return {name: np.array(source.read(name)) for name in source.names}


def test_every_dtype_comes_back(tmp_path):
    given = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(3.5, ml_dtypes.bfloat16),
        "c": np.zeros((0, 4), np.float16),
        "d": np.array([True, False]),
        "e": np.arange(3, dtype=np.int64),
    }
    source = sources.open(write_safetensors(tmp_path / "x.safetensors", given))
    for name, array in given.items():
        got = source.read(name)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_shard_is_told(parts, cut):
    shard = shards(parts)[1]
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(SourceError, match=shard.name):
        sources.open(parts)


@pytest.mark.parametrize("length", [2**63, 10**9, 200_000_000, 10_000])
def test_a_giant_header_is_told_and_not_read(tmp_path, length):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    with pytest.raises(SourceError, match="no whole safetensors file"):
        sources.open(tmp_path)


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
def test_a_wrong_header_is_told(tmp_path, header, message):
    with_header(tmp_path / "model.safetensors", header)
    with pytest.raises(SourceError, match=message):
        sources.open(tmp_path)


def test_a_missing_shard_is_told(parts):
    lost = shards(parts)[1]
    lost.unlink()
    with pytest.raises(SourceError, match=f"names the shard {lost.name}, which is not there"):
        sources.open(parts)


def test_a_missing_index_is_told(parts):
    (parts / INDEX).unlink()
    with pytest.raises(SourceError, match=f"no {INDEX}"):
        sources.open(parts)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": 7}'],
)
def test_a_broken_index_is_told(parts, content):
    (parts / INDEX).write_text(content)
    with pytest.raises(SourceError, match="no index of safetensors"):
        sources.open(parts)


def change_index(folder, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_that_disagrees_with_its_shards_is_told(parts):
    kept = (parts / INDEX).read_text()
    name, file = next(iter(json.loads(kept)["weight_map"].items()))
    other = next(shard.name for shard in shards(parts) if shard.name != file)
    for change, message in (
        (lambda where: where.update({name: other}), f"{name} is not in {other}"),
        (lambda where: where.update({"more": other}), f"more is not in {other}"),
        (lambda where: where.pop(name), f"has {name}, which"),
        (lambda where: where.update({name: "../model.safetensors"}), "no file beside it"),
    ):
        (parts / INDEX).write_text(kept)
        change_index(parts, change)
        with pytest.raises(SourceError, match=message.replace(".", r"\.")):
            sources.open(parts)


def test_one_tensor_in_two_shards_is_told(parts):
    first, second = shards(parts)[:2]
    content = sources.Safetensors([second])
    twice = {name: np.array(content.read(name)) for name in content.names}
    double = sources.Safetensors([first])
    name = next(iter(double.names))
    write_safetensors(second, twice | {name: np.array(double.read(name))})
    with pytest.raises(SourceError, match=f"{name} is in .* too"):
        sources.open(parts)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "flax_model.msgpack", "a.ckpt"])
def test_pickles_are_refused_with_the_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(SourceError, match="safe_serialization=True"):
            sources.open(path)


def test_nothing_at_all_is_told(tmp_path):
    with pytest.raises(SourceError, match="There is no"):
        sources.open(tmp_path / "absent")
    with pytest.raises(SourceError, match="no model.safetensors"):
        sources.open(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match="no .safetensors file"):
        sources.open(tmp_path / "notes.txt")


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
def test_what_does_not_match_is_told_by_name(whole, change, message):
    found = arrays(whole)
    change(found)
    write_safetensors(whole / "model.safetensors", found)
    with pytest.raises(MatchError, match=message.replace(".", r"\.")):
        tensors.of_folder(whole).weights()


def test_all_that_does_not_match_is_told_and_may_be_allowed(whole):
    found = arrays(whole)
    found["vision.a"] = found["vision.b"] = np.zeros(3, np.float32)
    write_safetensors(whole / "model.safetensors", found)
    with pytest.raises(MatchError, match=r"2 places:(.|\n)*vision\.a(.|\n)*vision\.b"):
        tensors.of_folder(whole).weights()
    opened = tensors.of_folder(whole)
    assert opened.weights(["vision.*"]).names
    assert opened.plan(["vision.*"]).skipped.keys() == {"vision.a", "vision.b"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_values_that_are_no_numbers_are_told(whole, value, dtype):
    found = {name: array.astype(dtype) for name, array in arrays(whole).items()}
    found[Q][3, 2] = value
    write_safetensors(whole / "model.safetensors", found)
    read = lambda *allow: (
        tensors.of_folder(whole).weights(allow).read("decoder/layers/attention/query", 1)
    )
    with pytest.raises(SourceError, match=f"{Q} has values that are NaN or infinite"):
        read()
    assert not np.isfinite(read("*q_proj*").astype(np.float32)).all()


def test_the_largest_numbers_are_numbers(whole):
    kept = arrays(whole)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        found = {name: array.astype(dtype) for name, array in kept.items()}
        found[Q][0, :2] = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min
        write_safetensors(whole / "model.safetensors", found)
        assert tensors.of_folder(whole).weights().read("decoder/layers/attention/query", 1).size


def test_copies_of_a_tied_table_must_be_equal(tmp_path):
    cfg = dataclasses.replace(LLAMA, tied=True)
    folder = write_hugging_face(tmp_path / "tied", llama, cfg, Drawn(cfg))
    said = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(said))
    found = arrays(folder)
    found["lm_head.weight"] = found["model.embed_tokens.weight"].copy()
    write_safetensors(folder / "model.safetensors", found)
    opened = tensors.of_folder(folder)
    assert opened.model.tied and opened.weights().names
    found["lm_head.weight"][0, 0] += 1
    write_safetensors(folder / "model.safetensors", found)
    with pytest.raises(SourceError, match="lm_head.weight should be the same"):
        tensors.of_folder(folder).weights()


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
def test_a_broken_config_json_is_told(whole, content, message):
    (whole / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        tensors.of_folder(whole)
    (whole / "config.json").unlink()
    with pytest.raises(SourceError, match="has no config.json"):
        tensors.of_folder(whole)


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
        weights = tensors.of_folder(whole).weights()
        for path, (shape, _) in weights.names.items():
            layer = 0 if path.startswith("decoder/layers") else None
            assert weights.read(path, layer).shape == (shape if layer is None else shape[1:])
    except ValueError:
        pass
    finally:
        file.write_bytes(content)
