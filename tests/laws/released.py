# SPDX-License-Identifier: Apache-2.0
"""config.json of released checkpoints, as far as it decides the model, by name of our preset."""


def decoder(model_type: str, sizes: tuple[int, int, int, int, int], shared: dict, **fields) -> dict:
    """A config.json of a lone decoder, under the names that all families but GPT-2 have.

    Args:
      model_type: the family.
      sizes: layers, width, query heads, key heads and hidden units of the MLP.
      shared: fields of the family.
      **fields: further fields.
    """
    layers, width, heads, key_heads, mlp = sizes
    named = dict(num_hidden_layers=layers, hidden_size=width, intermediate_size=mlp)
    named |= dict(num_attention_heads=heads, num_key_value_heads=key_heads)
    return {"model_type": model_type} | named | shared | fields


TIED = dict(tie_word_embeddings=True)
SILU = TIED | dict(hidden_act="silu")
QWEN = SILU | dict(rms_norm_eps=1e-6, bos_token_id=151643, vocab_size=151936)
QWEN |= dict(rope_theta=1000000, use_sliding_window=False)
GEMMA = dict(rms_norm_eps=1e-6, rope_theta=10000.0, bos_token_id=2, vocab_size=256000)
TANH = dict(hidden_activation="gelu_pytorch_tanh")
LLAMA3_ROPE = dict(
    factor=32.0,
    high_freq_factor=4.0,
    low_freq_factor=1.0,
    original_max_position_embeddings=8192,
    rope_type="llama3",
)
# As of the first commits of the checkpoints.
RELEASED_DECODERS = {
    "gpt2": dict(
        model_type="gpt2",
        activation_function="gelu_new",
        bos_token_id=50256,
        initializer_range=0.02,
        layer_norm_epsilon=1e-5,
        n_ctx=1024,
        n_embd=768,
        n_head=12,
        n_layer=12,
        n_positions=1024,
        vocab_size=50257,
    ),
    "smollm2_135m": decoder(
        "llama",
        (30, 576, 9, 3, 1536),
        TIED | dict(rms_norm_eps=1e-5, rope_interleaved=False, rope_scaling=None),
        rope_theta=100000,
        bos_token_id=0,
        vocab_size=49152,
    ),
    "llama3_2_1b": decoder(
        "llama",
        (16, 2048, 32, 8, 8192),
        SILU | dict(attention_bias=False, mlp_bias=False, head_dim=64, rms_norm_eps=1e-5),
        rope_scaling=LLAMA3_ROPE,
        rope_theta=500000.0,
        bos_token_id=128000,
        vocab_size=128256,
    ),
    "qwen2_5_0_5b": decoder(
        "qwen2", (24, 896, 14, 2, 4864), QWEN, max_window_layers=24, sliding_window=32768
    ),
    "qwen3_0_6b": decoder(
        "qwen3",
        (28, 1024, 16, 8, 3072),
        QWEN | dict(attention_bias=False, head_dim=128, rope_scaling=None),
        max_window_layers=28,
        sliding_window=None,
    ),
    "gemma_2b": decoder(
        "gemma",
        (18, 2048, 8, 1, 16384),
        GEMMA | dict(attention_bias=False, head_dim=256, rope_scaling=None),
        hidden_act="gelu",
    ),
    "gemma2_27b": decoder(
        "gemma2",
        (46, 4608, 32, 16, 36864),
        GEMMA | TANH | dict(hidden_act="gelu_pytorch_tanh", head_dim=128),
        attn_logit_softcapping=50.0,
        cache_implementation="hybrid",
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=144,
        sliding_window=4096,
    ),
    "gemma3_1b": decoder(
        "gemma3_text",
        (26, 1152, 4, 1, 6912),
        GEMMA | TANH | dict(head_dim=256, query_pre_attn_scalar=256, vocab_size=262144),
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=512,
        sliding_window_pattern=6,
    ),
    "gemma3_4b": dict(
        model_type="gemma3",
        boi_token_index=255999,
        eos_token_id=[1, 106],
        text_config=dict(
            model_type="gemma3_text",
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=34,
            rope_scaling=dict(factor=8.0, rope_type="linear"),
            sliding_window=1024,
        ),
    ),
}
T5 = dict(model_type="t5", decoder_start_token_id=0, d_kv=64, vocab_size=32128)
T5_SMALL = dict(d_ff=2048, d_model=512, num_heads=8, num_layers=6, n_positions=512)
T5_BASE = dict(d_ff=2048, d_model=768, num_decoder_layers=12, num_heads=12, num_layers=12)
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
ALTERNATING = 4 * ["sliding_attention", "full_attention"]
T5GEMMA_S = dict(
    attention_bias=False,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    head_dim=64,
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=512,
    intermediate_size=1024,
    layer_types=ALTERNATING,
    num_attention_heads=8,
    num_hidden_layers=8,
    num_key_value_heads=8,
    query_pre_attn_scalar=64,
    rope_theta=10000.0,
    sliding_window=4096,
    vocab_size=256000,
)
T5GEMMA2_270M = dict(
    _sliding_window_pattern=6,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    head_dim=256,
    hidden_size=640,
    intermediate_size=2048,
    layer_types=3 * [*5 * ["sliding_attention"], "full_attention"],
    num_attention_heads=4,
    num_hidden_layers=18,
    num_key_value_heads=1,
    query_pre_attn_scalar=256,
    rope_parameters={
        "full_attention": {"factor": 8.0, "rope_theta": 1000000, "rope_type": "linear"},
        "sliding_attention": {"rope_theta": 10000, "rope_type": "default"},
    },
    sliding_window=512,
    use_bidirectional_attention=False,
    vocab_size=262144,
)
BART = dict(decoder_start_token_id=2, dropout=0.1, max_position_embeddings=1024)


