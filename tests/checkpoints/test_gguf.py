# SPDX-License-Identifier: Apache-2.0
"""Laws of .gguf files: every tensor where transformers has it, and no broken file past the door."""

import gguf
import gguf_toys as toys
import jax
import numpy as np
import pytest

from t5x_lite import config, sharding
from t5x_lite.checkpoints import matching, tensors, weights
from t5x_lite.checkpoints.formats import gguf as source
from t5x_lite.checkpoints.formats import gguf_config, gguf_file, huggingface
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.tokenizers.errors import GgufError

KINDS = gguf.GGMLQuantizationType


@pytest.fixture(autouse=True)
def alone():
    jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))


class Drawn:
    """Tensors in memory as a source."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.names = {name: (array.shape, array.dtype) for name, array in arrays.items()}

    def read(self, name):
        return self.arrays[name]


def params_of(architecture, drawn):
    """The weights as the Hugging Face family reads them."""
    family = huggingface.family_module(source.ARCHITECTURES[architecture])
    cfg = family.parse_config(toys.config_json(architecture), drawn.keys())
    mapped = tensors.MappedTensors("drawn", cfg, Drawn(drawn), family.entries(cfg))
    return cfg, weights.place_weights(mapped.weights(), cfg)


def params_in(path):
    opened = source.GgufTensors(path)
    cfg = gguf_config.read_gguf_config(opened)
    mapped = tensors.MappedTensors(path, cfg, opened, opened.entries(cfg), opened.ignored())
    return cfg, weights.place_weights(mapped.weights(), cfg)


@pytest.mark.parametrize("architecture", toys.DECODERS)
def test_a_file_holds_the_model_that_its_hugging_face_folder_holds(architecture, tmp_path):
    drawn = toys.draw(architecture)
    path = tmp_path / "toy.gguf"
    toys.write(path, architecture, toys.converted(architecture, drawn))
    expected_cfg, expected = params_of(architecture, drawn)
    cfg, params = params_in(path)
    assert cfg == expected_cfg
    flat, wanted = flatten_tree(params, "/"), flatten_tree(expected, "/")
    assert flat.keys() == wanted.keys()
    for name in wanted:
        # One was added to Gemma's norms and taken off again: that costs the last bits.
        rounded = architecture in toys.ADDED and "norm" in name
        np.testing.assert_allclose(flat[name], wanted[name], rtol=0, atol=2e-7 if rounded else 0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_a_file_gives_the_logits_that_transformers_gives_for_it(architecture, tmp_path):
    import torch
    import transformers

    from t5x_lite import model

    path = tmp_path / "toy.gguf"
    toys.write(path, architecture, toys.converted(architecture, toys.draw(architecture, seed=1)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="toy.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = np.random.default_rng(2).integers(0, toys.VOCABULARY, (2, 12)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.int64)).logits.numpy()
    cfg, params = params_in(path)
    cfg = config.Model(**vars(cfg) | {"dtype": "float32"})
    transformer, cache = model.Transformer(cfg), model.empty_cache(cfg, 2, 12)
    block = model.TokenBlock(ids, np.zeros(2, np.int32))
    hidden, _ = transformer.apply({"params": params}, block, cache, method=model.Transformer.decode)
    logits = transformer.apply({"params": params}, hidden, method=model.Transformer.logits)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_tensor_is_read_as_the_package_dequantizes_it(kind, tmp_path):
    drawn = toys.converted("llama", toys.draw("llama"))
    path = tmp_path / "toy.gguf"
    toys.write(path, "llama", drawn, KINDS[kind])
    opened = source.GgufTensors(path)
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = opened.read(tensor.name)
        assert (values.shape, values.dtype) == opened.names[tensor.name]
        np.testing.assert_array_equal(values.astype(np.float32), expected)
    assert opened.kinds["blk.0.attn_q.weight"] == kind


def test_the_header_says_what_the_packages_reader_says(tmp_path):
    path = tmp_path / "toy.gguf"
    toys.write(path, "gemma2", toys.converted("gemma2", toys.draw("gemma2")))
    opened, reader = gguf_file.open_gguf(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert opened.metadata == {name: field.contents() for name, field in fields.items()}
    for tensor in reader.tensors:
        there = opened.tensors[tensor.name]
        assert there.shape == tuple(tensor.shape[::-1].tolist())
        assert (there.begin, there.size) == (tensor.data_offset, tensor.n_bytes)


def test_llama_3s_scaling_is_found_behind_its_factors(tmp_path):
    drawn = toys.converted("llama", toys.draw("llama"))
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = gguf_config.llama3_factors(scaling, 500000.0, toys.head_dim("llama")).astype(
        np.float32
    )
    fields = toys.metadata("llama") | {"rope.freq_base": 500000.0}
    path = tmp_path / "toy.gguf"
    toys.write(path, "llama", drawn | {"rope_freqs.weight": factors}, fields=fields)
    assert gguf_config.hugging_face_config(source.GgufTensors(path))["rope_scaling"] == scaling
    expected = config.RotaryScaling("llama3", 32.0, low=1.0, high=4.0, original=8192)
    assert params_in(path)[0].decoder.rotary_scaling == expected
    other = tmp_path / "other.gguf"
    toys.write(other, "llama", drawn | {"rope_freqs.weight": factors * 1.5}, fields=fields)
    with pytest.raises(GgufError, match="rope_freqs.weight"):
        gguf_config.read_gguf_config(source.GgufTensors(other))


def small_file(folder):
    """A file of little more than a header, and its bytes."""
    path = folder / "small.gguf"
    toys.write(path, "llama", {"token_embd.weight": np.ones((4, 32), np.float32)})
    return path, path.read_bytes()


def test_a_file_that_is_cut_off_anywhere_says_so(tmp_path):
    path, content = small_file(tmp_path)
    gguf_file.open_gguf(path)
    for size in range(0, len(content) - 1, 7):
        path.write_bytes(content[:size])
        with pytest.raises(GgufError, match="small.gguf"):
            gguf_file.open_gguf(path)


@pytest.mark.parametrize("seed", range(4))
def test_no_broken_byte_gets_past_opening_but_as_a_number(tmp_path, seed):
    path, content = small_file(tmp_path)
    draw = np.random.default_rng(seed)
    for _ in range(200):
        broken = bytearray(content)
        for place in draw.integers(0, len(content) - 512, draw.integers(1, 4)):
            broken[place] = draw.choice([0, 1, 127, 255, draw.integers(256)])
        path.write_bytes(broken)
        try:
            opened = gguf_file.open_gguf(path)
        except GgufError as error:
            assert "small.gguf" in str(error)
        else:
            assert all(each.begin + each.size <= len(content) for each in opened.tensors.values())


@pytest.mark.parametrize(
    "place, value, trouble",
    [
        (0, b"GGML", "not a GGUF file"),
        (4, (1).to_bytes(4, "little"), "version 1"),
        (4, (3).to_bytes(4, "big"), "big-endian"),
        (8, (2**62).to_bytes(8, "little"), "cut off or broken"),
        (16, (2**62).to_bytes(8, "little"), "cut off or broken|twice"),
    ],
)
def test_a_wrong_beginning_is_named(tmp_path, place, value, trouble):
    path, content = small_file(tmp_path)
    path.write_bytes(content[:place] + value + content[place + len(value) :])
    with pytest.raises(GgufError, match=trouble):
        gguf_file.open_gguf(path)


def test_what_a_file_lacks_or_has_too_much_of_is_named(tmp_path):
    path = tmp_path / "toy.gguf"
    drawn = toys.converted("llama", toys.draw("llama"))
    less = {name: array for name, array in drawn.items() if name != "blk.1.attn_q.weight"}
    toys.write(path, "llama", less)
    with pytest.raises(ValueError, match="blk.1.attn_q.weight: missing"):
        params_in(path)
    toys.write(path, "llama", drawn | {"blk.0.surprise.weight": drawn["blk.0.attn_k.weight"]})
    with pytest.raises(ValueError, match="surprise"):
        params_in(path)
    toys.write(path, "llama", drawn, fields={"block_count": 6})
    with pytest.raises(GgufError, match="llama.attention.head_count|llama.embedding_length"):
        params_in(path)
    toys.write(path, "falcon", drawn, fields={})
    with pytest.raises(GgufError, match="'falcon'; those that can be read are llama"):
        source.GgufTensors(path)


def test_a_quantization_that_cannot_be_undone_names_the_tensor(tmp_path, monkeypatch):
    path = tmp_path / "toy.gguf"
    toys.write(path, "llama", toys.converted("llama", toys.draw("llama")), KINDS.Q8_0)
    monkeypatch.delitem(gguf.quants._type_traits, KINDS.Q8_0)
    with pytest.raises(GgufError, match=r"blk.0.attn_q.weight is Q8_0.*Take a file with another"):
        source.GgufTensors(path).read("blk.0.attn_q.weight")


def test_a_file_without_a_tokenizer_is_refused_where_texts_are_wanted(tmp_path):
    path = tmp_path / "toy.gguf"
    toys.write(path, "llama", toys.converted("llama", toys.draw("llama")))
    with pytest.raises(GgufError, match="tokenizer.ggml.model"):
        open_checkpoint(path)


def test_a_count_of_layers_that_the_file_does_not_have_is_refused_at_once(tmp_path):
    path = tmp_path / "toy.gguf"
    drawn = toys.converted("llama", toys.draw("llama"))
    toys.write(path, "llama", drawn, fields=toys.metadata("llama") | {"block_count": 2**31})
    with pytest.raises(GgufError, match="block_count is 2147483648, but .* 6 layers"):
        gguf_config.read_gguf_config(source.GgufTensors(path))


def llama_file(path, fields=None, **extra):
    """A whole toy Llama at a path, with further metadata: fields of its architecture, and extra
    ones by their whole names."""
    drawn = toys.converted("llama", toys.draw("llama"))
    fields = toys.metadata("llama") | (fields or {})
    toys.write(path, "llama", drawn, fields=fields, extra=extra)
    return path


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_FIELDS = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}


@pytest.mark.parametrize(
    "fields, scaling",
    [
        ({"rope.scale_linear": 4.0}, LINEAR),
        ({"rope.scaling.factor": 4.0}, LINEAR),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LINEAR),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "yarn"} | YARN_FIELDS, YARN),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, LINEAR),
        ({"rope.scale_linear": 1.0}, None),
        ({"rope.scale_linear": 0.0}, None),
    ],
)
def test_positions_are_scaled_as_llama_cpp_scales_them(tmp_path, fields, scaling):
    read = source.GgufTensors(llama_file(tmp_path / "toy.gguf", fields))
    assert gguf_config.hugging_face_config(read).get("rope_scaling") == scaling
    stack = gguf_config.read_gguf_config(read).decoder
    original = {"original": 16} if scaling == YARN else {}
    expected = scaling and config.RotaryScaling(scaling["rope_type"], 4.0, **original)
    assert stack.rotary_scaling == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"attention.scale": 0.5},
        {"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_fast": 32.0},
        {"attention.sliding_window": 64},
        {"expert_count": 8},
        {"logit_scale": 0.25},
        {"attention.causal": False},
        {"new_in_2030": 1},
    ],
)
def test_metadata_that_may_mean_another_computation_is_refused(tmp_path, fields):
    read = source.GgufTensors(llama_file(tmp_path / "toy.gguf", fields))
    with pytest.raises(GgufError, match=f"llama.{list(fields)[-1]} = .*--remove-metadata"):
        gguf_config.read_gguf_config(read)


def test_metadata_that_changes_nothing_is_read(tmp_path):
    fields = {"expert_count": 0, "attention.causal": True, "vocab_size": 9, "logit_scale": 1.0}
    read = source.GgufTensors(llama_file(tmp_path / "toy.gguf", fields))
    plain = source.GgufTensors(llama_file(tmp_path / "plain.gguf"))
    assert gguf_config.read_gguf_config(read) == gguf_config.read_gguf_config(plain)


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"split.count": 3, "split.no": 0}, "part 1 of 3 .*llama-gguf-split"),
        ({"general.type": "adapter"}, "general.type 'adapter'.*LoRA"),
        ({"general.type": "mmproj"}, "general.type 'mmproj': it is no model"),
    ],
)
def test_a_part_of_a_model_says_what_it_is(tmp_path, extra, message):
    with pytest.raises(GgufError, match=message):
        source.GgufTensors(llama_file(tmp_path / "toy.gguf", **extra))


def table_offsets(path) -> dict[str, int]:
    """Place in the file of each tensor's offset."""
    reader = gguf.GGUFReader(path)
    return {
        each.name: each.field.offset + sum(part.nbytes for part in each.field.parts[:-1])
        for each in reader.tensors
    }


