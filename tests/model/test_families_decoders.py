# SPDX-License-Identifier: Apache-2.0
"""config.json of lone decoders: what each family reads, and what it refuses to read or to write."""

import dataclasses
import json

import decoder_parity
import jax
import numpy as np
import parity
import pytest
import torch
import transformers
from families import LLAMA3, STRETCHED
from family_models import gpt2 as draw_gpt2

from t5x_lite import config
from t5x_lite.checkpoints.formats import huggingface, safetensors_files
from t5x_lite.checkpoints.formats.huggingface import family_of_config, gemma, gpt2, llama

SIZES = dict(vocab_size=41, hidden_size=24, intermediate_size=20, num_attention_heads=3)
SIZES |= dict(num_hidden_layers=2, num_key_value_heads=3, max_position_embeddings=64)
SLIDING = dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=10)
GPT2 = dict(vocab_size=37, n_positions=16, n_layer=2, n_head=3, n_embd=24)
# model_type -> fields of a tiny config.json.
FIELDS = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES | dict(head_dim=10),
    "gemma": SIZES | dict(head_dim=8),
    "gemma2": SIZES | SLIDING,
    "gemma3": {},
    "gemma3_text": SIZES | SLIDING,
    "gpt2": GPT2 | dict(bos_token_id=29, eos_token_id=29),
}


def read(kind: str, names=("lm_head.weight",), **changes) -> config.Model:
    """Architecture that we read from a config.json.

    Args:
      kind: model_type.
      names: names of the tensors.
      **changes: fields of config.json.
    """
    config_json = {"model_type": kind} | FIELDS[kind] | changes
    return family_of_config(config_json).parse_config(config_json, names)


IGNORED = {
    "llama": ("layer_types", ["full_attention"] * 2),
    "gemma3_text": ("attn_logit_softcapping", 50.0),
}


@pytest.mark.parametrize("kind", IGNORED)
def test_a_field_that_transformers_does_not_compute_is_named_and_changes_nothing(kind):
    name, value = IGNORED[kind]
    with pytest.warns(UserWarning, match=f"{name} changes nothing"):
        cfg = read(kind, **{name: value})
    assert cfg == read(kind)