def bart_like(model_type: str, sizes: tuple[int, int, int, int], **fields) -> dict:
    """A config.json of the families around BART, whose stacks are alike.

    Args:
      model_type: the family.
      sizes: layers, width, heads and hidden units of the MLP.
      **fields: further fields.
    """
    layers, width, heads, mlp = sizes
    stacks = {}
    for name in ("encoder", "decoder"):
        stacks |= {f"{name}_layers": layers, f"{name}_attention_heads": heads}
        stacks |= {f"{name}_ffn_dim": mlp}
    return BART | {"model_type": model_type, "d_model": width} | stacks | fields


GELU, RELU = dict(activation_function="gelu"), dict(activation_function="relu")
LARGE = (12, 1024, 16, 4096)
BART_LIKE = {
    "bart_base": bart_like(
        "bart", (6, 768, 12, 3072), **GELU, vocab_size=50265, scale_embedding=False
    ),
    "bart_large": bart_like("bart", LARGE, **GELU, vocab_size=50265, scale_embedding=False),
    "mbart50_large": bart_like("mbart", LARGE, **GELU, vocab_size=250054, scale_embedding=True),
    "m2m100_418m": bart_like("m2m_100", LARGE, **RELU, vocab_size=128112, scale_embedding=True),
    "nllb_600m": bart_like("m2m_100", LARGE, **RELU, vocab_size=256206, scale_embedding=True),
    "marian_base": bart_like(
        "marian",
        (6, 512, 8, 2048),
        activation_function="swish",
        decoder_start_token_id=58100,
        max_position_embeddings=512,
        pad_token_id=58100,
        vocab_size=58101,
        scale_embedding=True,
    ),
    "pegasus_large": bart_like(
        "pegasus",
        (16, 1024, 16, 4096),
        **RELU,
        decoder_start_token_id=0,
        vocab_size=96103,
        scale_embedding=True,
    ),
}
# With: whether the file has a head of its own.
RELEASED_ENCODER_DECODERS = {
    **{name: (fields, False) for name, fields in BART_LIKE.items()},
    "t5_1_0_small": (T5 | T5_SMALL, False),
    "t5_1_1_base": (T5 | T5_BASE | GATED, True),
    "flan_t5_base": (T5 | T5_BASE | GATED | {"dense_act_fn": "gelu_new"}, True),
    "mt5_base": (T5 | T5_BASE | GATED | {"model_type": "mt5", "vocab_size": 250112}, True),
    "umt5_base": (T5 | T5_BASE | GATED | {"model_type": "umt5", "vocab_size": 256384}, True),
    "byt5_small": (
        T5
        | GATED
        | dict(d_ff=3584, d_model=1472, num_heads=6, num_layers=12, num_decoder_layers=4)
        | {"vocab_size": 384},
        True,
    ),
    "ul2_20b": (
        T5
        | dict(d_ff=16384, d_kv=256, d_model=4096, num_heads=16, num_layers=32)
        | dict(feed_forward_proj="gated-silu", num_decoder_layers=32),
        False,
    ),
    "t5gemma_s_s": (
        {"model_type": "t5gemma", "encoder": T5GEMMA_S, "decoder": T5GEMMA_S},
        False,
    ),
    "t5gemma2_270m": (
        {
            "model_type": "t5gemma2",
            "encoder": {"text_config": T5GEMMA2_270M, "eoi_token_index": 256000},
            "decoder": T5GEMMA2_270M,
        },
        False,
    ),
}
