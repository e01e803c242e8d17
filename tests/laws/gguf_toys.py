# SPDX-License-Identifier: Apache-2.0
"""Tiny .gguf files of every architecture, written as llama.cpp's converter does.

Weights are drawn under Hugging Face's names; what the converter changes is done here once more, in
plain numpy.
"""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import sentencepiece

from t5x_lite.checkpoints import matching
from t5x_lite.checkpoints.formats import gguf as ours
from t5x_lite.checkpoints.formats import huggingface
from t5x_lite.tokenizers.renumbered import parse_proto

LAYERS, HEADS, KEY_HEADS, WIDTH, MLP, VOCABULARY = 6, 4, 2, 32, 128, 48
# What transformers does not read from a .gguf file but takes for granted; GPT-2's MLP too.
LENGTH = 1024
HEAD_DIMS = {"qwen3": 128, "gemma2": 256, "gemma3": 256}
EPSILON = 1e-5
ADDED = {"gemma", "gemma2", "gemma3"}
HEAD = {"llama", "qwen2"}
DECODERS = [name for name in ours.ARCHITECTURES if not name.startswith("t5")]


def head_dim(architecture: str) -> int:
    """Head size of the toy model."""
    return HEAD_DIMS.get(architecture, WIDTH // HEADS)


def metadata(architecture: str) -> dict:
    """Fields without the architecture's name before them."""
    fields = {
        "block_count": LAYERS,
        "context_length": LENGTH,
        "embedding_length": WIDTH,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "vocab_size": VOCABULARY,
    }
    if architecture == "gpt2":
        return fields | {"attention.layer_norm_epsilon": EPSILON}
    fields |= {
        "attention.head_count_kv": KEY_HEADS,
        "attention.layer_norm_rms_epsilon": EPSILON,
        "rope.freq_base": 5000.0,
        "attention.key_length": head_dim(architecture),
        "attention.value_length": head_dim(architecture),
        "rope.dimension_count": head_dim(architecture),
    }
    if architecture in ("gemma2", "gemma3"):
        fields["attention.sliding_window"] = 5
    if architecture == "gemma2":
        fields |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return fields


def add_toy_tokens(writer: gguf.GGUFWriter) -> None:
    """Adds tokens without a tokenizer."""
    writer.add_token_list([f"<{n}>" for n in range(VOCABULARY)])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)


def write(
    path: Path,
    architecture: str,
    tensors: dict,
    kind=None,
    fields: dict | None = None,
    extra: dict | None = None,
    *,
    add_tokens: Callable[[gguf.GGUFWriter], None] = add_toy_tokens,
) -> None:
    """Writes a .gguf file.

    Args:
      path: file to write.
      architecture: GGUF's name of the architecture.
      tensors: arrays under GGUF's names.
      kind: quantization of matrices; None for none.
      fields: metadata; None for that of the toy model.
      extra: metadata by whole names.
      add_tokens: adds the tokenizer.
    """
    writer = gguf.GGUFWriter(path, architecture)
    fields = metadata(architecture) if fields is None else fields
    named = {f"{architecture}.{name}": value for name, value in fields.items()} | (extra or {})
    kinds = {float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for name, value in named.items():
        kinds.get(type(value), writer.add_uint32)(name, value)
    add_tokens(writer)
    for name, array in tensors.items():
        raw = kind is None or array.ndim == 1 or array.shape[-1] % 32
        data = array if raw else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=None if raw else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a Hugging Face checkpoint of the toy model."""
    kind = ours.ARCHITECTURES[architecture]
    names = {"lm_head.weight"} if architecture in HEAD else set()
    cfg = huggingface.family_module(kind).parse_config(config_json(architecture), names)
    entries = huggingface.family_module(kind).entries(cfg)
    return {
        piece.theirs: piece.tensor_shape
        for piece in matching.map_weights(cfg, entries, matching.model_leaves(cfg))
    }


def config_json(architecture: str) -> dict:
    """config.json of the toy model."""
    shared = {
        "model_type": ours.ARCHITECTURES[architecture],
        "vocab_size": VOCABULARY,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "tie_word_embeddings": architecture not in HEAD,
    }
    if architecture == "gpt2":
        return shared | {
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": LENGTH,
            "n_inner": MLP,
            "layer_norm_epsilon": EPSILON,
            "activation_function": "gelu_new",
        }
    shared |= {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": head_dim(architecture),
        "intermediate_size": MLP,
        "rms_norm_eps": EPSILON,
        "rope_theta": 5000.0,
        "max_position_embeddings": LENGTH,
        "hidden_act": "gelu_pytorch_tanh" if architecture in ADDED else "silu",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }
    if architecture in ("gemma2", "gemma3"):
        shared |= {"query_pre_attn_scalar": head_dim(architecture), "sliding_window": 5}
    if architecture == "gemma3":
        shared |= {"rope_local_base_freq": 10000.0, "final_logit_softcapping": None}
    return shared


def draw(architecture: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names."""
    random = np.random.default_rng(seed)
    return {
        name: (0.3 * random.normal(size=shape)).astype(np.float32)
        for name, shape in shapes(architecture).items()
    }


def converted(architecture: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors as llama.cpp's converter writes them."""
    changed = {}
    for name, array in weights.items():
        named = numbered(name, architecture)
        if architecture == "llama" and (".attn_q." in named or ".attn_k." in named):
            heads = HEADS if ".attn_q." in named else KEY_HEADS
            split = array.reshape(heads, 2, WIDTH // HEADS // 2, *array.shape[1:])
            array = split.swapaxes(1, 2).reshape(array.shape)
        if architecture in ADDED and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if architecture == "gpt2" and ".c_" in name and array.ndim == 2:
            array = np.ascontiguousarray(array.T)
        changed[named] = array
    return changed


def numbered(name: str, architecture: str) -> str:
    """GGUF's name of a tensor of one layer, by the gguf package's own table."""
    kind = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    stem, _, part = name.rpartition(".")
    return f"{gguf.get_tensor_name_map(kind, LAYERS).get_name(stem)}.{part}"


def add_t5_tokenizer(model, padding=128, user=()):
    """Adds a SentencePiece model as llama.cpp's converter does.

    Args:
      model: content of its .model file.
      padding: ids that the model has beyond its tokenizer.
      user: names of added tokens that take the place of padding.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces, spec = list(parse_proto(model).pieces), parse_proto(model).normalizer_spec
    names = [piece.piece for piece in pieces]
    padded = [*user, *(f"[PAD{len(names) + k}]" for k in range(len(user), padding))]

    def add(writer):
        writer.add_tokenizer_model("t5")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([*names, *padded])
        scores = [-1000.0 if name in user else -10000.0 for name in padded]
        writer.add_token_scores([*(piece.score for piece in pieces), *scores])
        writer.add_token_types(
            [*(piece.type for piece in pieces), *(4 if name in user else 5 for name in padded)]
        )
        writer.add_add_space_prefix(spec.add_dummy_prefix)
        writer.add_remove_extra_whitespaces(spec.remove_extra_whitespaces)
        writer.add_precompiled_charsmap(spec.precompiled_charsmap)
        writer.add_eos_token_id(processor.eos_id())
        writer.add_unk_token_id(processor.unk_id())
        writer.add_pad_token_id(processor.pad_id())
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)

    return add
