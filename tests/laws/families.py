# SPDX-License-Identifier: Apache-2.0
"""Table of the families whose numbers are those of transformers, and what is special about each."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

import decoder_parity
import encoder_decoder_parity
import encoder_parity
import numpy as np
import torch
import transformers
from family_models import EOI, bart_like, gpt2, llama_like, lone_encoder, t5, t5gemma, t5gemma2_text

from t5x_lite import config


class Family(NamedTuple):
    """Tiny models of a family, and what is special about comparing them.

    Attributes:
      draw: random model of transformers, by seed.
      laws: module of the layout: the outputs to compare, and ids for them.
      gradients: comparison of gradients, for the first seed.
      seeds: seeds that are compared; others change sizes alone.
      exhaustive_seeds: seeds beyond those.
      start: first id of the decoder; None takes the architecture's.
      adjust: turns our architecture into the one that transformers computes.
      ids: changes the random ids.
      loads: class of transformers that loads the export; None for the model's own.
      lacks: regular expression of their tensors that ours lacks; empty for none.
    """

    draw: Callable[[int], torch.nn.Module]
    laws: ModuleType
    gradients: Literal["never", "exhaustive", "always"] = "never"
    seeds: tuple[int, ...] = (0,)
    exhaustive_seeds: tuple[int, ...] = (1, 2, 3)
    start: int | None = None
    adjust: Callable[[config.Model], config.Model] = lambda cfg: cfg
    ids: Callable[[Any], Any] = lambda ids: ids
    loads: type | None = None
    lacks: str = ""


def window_within(cfg: config.Model) -> config.Model:
    """cfg whose encoder sees |q - k| <= window, as transformers 5.23 computes it; t5gemma.py says
    why the family reads its files as |q - k| < window.
    """
    return dataclasses.replace(cfg, encoder=dataclasses.replace(cfg.encoder, window_form="within"))


def with_eoi(ids: encoder_decoder_parity.Ids) -> encoder_decoder_parity.Ids:
    """ids with an end-of-image token on both sides."""
    ids.inputs[:, 5], ids.decoder[:, 3] = EOI, EOI
    return ids


LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
    rope_theta=1000.0,
)
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
STRETCHED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
WINDOWED = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
NO_SOFTCAPS = dict(attn_logit_softcapping=None, final_logit_softcapping=None)
SOFTCAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
LLAMA, GEMMA = transformers.LlamaConfig, transformers.GemmaConfig
QWEN2, QWEN3 = transformers.Qwen2Config, transformers.Qwen3Config
GEMMA2, GEMMA3 = transformers.Gemma2Config, transformers.Gemma3TextConfig
# name -> comparison of gradients, config class, fields of the config.
LLAMA_LIKE = {
    "llama, one key head, tied": (
        "never",
        LLAMA,
        dict(num_key_value_heads=1, tie_word_embeddings=True),
    ),
    "llama, biases": ("always", LLAMA, dict(attention_bias=True, mlp_bias=True)),
    "llama, llama3 positions": (
        "never",
        LLAMA,
        dict(rope_parameters=LLAMA3, rms_norm_eps=1e-3, head_dim=12),
    ),
    "llama, linear positions": ("never", LLAMA, dict(rope_parameters=LINEAR)),
    # Qwen 3 has more of the same.
    "qwen2": ("exhaustive", QWEN2, dict()),
    "qwen2, windows from the second layer on": (
        "never",
        QWEN2,
        dict(WINDOWED, num_hidden_layers=3),
    ),
    "qwen3, one key head": ("never", QWEN3, dict(num_key_value_heads=1)),
    "qwen3, biases, windows": (
        "always",
        QWEN3,
        dict(WINDOWED, attention_bias=True, tie_word_embeddings=True, rope_theta=700.0),
    ),
    "gemma, one key head": ("always", GEMMA, dict(num_key_value_heads=1)),
    "gemma, biases, untied": (
        "never",
        GEMMA,
        dict(attention_bias=True, tie_word_embeddings=False),
    ),
    "gemma2, softcaps": (
        "always",
        GEMMA2,
        dict(SOFTCAPS, sliding_window=3, query_pre_attn_scalar=7),
    ),
    "gemma2, no softcaps": ("never", GEMMA2, dict(NO_SOFTCAPS, num_hidden_layers=3)),
    "gemma3, both positions": (
        "always",
        GEMMA3,
        dict(num_hidden_layers=3, rope_parameters=STRETCHED, sliding_window=4)
        | dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"]),
    ),
    # transformers has the field in a Gemma 3 and does not compute it.
    "gemma3, a softcap that is ignored": (
        "never",
        GEMMA3,
        dict(attn_logit_softcapping=0.5, num_hidden_layers=2),
    ),
    "gemma3, windows only": (
        "never",
        GEMMA3,
        dict(sliding_window=2, final_logit_softcapping=4.0),
    ),
}
GPT2 = {
    "gpt2": ("always", dict()),
    "gpt2, own inner width, untied": ("never", dict(n_inner=28, tie_word_embeddings=False)),
    "gpt2, unscaled scores, relu": (
        "never",
        dict(scale_attn_weights=False, activation_function="relu"),
    ),
}
T5, MT5 = transformers.T5ForConditionalGeneration, transformers.MT5ForConditionalGeneration
UMT5 = transformers.UMT5ForConditionalGeneration
GATED = dict(feed_forward_proj="gated-gelu")
T5_LIKE = {
    "t5_1_0": Family(t5(T5, tied=True, feed_forward_proj="relu"), encoder_decoder_parity, "always"),
    "t5_1_1": Family(t5(T5, tie_word_embeddings=False, **GATED), encoder_decoder_parity),
    # A ByT5 is a T5 1.1 of unequal depths.
    "byt5": Family(
        t5(T5, tie_word_embeddings=False, num_layers=3, num_decoder_layers=1, **GATED),
        encoder_decoder_parity,
        seeds=(5,),
    ),
    "ul2": Family(t5(T5, tied=True, feed_forward_proj="gated-silu"), encoder_decoder_parity),
    # The same numbers under T5's name.
    "mt5": Family(t5(MT5, **GATED), encoder_decoder_parity, loads=T5),
    "umt5": Family(t5(UMT5, **GATED), encoder_decoder_parity, "always"),
}
BART, MARIAN = transformers.BartForConditionalGeneration, transformers.MarianMTModel
MBART, PEGASUS = (
    transformers.MBartForConditionalGeneration,
    transformers.PegasusForConditionalGeneration,
)
M2M100 = transformers.M2M100ForConditionalGeneration


def padded_right(ids: encoder_decoder_parity.Ids) -> encoder_decoder_parity.Ids:
    """ids with padding of id 1, after the tokens alone: M2M100's positions skip that id."""
    exists = np.sort(ids.exists, axis=1)[:, ::-1]
    ids.inputs[:] = np.where(exists, np.where(ids.exists, ids.inputs, ids.inputs[:, ::-1]), 1)
    return ids._replace(exists=exists.copy())


