# SPDX-License-Identifier: Apache-2.0
"""Qwen 2 and 3 equal transformers: logits, cached decoding, gradients, conversion and back."""

import dataclasses

import decoder_parity
import pytest
import transformers

from t5x_lite.checkpoints.formats.huggingface import qwen

WINDOWED = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
DRAWS = {
    "qwen2": ("qwen2", dict()),
    "qwen2, windows from the second layer on": ("qwen2", dict(WINDOWED, num_hidden_layers=3)),
    "qwen3, one key head": ("qwen3", dict(num_key_value_heads=1)),
    "qwen3, biases, windows": (
        "qwen3",
        dict(WINDOWED, attention_bias=True, tie_word_embeddings=True, rope_theta=700.0),
    ),
}


def described(kind: str, **changes) -> dict:
    """config.json of a tiny model; changes are its fields."""
    fields = dict(vocab_size=43, hidden_size=16, intermediate_size=24, num_attention_heads=4)
    fields |= dict(num_hidden_layers=2, num_key_value_heads=4, max_position_embeddings=64)
    return fields | ({"head_dim": 10} if kind == "qwen3" else {}) | changes


def pair_of(name: str, folder, seed: int = 0):
    """A random pair of models.

    Args:
      name: case in `DRAWS`.
      folder: folder to save theirs in.
      seed: seed of sizes and weights.
    """
    kind, changes = DRAWS[name]
    make = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[kind]
    sizes = decoder_parity.drawn_sizes(seed + len(name))
    fields = described(kind, bos_token_id=5, **sizes | changes)
    return decoder_parity.drawn(make(**fields), seed, folder)


@pytest.mark.parametrize("seed", decoder_parity.SEEDS)
@pytest.mark.parametrize("name", DRAWS)
def test_logits_equal_and_conversion_loses_nothing(name, seed, tmp_path):
    pair = pair_of(name, tmp_path / "theirs", seed)
    decoder_parity.assert_alike(pair, decoder_parity.ids_of(pair, seed))
    decoder_parity.assert_there_and_back(pair, decoder_parity.ids_of(pair, seed), tmp_path / "ours")


@pytest.mark.parametrize("name", ["qwen2", "qwen3, biases, windows"])
def test_gradients_equal(name, tmp_path):
    pair = pair_of(name, tmp_path / "theirs")
    decoder_parity.assert_gradients_alike(pair, decoder_parity.ids_of(pair, seed=2))


def read(kind="qwen2", names=("lm_head.weight",), **changes):
    """Architecture that we read from a config.json.

    Args:
      kind: model_type.
      names: names of the tensors.
      **changes: fields of config.json.
    """
    return qwen.parse_config({"model_type": kind} | described(kind, **changes), names)


def test_windows_are_used_only_where_they_are_asked_for():
    whole = read(sliding_window=4, max_window_layers=0)
    assert whole.decoder.pattern == ("full",) and whole.decoder.window is None
    some = read(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert some.decoder.sliding == (False, True) and some.decoder.window == 4
    cfg = read(use_sliding_window=True, layer_types=["sliding_attention", "full_attention"])
    assert cfg.decoder.sliding == (True, False) and cfg.decoder.window == 4096
    none = read(use_sliding_window=True, sliding_window=None, max_window_layers=0)
    assert not any(none.decoder.sliding)


@pytest.mark.parametrize(
    "word, changes",
    [
        ("sliding_window", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("layer_types", {"layer_types": ["full_attention"]}),
        ("layer_types", {"layer_types": ["chunked_attention"] * 2}),
        ("dual_chunk_attention_config", {"dual_chunk_attention_config": {"chunk_size": 8}}),
        ("yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ],
)
def test_what_is_not_computed_is_refused_by_name(word, changes):
    with pytest.raises(ValueError, match=word):
        read(**changes)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_what_no_qwen_has_is_not_written(kind):
    cfg = read(kind)
    for changes in (
        {"mlp_bias": True},
        {"sliding_rotary_base": 50.0, "window": 2},
        {"softcap": 1.0},
    ):
        pattern = ("sliding", "full") if "window" in changes else ("full",)
        stack = dataclasses.replace(cfg.decoder, pattern=pattern, **changes)
        with pytest.raises(ValueError, match=f"Stack.{next(iter(changes))}"):
            qwen.config_json(dataclasses.replace(cfg, decoder=stack))
