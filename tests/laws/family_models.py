# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of transformers, one function for each way of drawing them.

Sizes are drawn by seed: odd numbers of heads, unequal depths, widths that have little to do with
one another.
"""

from collections.abc import Callable

import numpy as np
import torch
import transformers
from parity import shaken

from t5x_lite.checkpoints.formats.huggingface import t5gemma2

VOCAB = 31  # of all T5Gemmas and lone encoders
EOI = 17  # of T5Gemma 2
# Fields of a config class that stand in for defaults of its full size.
FIELDS = {
    transformers.Qwen2Config: dict(bos_token_id=5),
    transformers.Qwen3Config: dict(bos_token_id=5),
    transformers.Gemma2Config: dict(sliding_window=5, query_pre_attn_scalar=10),
    transformers.Gemma3TextConfig: dict(sliding_window=5, query_pre_attn_scalar=10),
}


def drawn_sizes(seed: int, name: str) -> dict:
    """Sizes of a lone decoder, under Llama's names in config.json."""
    draw = np.random.default_rng([seed, *name.encode()])
    heads = int(draw.choice([2, 3, 5, 6]))
    key_heads = int(draw.choice([count for count in range(1, heads + 1) if heads % count == 0]))
    return dict(
        vocab_size=int(draw.integers(30, 60)),
        # transformers wants a multiple of the heads, also where head_dim is another.
        hidden_size=heads * int(draw.integers(4, 8)),
        intermediate_size=int(draw.integers(10, 40)),
        num_hidden_layers=int(draw.integers(2, 4)),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=2 * int(draw.integers(2, 7)),
    )


def random_decoder(described: transformers.PreTrainedConfig, seed: int) -> torch.nn.Module:
    """A lone decoder of transformers with random weights, norms and biases included."""
    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_config(described, attn_implementation="eager", dtype=torch.float32)
    return shaken(theirs, seed, scale=0.3)


def llama_like(name: str, kind: type, **fields) -> Callable[[int], torch.nn.Module]:
    """Draws models whose config.json has Llama's names.

    Args:
      name: name in the table, which sizes depend on.
      kind: config class of transformers.
      **fields: fields of the config, before those that are drawn.
    """

    def draw(seed):
        shared = dict(max_position_embeddings=64, pad_token_id=None) | FIELDS.get(kind, {})
        described = kind(**shared | drawn_sizes(seed, name) | fields)
        return random_decoder(described, seed)

    return draw


def gpt2(name: str, **fields) -> Callable[[int], torch.nn.Module]:
    """Draws models of GPT-2.

    Args:
      name: name in the table, which sizes depend on.
      **fields: fields of the config, before those that are drawn.
    """

    def draw(seed):
        sizes = drawn_sizes(seed, name)
        described = transformers.GPT2Config(
            vocab_size=sizes["vocab_size"],
            n_embd=sizes["hidden_size"],
            n_head=sizes["num_attention_heads"],
            n_layer=sizes["num_hidden_layers"],
            n_positions=16,
            bos_token_id=29,
            eos_token_id=29,
            layer_norm_epsilon=1e-4,
            **fields,
        )
        return random_decoder(described, seed)

    return draw