@pytest.mark.parametrize("change", ["another tensor's", "misaligned", "overlapping"])
def test_tensors_lie_one_after_the_other(tmp_path, change):
    path = llama_file(tmp_path / "toy.gguf")
    content, places = bytearray(path.read_bytes()), table_offsets(path)
    one, other = "blk.0.attn_q.weight", "blk.1.attn_q.weight"

    def offset(name):
        return int.from_bytes(content[places[name] : places[name] + 8], "little")

    moved = {
        "another tensor's": offset(one),
        "misaligned": offset(other) - 4,
        "overlapping": offset(other) - 32,
    }
    content[places[other] : places[other] + 8] = moved[change].to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(GgufError, match="should begin at byte .* begins at"):
        source.GgufTensors(path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attention.head_count": 0}, "head_count is 0, not a number"),
        ({"attention.head_count_kv": 0}, "head_count_kv is 0, not a number"),
        ({"embedding_length": 10**9}, "embedding_length is 1000000000"),
        ({"attention.key_length": 10**9}, "key_length is 1000000000, not a number"),
        ({"feed_forward_length": 0}, "feed_forward_length is 0"),
        ({"attention.head_count": "many"}, "head_count is 'many'"),
        ({"rope.freq_base": "x"}, "toy.gguf"),
    ],
)
def test_sizes_are_compared_with_the_file_before_anything_is_made_of_them(
    tmp_path, fields, message
):
    path = llama_file(tmp_path / "toy.gguf", fields)
    with pytest.raises(GgufError, match=message):
        gguf_config.read_gguf_config(source.GgufTensors(path))