def test_qwen_uses_windows_only_where_config_json_says_so():
    whole = read("qwen2", sliding_window=4, max_window_layers=0)
    assert whole.decoder.pattern == ("full",) and whole.decoder.window is None
    some = read("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert some.decoder.sliding == (False, True) and some.decoder.window == 4
    types = ["sliding_attention", "full_attention"]
    cfg = read("qwen2", use_sliding_window=True, layer_types=types)
    assert cfg.decoder.sliding == (True, False) and cfg.decoder.window == 4096
    none = read("qwen2", use_sliding_window=True, sliding_window=None, max_window_layers=0)
    assert not any(none.decoder.sliding)


def test_layers_slide_as_each_generation_of_gemma_has_it():
    assert read("gemma2", ()).decoder.pattern == ("sliding", "full")
    third = read("gemma3_text", (), num_hidden_layers=13).decoder
    assert third.sliding == tuple((layer + 1) % 6 != 0 for layer in range(13))
    assert third.pattern == ("sliding",) * 5 + ("full",)
    other = read("gemma3_text", (), num_hidden_layers=4, sliding_window_pattern=2).decoder
    assert other.pattern == ("sliding", "full")
    assert not any(read("gemma", ()).decoder.sliding)


def test_transformers_4_and_5_write_the_same_positions():
    plain = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    four = read("llama", rope_theta=1000.0, rope_scaling=plain)
    assert four == read("llama", rope_parameters=LLAMA3)
    assert four.decoder.rotary_base == 1000.0
    older = read("llama", rope_theta=1000.0, rope_scaling={"type": "linear", "factor": 2})
    yarn = read("qwen2", rope_scaling=YARN).decoder.rotary_scaling
    assert yarn == config.RotaryScaling("yarn", 4.0, original=64)
    counted = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    assert read("llama", rope_scaling=counted).decoder.rotary_scaling.factor == 4.0
    assert older.decoder.rotary_scaling.factor == 2.0
    assert read("llama", rope_theta=5e5, rope_scaling=None).decoder.rotary_scaling is None
    linear = {"rope_type": "linear", "factor": 8.0}
    third = read(
        "gemma3_text", (), rope_theta=900.0, rope_local_base_freq=50.0, rope_scaling=linear
    )
    assert third == read("gemma3_text", (), rope_parameters=STRETCHED)
    assert third.decoder.sliding_rotary_base == 50.0
    default = read("gemma3_text", ()).decoder
    assert (default.rotary_base, default.sliding_rotary_base) == (1e6, 1e4)


def test_the_first_gemmas_write_gelu_and_mean_its_tanh_form():
    plain, tanh = "gelu", "gelu_pytorch_tanh"
    assert read("gemma", (), hidden_act=plain) == read("gemma", (), hidden_act=tanh)


def test_the_head_is_tied_by_what_config_and_file_say():
    assert read("llama", (), tie_word_embeddings=True).tied
    assert not read("llama", tie_word_embeddings=False).tied
    assert not read("llama").tied
    assert read("llama", ()).tied
    repeated = read("llama", tie_word_embeddings=True)
    assert repeated.tied
    assert llama.duplicates(repeated) == {"lm_head.weight": "model.embed_tokens.weight"}
    with pytest.raises(ValueError, match="tie_word_embeddings.*lm_head.weight"):
        read("llama", (), tie_word_embeddings=False)


def test_a_text_begins_with_bos_or_else_eos():
    assert read("llama", bos_token_id=7, eos_token_id=3).decoder_start_token_id == 7
    assert read("llama", bos_token_id=None, eos_token_id=[5, 6]).decoder_start_token_id == 5
    assert read("llama", bos_token_id=41, eos_token_id=3).decoder_start_token_id == 3
    assert read("llama").decoder_start_token_id == 0


def test_names_without_the_head_or_of_other_versions_are_the_same():
    names = [entry.theirs for entry in llama.entries(read("llama", ()))]
    assert [llama.canonical_name(name.removeprefix("model.")) for name in names] == names
    assert [llama.canonical_name(name) for name in names] == names
    for before_4_52, after in {
        "language_model.model.norm.weight": "model.norm.weight",
        "model.language_model.norm.weight": "model.norm.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.head.weight": "vision_tower.vision_model.head.weight",
    }.items():
        assert gemma.canonical_name(before_4_52) == after


def test_what_a_released_config_leaves_out_is_what_transformers_takes():
    text_config = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text_config |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    cfg = read("gemma3", (), text_config=text_config, eos_token_id=[1, 106])
    theirs = transformers.Gemma3TextConfig(**text_config)
    assert cfg.vocab == theirs.vocab_size and cfg.decoder_start_token_id == theirs.bos_token_id
    stack = cfg.decoder
    assert (stack.heads, stack.key_heads, stack.head_dim) == (8, 4, 256)
    assert (stack.rotary_base, stack.sliding_rotary_base, stack.window) == (1e6, 1e4, 1024)
    assert gemma.parse_config({"model_type": "gemma3_text"} | theirs.to_dict(), []) == cfg


def test_the_text_part_of_a_gemma_3_that_sees(tmp_path):
    text = {"model_type": "gemma3_text", "pad_token_id": None} | FIELDS["gemma3_text"]
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=8, patch_size=4, vision_use_head=False)
    parts = {"text_config": text, "vision_config": vision}
    seeing = transformers.Gemma3Config(**parts, mm_tokens_per_image=4)
    whole = transformers.Gemma3ForConditionalGeneration(seeing).eval()
    whole.save_pretrained(tmp_path / "whole")
    config_json = json.loads((tmp_path / "whole" / "config.json").read_text())
    source = safetensors_files.open_safetensors(tmp_path / "whole")
    cfg = dataclasses.replace(gemma.parse_config(config_json, source.names), dtype="float32")
    pair = parity.Pair(whole, gemma, cfg, parity.ours(source, cfg, gemma))
    ids = decoder_parity.drawn_ids(cfg.vocab, cfg.decoder_start_token_id, seed=3)
    batch = decoder_parity.inputs(ids)
    with torch.no_grad():
        expected = whole(**batch, token_type_ids=torch.zeros_like(batch["input_ids"])).logits
    actual = decoder_parity.our_logits(pair, ids)
    np.testing.assert_allclose(actual[ids.exists], expected.numpy()[ids.exists], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def gpt2_pair(tmp_path_factory):
    """A GPT-2 and ours."""
    return parity.read(draw_gpt2("gpt2")(0), tmp_path_factory.mktemp("theirs"))


def test_released_gpt2_files_leave_out_the_prefix_and_carry_masks(gpt2_pair):
    pair = gpt2_pair
    state = parity.state_of(pair)
    bare = {name.removeprefix("transformer."): array for name, array in state.items()}
    layers = range(pair.cfg.decoder.layers)
    bare |= {f"h.{layer}.attn.bias": np.tril(np.ones((1, 1, 16, 16))) for layer in layers}
    assert read("gpt2", bare).tied
    params = parity.ours(parity.State(bare), pair.cfg, gpt2)
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)
    bare["transformer.ln_f.bias"] = bare["ln_f.bias"]
    with pytest.raises(ValueError, match="ln_f.bias and transformer.ln_f.bias"):
        parity.ours(parity.State(bare), pair.cfg, gpt2)


