# SPDX-License-Identifier: Apache-2.0
"""Tiny T5s of transformers as .gguf files, written as llama.cpp's converter does."""

import gguf
import gguf_toys
import numpy as np
import transformers
from family_models import t5, t5_config
from parity import shaken

T5, UMT5 = transformers.T5ForConditionalGeneration, transformers.UMT5ForConditionalGeneration
# Rows of quantized tensors are multiples of 32. llama.cpp knows one largest distance.
SIZES = dict(d_model=32, d_kv=8, d_ff=64, num_heads=4, relative_attention_max_distance=128)
GATED = SIZES | dict(feed_forward_proj="gated-gelu", num_layers=2, num_decoder_layers=3)
TOYS = {
    "tied": t5(T5, tied=True, feed_forward_proj="relu", **SIZES),
    "gated": t5(T5, tie_word_embeddings=False, **GATED),
    "umt5": t5(UMT5, tie_word_embeddings=False, **GATED),
}


def lone_toy(seed):
    """An encoder alone, of widths that can be quantized."""
    described = t5_config(transformers.T5EncoderModel, seed, **GATED)
    return shaken(transformers.T5EncoderModel(described), seed)


def t5_metadata(described) -> dict:
    """Fields of a T5 as llama.cpp's converter writes them."""
    return {
        "context_length": 512,
        "embedding_length": described.d_model,
        "feed_forward_length": described.d_ff,
        "block_count": described.num_layers,
        "decoder_block_count": described.num_decoder_layers,
        "attention.head_count": described.num_heads,
        "attention.key_length": described.d_kv,
        "attention.value_length": described.d_kv,
        "attention.layer_norm_epsilon": described.layer_norm_epsilon,
        "attention.layer_norm_rms_epsilon": described.layer_norm_epsilon,
        "attention.relative_buckets_count": described.relative_attention_num_buckets,
        "decoder_start_token_id": described.decoder_start_token_id,
    }


def t5_tensors(theirs) -> dict[str, np.ndarray]:
    """The tensors under the names of the gguf package's own table, a shared table once."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, 8)
    arrays = {}
    for name, tensor in theirs.state_dict().items():
        if not name.endswith("embed_tokens.weight"):
            stem, _, part = name.rpartition(".")
            arrays[f"{names.get_name(stem)}.{part}"] = tensor.numpy()
    if np.array_equal(arrays.get("output.weight"), arrays["token_embd.weight"]):
        del arrays["output.weight"]
    return arrays


def write_t5(path, theirs, architecture="t5", kind=None, **options):
    """Writes a T5 of transformers as a .gguf file.

    Args:
      path: file to write.
      theirs: the model.
      architecture: GGUF's name for it.
      kind: quantization of matrices; None for none.
      **options: further options of `gguf_toys.write`.
    """
    fields = t5_metadata(theirs.config)
    if architecture == "t5encoder":
        del fields["decoder_block_count"], fields["decoder_start_token_id"]
    gguf_toys.write(path, architecture, t5_tensors(theirs), kind, fields, **options)
    return path
