# SPDX-License-Identifier: Apache-2.0
"""Presets of configs/models, and their numbers of weights as they were published."""

from t5x_lite import config
from t5x_lite.config import gin_file


def preset(name: str) -> config.Model:
    """Architecture of configs/models/NAME.gin."""
    lines = gin_file.read_lines(f"configs/models/{name}.gin")
    for binding in ('config.Run.model_dir = "none"', "config.Run.model = @config.Model()"):
        lines.append(gin_file.Line(binding, "the test"))
    return gin_file.parse_lines(lines, []).model


# Exact: weights in the released files (their safetensors headers as counted on huggingface.co), a
# table that serves as head too counted once; the buffers in GPT-2's and the repeated heads in
# Qwen 3's files are left out.
DECODERS = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "tinyllama_1_1b": 1_100_048_384,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_1_8b": 8_030_261_248,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 2_031_739_904 - 151_936 * 2048,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    # 4,300,079,472 with the vision tower (416,866,032) and the projection from it (2,950,272).
    "gemma3_4b": 4_300_079_472 - 416_866_032 - 2_950_272,
}
# The first lines of T5X's base.gin and xxl.gin count a bias table for each layer, though all
# layers share one; base.gin's also counts a head beside the embedding.
T5X = {
    "t5x_decoder_base": 134_307_072 - 11 * 32 * 12 - 32_128 * 768,
    "t5x_decoder_xxl": 4_762_357_760 - 23 * 32 * 64,
}
# From their layers' shapes by hand: 4 d n h + 3 d f + 2 d in each, and table, biases, norm.
BY_HAND = {
    "t5x_decoder_small": 8 * (4 * 512 * 384 + 3 * 512 * 1024 + 1024) + 32_128 * 512 + 32 * 6 + 512,
    "t5x_decoder_large": 24 * (4 * 1024**2 + 3 * 1024 * 2816 + 2048)
    + (32_128 * 1024 + 32 * 16 + 1024),
    "t5x_decoder_xl": 24 * (4 * 2048**2 + 3 * 2048 * 5120 + 4096) + 32_128 * 2048 + 32 * 32 + 2048,
}
# Millions, with the digits that were published; all embedding tables and heads are counted.
# T5 1.0 and 1.1: what the Hub counts in google-t5/t5-* and google/t5-v1_1-*. Flan-T5 is T5 1.1.
T5 = {
    "t5_1_0_small": "60.5",
    "t5_1_0_base": "222.9",
    "t5_1_0_large": "737.7",
    "t5_1_0_3b": "2.85e3",
    "t5_1_0_11b": "11.3e3",
    "t5_1_1_small": "76.96",
    "t5_1_1_base": "247.6",
    "t5_1_1_large": "783.2",
    "t5_1_1_xl": "2.85e3",
    "t5_1_1_xxl": "11.1e3",
    "flan_t5_small": "76.96",
    "flan_t5_base": "247.6",
    "flan_t5_large": "783.2",
    "flan_t5_xl": "2.85e3",
    "flan_t5_xxl": "11.1e3",
}
# mT5 and ByT5: table 1 of ByT5 (Xue et al., 2022), which compares the two. UL2: "20B" is the name
# (Tay et al., 2023).
MULTILINGUAL = {
    "mt5_small": "300",
    "mt5_base": "582",
    "mt5_large": "1.23e3",
    "mt5_xl": "3.74e3",
    "mt5_xxl": "12.9e3",
    "byt5_small": "300",
    "byt5_base": "582",
    "byt5_large": "1.23e3",
    "byt5_xl": "3.74e3",
    "byt5_xxl": "12.9e3",
    "ul2_20b": "2e4",
}
# T5Gemma 2: "~370M total, excluding vision encoder", "~1.7B" and "~7B" (Google's announcement,
# blog.google/technology/developers/t5gemma-2). T5Gemma ML: "~2B in total" (its model card).
GEMMA = {
    "t5gemma_ml_ml": "2e3",
    "t5gemma2_270m": "3.7e2",
    "t5gemma2_1b": "1.7e3",
    "t5gemma2_4b": "7e3",
}
# Millions that the Hub counts in facebook/bart-*, and Pegasus's paper (Zhang et al., 2020).
BART = {"bart_base": "139", "bart_large": "406", "pegasus_large": "5.7e2"}
COUNTS = BART | DECODERS | T5X | BY_HAND | T5 | MULTILINGUAL | GEMMA
# Millions: Gemma 2 (Gemma Team, 2024), table 2, of which T5Gemma's encoders are made: without
# embeddings, and the embeddings.
PARTS = {
    ("t5gemma_2b_2b", "encoder"): 2024,
    ("t5gemma_2b_2b", "encoder_embedding"): 590,
    ("t5gemma_9b_2b", "encoder"): 8324,
    ("t5gemma_9b_2b", "encoder_embedding"): 918,
    ("t5gemma_9b_2b", "embedding"): 590,
    ("t5gemma_9b_9b", "encoder"): 8324,
}