# Seeds draw biases, softcaps and kinds of positions, too.
SEVERAL = dict(gradients="always", seeds=(0, 1), exhaustive_seeds=tuple(range(2, 8)))
FIFTY = dict(gradients="always", laws=encoder_decoder_parity, exhaustive_seeds=tuple(range(50)))
# BART has the blocks of these, M2M100 their positions. A seed draws the same for all of them.
LIKE_BART = FIFTY | dict(gradients="exhaustive")
# transformers gives the embedding of padding no gradient, which Marian and Pegasus begin with.
FROM_PADDING = LIKE_BART | dict(start=5, lacks=r"model\.(en|de)coder\.embed_positions")
BART_LIKE = {
    "bart": Family(bart_like(BART), **FIFTY),
    "mbart": Family(bart_like(MBART), seeds=(1,), **LIKE_BART),
    "m2m100": Family(bart_like(M2M100), ids=padded_right, seeds=(2,), **FIFTY),
    "marian": Family(bart_like(MARIAN, pad_token_id=2, eos_token_id=0), seeds=(3,), **FROM_PADDING),
    "pegasus": Family(
        bart_like(PEGASUS, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0),
        seeds=(4,),
        **FROM_PADDING,
    ),
}
FAMILIES = {
    **{
        name: Family(llama_like(name, kind, **fields), decoder_parity, gradients)
        for name, (gradients, kind, fields) in LLAMA_LIKE.items()
    },
    **{
        name: Family(gpt2(name, **fields), decoder_parity, gradients)
        for name, (gradients, fields) in GPT2.items()
    },
    **T5_LIKE,
    **BART_LIKE,
    # Gemma 2 and T5Gemma 2 together have its gradients.
    "t5gemma": Family(
        t5gemma,
        encoder_decoder_parity,
        adjust=window_within,
        start=2,
        **SEVERAL | dict(gradients="exhaustive"),
    ),
    "t5gemma2": Family(
        t5gemma2_text,
        encoder_decoder_parity,
        ids=with_eoi,
        lacks=r"model\.encoder\.(vision_tower|multi_modal_projector)\.",
        start=2,
        **SEVERAL,
    ),
    "t5 encoder": Family(lone_encoder(transformers.T5EncoderModel), encoder_parity, seeds=(3,)),
    "mt5 encoder": Family(
        lone_encoder(transformers.MT5EncoderModel),
        encoder_parity,
        seeds=(3,),
        loads=transformers.T5EncoderModel,
    ),
    "umt5 encoder": Family(lone_encoder(transformers.UMT5EncoderModel), encoder_parity, seeds=(3,)),
    "t5gemma encoder": Family(
        lone_encoder(transformers.T5GemmaEncoderModel),
        encoder_parity,
        seeds=(3,),
        adjust=window_within,
    ),
}
