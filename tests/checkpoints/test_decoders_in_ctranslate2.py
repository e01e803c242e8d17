# SPDX-License-Identifier: Apache-2.0
"""Exports for transformers go through CTranslate2's converter with the same logits."""

import json

import ctranslate2
import decoder_parity
import numpy as np
import parity
import pytest
import tokenizers
import transformers
from conftest import mark_exhaustive
from family_models import random_decoder

VOCAB = 40
SHARED = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=2)
SHARED |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, bos_token_id=1)
GEMMA = SHARED | dict(query_pre_attn_scalar=8, pad_token_id=0, sliding_window=64)
CONFIGS = {
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_head=4, n_layer=2, n_positions=32, bos_token_id=1
    ),
    "llama": transformers.LlamaConfig(
        **SHARED, rope_parameters={"rope_type": "default", "rope_theta": 777.0}
    ),
    "qwen2": transformers.Qwen2Config(**SHARED, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SHARED),
    "gemma": transformers.GemmaConfig(**SHARED, pad_token_id=0),
    # CTranslate2 4.8 leaves Gemma 2's softcaps out.
    "gemma2": transformers.Gemma2Config(
        **GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "gemma3": transformers.Gemma3TextConfig(**GEMMA),
}


def words(folder) -> list[str]:
    """A tokenizer of one word for each id, written to folder."""
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>")
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | kind))
    return names


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # Gemma 3 has all that the others have but GPT-2's; test_export_families has a Llama.
    mark_exhaustive(CONFIGS, kept=["gpt2", "gemma3"]),
)
def test_ctranslate2_computes_the_same(name, tmp_path):
    pair = parity.read(random_decoder(CONFIGS[name], len(name)), tmp_path / "theirs")
    folder = tmp_path / "ours"
    parity.write_export(pair, folder, eos_token_id=2, pad_token_id=0)
    names = words(folder)
    converted = str(tmp_path / "converted")
    ctranslate2.converters.TransformersConverter(str(folder)).convert(converted)
    generator = ctranslate2.Generator(converted, compute_type="float32", intra_threads=1)
    ids = decoder_parity.drawn_ids(VOCAB, pair.cfg.decoder_start_token_id, seed=4)
    whole = decoder_parity.Ids(ids.tokens[2:], ids.exists[2:])
    rows = [[names[token] for token in whole.tokens[0]]]
    logits = np.asarray(generator.forward_batch(rows))
    np.testing.assert_allclose(logits, decoder_parity.our_logits(pair, whole), atol=1e-3, rtol=0)