def test_too_many_values_are_refused_before_they_are_read(tmp_path, monkeypatch):
    path = llama_file(tmp_path / "toy.gguf")
    monkeypatch.setattr(gguf_file, "MAX_VALUES", toys.VOCABULARY - 1)
    with pytest.raises(GgufError, match="array of 48 values"):
        gguf_file.open_gguf(path)
    monkeypatch.setattr(gguf_file, "MAX_ENTRIES", 3)
    with pytest.raises(GgufError, match=r"should have \d+ tensors"):
        gguf_file.open_gguf(path)


def test_the_plan_names_what_is_done_to_the_values(tmp_path):
    path = tmp_path / "toy.gguf"
    toys.write(path, "gemma2", toys.converted("gemma2", toys.draw("gemma2")), KINDS.Q8_0)
    mapped = tensors.map_gguf_tensors(source.GgufTensors(path))
    table = matching.format_plan(mapped.plan(), mapped.source.names).splitlines()
    steps = {line.split()[0]: line for line in table[2:]}
    assert steps["output_norm.weight"].endswith("minus one")
    assert steps["blk.{layer}.ffn_norm.weight"].endswith("minus one")
    assert "dequantized from Q8_0" in steps["blk.{layer}.attn_q.weight"]
    assert not any("as it is" in line for line in steps.values())


def test_the_context_of_a_file_is_kept_for_an_export(tmp_path):
    mapped = tensors.map_gguf_tensors(source.GgufTensors(llama_file(tmp_path / "toy.gguf")))
    assert mapped.kept.config == {"max_position_embeddings": toys.LENGTH}