def test_a_tied_head_in_the_file_has_to_equal_the_table(gpt2_pair):
    state = parity.state_of(gpt2_pair)
    state["lm_head.weight"] = state["transformer.wte.weight"].copy()
    parity.ours(parity.State(state), gpt2_pair.cfg, gpt2)
    state["lm_head.weight"][3, 4] += 1
    with pytest.raises(ValueError, match="lm_head.weight"):
        parity.ours(parity.State(state), gpt2_pair.cfg, gpt2)


LONGROPE = {"rope_type": "longrope", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LOCAL_LINEAR = {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}
# What the message names, model_type, fields of config.json.
UNREADABLE = [
    ("longrope", "llama", {"rope_parameters": LONGROPE | {"rope_theta": 1e4}}),
    (
        "max_position_embeddings",
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": None},
    ),
    (
        "beta_slow must be below RotaryScaling.beta_fast",
        "llama",
        {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 2}},
    ),
    ("factor", "llama", {"rope_scaling": {"type": "linear"}}),
    ("low_freq_factor", "llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}),
    ("mrope_section", "llama", {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 1]}}),
    ("partial_rotary_factor", "llama", {"partial_rotary_factor": 0.5}),
    ("rope_scaling", "llama", {"rope_scaling": "linear"}),
    ("quantization_config", "llama", {"quantization_config": {"quant_method": "gptq"}}),
    ("layer_types", "llama", {"layer_types": ["sliding_attention", "full_attention"]}),
    ("hidden_act", "llama", {"hidden_act": "gelu"}),
    ("hidden_size", "llama", {"hidden_size": None}),
    ("num_hidden_layers", "llama", {"num_hidden_layers": 2.5}),
    ("intermediate_size", "llama", {"intermediate_size": 0}),
    ("heads", "llama", {"num_key_value_heads": 2}),
    ("sliding_window", "qwen2", {"layer_types": ["sliding_attention", "full_attention"]}),
    ("layer_types", "qwen2", {"layer_types": ["full_attention"]}),
    ("layer_types", "qwen2", {"layer_types": ["chunked_attention"] * 2}),
    ("dual_chunk_attention_config", "qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}),
    ("longrope", "qwen2", {"rope_scaling": LONGROPE}),
    ("use_bidirectional_attention", "gemma3_text", {"use_bidirectional_attention": True}),
    ("use_bidirectional_attention", "gemma", {"use_bidirectional_attention": True}),
    ("final_logit_softcapping", "gemma", {"final_logit_softcapping": 30.0}),
    ("hidden_activation", "gemma2", {"hidden_activation": "gelu"}),
    ("query_pre_attn_scalar", "gemma2", {"query_pre_attn_scalar": 0}),
    ("sliding_window", "gemma2", {"sliding_window": None}),
    ("rope_type", "gemma2", {"rope_scaling": LONGROPE}),
    ("sliding_attention", "gemma3_text", {"rope_parameters": LOCAL_LINEAR}),
    ("rope_theta", "gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}),
    ("text_config", "gemma3", {}),
    *(
        (name, "gpt2", {name: value})
        for name, value in {
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
            "add_cross_attention": True,
            "activation_function": "gelu",
            "n_embd": None,
            "n_layer": "2",
            "n_head": 5,
        }.items()
    ),
]


@pytest.mark.parametrize("word, kind, changes", UNREADABLE)
def test_what_is_not_computed_is_refused_by_name(word, kind, changes):
    with pytest.raises(ValueError, match=word):
        read(kind, **changes)


SLIDES = {"pattern": ("sliding", "full"), "window": 3}
GEMMAS, QWENS = ("gemma", "gemma2", "gemma3_text"), ("qwen2", "qwen3")
# Families, what the message names, and fields of Stack or Model that config.json cannot express.
UNWRITABLE = [
    (("llama",), "Stack.gated", {"gated": False}),
    (("llama",), "Stack.norm", {"norm": "layer"}),
    (("llama",), "Stack.norm", {"norm": "rms_plus_one"}),
    (("llama",), "Stack.post_norms", {"post_norms": True}),
    (("llama",), "Stack.qk_norm", {"qk_norm": True}),
    (("llama",), "Stack.out_bias", {"qkv_bias": True}),
    (("llama",), "Stack.out_bias", {"out_bias": True}),
    (("llama",), "Stack.query_scale", {"query_scale": 0.5}),
    (("llama",), "Stack.softcap", {"softcap": 30.0}),
    (("llama",), "Stack.positions", {"positions": "relative"}),
    (("llama",), "Stack.sliding", SLIDES),
    (("llama",), "Model.scale_logits", {"scale_logits": True}),
    (("llama",), "Model.logits_softcap", {"logits_softcap": 30.0}),
    (("llama",), "Model.scale_embedding", {"scale_embedding": True}),
    (("llama",), "Model.prefix_lm", {"prefix_lm": True}),
    (("llama",), "Model.eoi", {"eoi": 3}),
    (("llama",), "Model.readout", {"readout": config.Readout("vector")}),
    (QWENS, "Stack.mlp_bias", {"mlp_bias": True}),
    (QWENS, "Stack.sliding_rotary_base", SLIDES | {"sliding_rotary_base": 50.0}),
    (QWENS, "Stack.softcap", {"softcap": 1.0}),
    (GEMMAS, "Stack.mlp_bias", {"mlp_bias": True}),
    (GEMMAS, "Stack.norm", {"norm": "rms"}),
    (GEMMAS, "Stack.query_scale", {"query_scale": 0.3}),
    (GEMMAS, "Stack.out_bias", {"out_bias": True}),
    (GEMMAS, "Model.scale_embedding", {"scale_embedding": False}),
]


@pytest.mark.parametrize(
    "kind, field, changes",
    [(kind, field, changes) for kinds, field, changes in UNWRITABLE for kind in kinds],
)
def test_what_config_json_cannot_express_is_not_written(kind, field, changes):
    cfg = read(kind)
    if field.startswith("Stack."):
        changes = {"decoder": dataclasses.replace(cfg.decoder, **changes)}
    with pytest.raises(ValueError, match=field):
        family_of_config({"model_type": kind} | FIELDS[kind]).config_json(
            dataclasses.replace(cfg, **changes)
        )


def test_an_encoder_is_not_written():
    stack = read("llama").decoder
    for decoder in (stack, None):
        with pytest.raises(ValueError, match="Model.encoder"):
            llama.config_json(config.Model(vocab=41, encoder=stack, decoder=decoder))


def test_export_chooses_the_family_that_can_express_it():
    for name, changes in {
        "llama": {},
        "qwen": {"qkv_bias": True},
        "gemma": {"norm": "rms_plus_one"},
    }.items():
        stack = dataclasses.replace(read("llama").decoder, **changes)
        cfg = config.Model(vocab=41, decoder=stack, scale_embedding=name == "gemma")
        assert huggingface.family_for_export(cfg).__name__.endswith(f".{name}")