def t5_config(kind: type, seed: int, **changes):
    """A tiny config of the T5 family.

    Args:
      kind: class of the model in transformers.
      seed: seed of the draw.
      **changes: fields of the config.
    """
    draw = np.random.default_rng(seed)
    fields = dict(
        vocab_size=int(draw.integers(20, 40)),
        d_model=int(draw.integers(3, 9)) * 2,
        d_kv=int(draw.integers(3, 8)),
        d_ff=int(draw.integers(9, 30)),
        num_heads=int(draw.choice([1, 3, 5])),
        num_layers=int(draw.integers(2, 4)),
        num_decoder_layers=int(draw.integers(1, 4)),
        relative_attention_num_buckets=int(draw.choice([6, 8, 12])),
        relative_attention_max_distance=int(draw.integers(8, 12)),
        layer_norm_epsilon=float(draw.choice([1e-6, 1e-3])),
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return kind.config_class(**fields | changes)


def t5(kind: type, tied: bool = False, **changes) -> Callable[[int], torch.nn.Module]:
    """Draws models of the T5 family.

    Args:
      kind: class of the model in transformers.
      tied: the head is the embedding table.
      **changes: fields of the config.
    """

    def draw(seed):
        theirs = kind._from_config(t5_config(kind, seed, **changes), attn_implementation="eager")
        if not tied:
            # transformers 5 ties every new T5; only weights of its own make a head untied.
            theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
        return shaken(theirs, seed)

    return draw


def t5gemma_half(draw: np.random.Generator) -> dict:
    """One stack of a T5Gemma: odd groups of query heads, a window shorter than the inputs."""
    kv_heads = int(draw.choice([1, 2, 3]))
    heads = kv_heads * int(draw.choice([1, 2, 3]))
    return dict(
        hidden_size=heads * int(draw.integers(2, 5)),
        intermediate_size=int(draw.integers(9, 30)),
        num_hidden_layers=int(draw.integers(2, 4)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(draw.integers(2, 5)) * 2,
        query_pre_attn_scalar=int(draw.integers(3, 9)),
        sliding_window=int(draw.integers(2, 6)),
        attn_logit_softcapping=float(draw.choice([2.0, 50.0])),
        final_logit_softcapping=float(draw.choice([3.0, 30.0])),
        attention_bias=bool(draw.integers(2)),
        vocab_size=VOCAB,
    )


def t5gemma(seed: int) -> torch.nn.Module:
    """Draws a T5Gemma."""
    draw = np.random.default_rng(seed)
    halves = {name: t5gemma_half(draw) for name in ("encoder", "decoder")}
    described = transformers.T5GemmaConfig(**halves, vocab_size=VOCAB)
    kind = transformers.T5GemmaForConditionalGeneration
    return shaken(kind._from_config(described, attn_implementation="eager"), seed)


def t5gemma2_half(draw: np.random.Generator, **fields) -> dict:
    """One stack of a T5Gemma 2."""
    kv_heads = int(draw.choice([1, 2, 3]))
    heads = kv_heads * int(draw.choice([1, 2, 3]))
    return fields | dict(
        intermediate_size=int(draw.integers(9, 30)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(draw.integers(2, 5)) * 2,
        query_pre_attn_scalar=int(draw.integers(3, 9)),
        sliding_window=int(draw.integers(2, 7)),
        final_logit_softcapping=None if draw.integers(2) else 5.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0}
            if draw.integers(2)
            else {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
        vocab_size=VOCAB,
    )


def t5gemma2_text(seed: int) -> torch.nn.Module:
    """Draws a T5Gemma 2: five sliding layers to a full one, or an uneven pattern."""
    draw = np.random.default_rng(seed)
    width = 36  # of both stacks, and a multiple of every number of heads that is drawn
    layers = int(draw.choice([6, 7]))
    short = {"num_hidden_layers": 3, "layer_types": ["full_attention", *2 * ["sliding_attention"]]}
    text = t5gemma2_half(draw, hidden_size=width, num_hidden_layers=layers)
    decoder = t5gemma2_half(draw, hidden_size=width, **short)
    encoder = {
        "text_config": text,
        "vision_config": t5gemma2.SMALLEST_VISION,
        "mm_tokens_per_image": 1,
        "eoi_token_index": EOI,
    }
    described = transformers.T5Gemma2Config(encoder=encoder, decoder=decoder)
    kind = transformers.T5Gemma2ForConditionalGeneration
    return shaken(kind._from_config(described, attn_implementation="eager"), seed)


def lone_encoder(kind: type) -> Callable[[int], torch.nn.Module]:
    """Draws lone encoders of a class of transformers."""

    def draw(seed):
        if kind is transformers.T5GemmaEncoderModel:
            halves = {"encoder": t5gemma_half(np.random.default_rng(seed))}
            described = kind.config_class(**halves, is_encoder_decoder=False, vocab_size=VOCAB)
        else:
            described = t5_config(kind, seed, vocab_size=VOCAB, feed_forward_proj="gated-gelu")
        return shaken(kind._from_config(described, attn_implementation="eager"), seed)

    return draw


def bart_like(kind: type, **changes) -> Callable[[int], torch.nn.Module]:
    """Draws models of the families around BART.

    Args:
      kind: class of the model in transformers.
      **changes: fields of the config.
    """

    def draw(seed):
        draw = np.random.default_rng(seed)
        heads = [int(each) for each in draw.choice([1, 2, 3], 2)]
        layers = [int(each) for each in draw.integers(1, 4, 2)]
        sizes = {"vocab_size": int(draw.integers(20, 40)), "d_model": 6 * int(draw.integers(1, 4))}
        for name, count, depth in zip(("encoder", "decoder"), heads, layers, strict=True):
            sizes |= {f"{name}_attention_heads": count, f"{name}_layers": depth}
            sizes |= {f"{name}_ffn_dim": int(draw.integers(9, 30)), f"{name}_layerdrop": 0.0}
        fields = sizes | dict(
            max_position_embeddings=16,
            scale_embedding=bool(draw.integers(2)),
            activation_function=str(draw.choice(["gelu", "relu", "swish", "gelu_new"])),
            dropout=0.0,
            attention_dropout=0.0,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
        described = kind.config_class(**fields | changes)
        theirs = kind._from_config(described, attn_implementation="eager")
        if hasattr(theirs, "final_logits_bias"):
            # A buffer there; as a parameter it is drawn, and has a gradient to compare.
            bias = theirs.final_logits_bias.detach().clone()
            del theirs.final_logits_bias
            theirs.final_logits_bias = torch.nn.Parameter(bias)
        return shaken(theirs, seed)

    return draw
