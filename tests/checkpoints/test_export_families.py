# SPDX-License-Identifier: Apache-2.0
"""A run of any family, exported: transformers and CTranslate2 write what we write."""

import conversion_toys as toys
import jax
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_model

from t5x_lite import config, convert, data, model, sharding
from t5x_lite.checkpoints import manager, weights
from t5x_lite.evaluation import predict
from t5x_lite.tokenizers import vocabularies
from t5x_lite.tokenizers.special_tokens import until_end

LENGTH = 12
ROTARY = dict(positions="rotary", activation="silu", query_scale=8**-0.5, kv_heads=2)
GEMMA = ROTARY | dict(
    activation="gelu", norm="rms_plus_one", post_norms=True, scale_embedding=True, tied=True
)
GPT2 = dict(norm="layer", norm_epsilon=1e-5, positions="learned", max_length=64, gated=False)
GPT2 |= dict(qkv_bias=True, out_bias=True, mlp_bias=True, tied=True, query_scale=8**-0.5)
PAIRS = {
    "t5_1_0": toy_model(
        "encoder_decoder", gated=False, activation="relu", tied=True, scale_logits=True
    ),
    "t5_1_1": toy_model("encoder_decoder"),
    "umt5": toy_model("encoder_decoder", bias_per_layer=True),
    "t5gemma2": toy_model(
        "encoder_decoder",
        decoder_start_token_id=2,
        merged=True,
        qk_norm=True,
        pattern=("sliding", "full"),
        window=64,
        window_form="halved",
        rotary_base=1e6,
        sliding_rotary_base=1e4,
        eoi=63,
        **GEMMA,
    ),
    "t5gemma": toy_model(
        "encoder_decoder", separate_embeddings=True, decoder_start_token_id=2, **GEMMA
    ),
}
# As CTranslate2 4.8 has them: Llama's heads share the width out, windows are wider than the text
# (with a window of 8 its Gemma 3 wrote other tokens), Gemma 3's rotary bases are 1e6 and 1e4, no
# softcaps.
LONE = {
    "gpt2": toy_model(
        "decoder_only", add_bos=False, decoder_start_token_id=1, mlp=64, heads=2, **GPT2
    ),
    "llama": toy_model("decoder_only", decoder_start_token_id=2, embed=32, **ROTARY),
    "qwen3": toy_model(
        "decoder_only", decoder_start_token_id=2, add_bos=False, qk_norm=True, **ROTARY
    ),
    "gemma": toy_model("decoder_only", decoder_start_token_id=2, **{**GEMMA, "post_norms": False}),
    "gemma3": toy_model(
        "decoder_only",
        decoder_start_token_id=2,
        qk_norm=True,
        pattern=("sliding", "full"),
        window=64,
        rotary_base=1e6,
        sliding_rotary_base=1e4,
        **GEMMA,
    ),
}
NAMES = [f"w{token}" for token in range(3, 64)]
draw = np.random.default_rng(3)
TEXTS = [" ".join(draw.choice(NAMES, size)) for size in (1, 3, 4, 7, 9, 11)]


class Toy:
    """A run folder of drawn weights, its export, and what our model writes."""

    def __init__(self, path, cfg, family):
        sharding.use_mesh(config.Mesh(), jax.devices()[:1])
        drawn = toys.Drawn(cfg, seed=5)
        for name, array in drawn.arrays.items():
            # Tied embeddings that stand out would repeat the last token forever.
            loud = cfg.scale_embedding and name.endswith("embedding")
            array *= 0.1 if loud or "norm" in name else 0.35
            if "norm" in name and "bias" not in name and "rms_plus_one" not in str(cfg):
                array += 1
        toys.write_ours(path / "run", cfg, drawn)
        ends = cfg.encoder is not None
        self.pair = [vocabularies.SymbolVocabulary(NAMES, " ", ends=end) for end in (ends, True)]
        data.save_pair(path / "run" / "vocabulary", *self.pair)
        self.folder = path / "huggingface"
        convert.main(
            [f"--from={path / 'run'}", f"--to={self.folder}", "--format=huggingface"]
            + [f"--family={family}"]
        )
        params = weights.place_arrays(model.shapes(cfg), manager.load_params(path / "run")[0], path)
        ours = predict.Predictor(cfg, params, self.pair, ended=ends)
        predictions = ours.predict(TEXTS, config.Decode(max_new_tokens=LENGTH))
        self.ids = [cut(each.tokens[0]) for each in predictions]

    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)


def cut(ids):
    """The ids before the end."""
    return until_end(ids, (1,), -1)


def in_transformers(toy, kind):
    """Ids that transformers writes greedily, one text at a time."""
    import torch

    model, tokenizer = kind.from_pretrained(toy.folder).eval(), toy.tokenizer()
    texts = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.inference_mode():
            row = model.generate(ids, max_new_tokens=LENGTH, do_sample=False, num_beams=1)[0]
        begins = 1 if model.config.is_encoder_decoder else ids.shape[1]
        texts.append(cut(row[begins:].tolist()))
    return texts


def converted(toy, path):
    import ctranslate2

    ctranslate2.converters.TransformersConverter(str(toy.folder)).convert(str(path / "ct2"))
    return str(path / "ct2"), dict(compute_type="float32", intra_threads=1)


def told_apart(toy):
    assert len({tuple(ids) for ids in toy.ids}) > 2


@pytest.mark.slow
# T5Gemma 2 has all of T5Gemma but its second softmax, T5 1.0 what T5 1.1 has.
@pytest.mark.parametrize("name", mark_exhaustive(PAIRS, kept=["t5_1_0", "umt5", "t5gemma2"]))
def test_an_encoder_decoder_writes_the_same_everywhere(name, tmp_path):
    import ctranslate2
    from transformers import AutoModelForSeq2SeqLM

    toy = Toy(tmp_path, PAIRS[name], name.partition("_")[0])
    told_apart(toy)
    assert in_transformers(toy, AutoModelForSeq2SeqLM) == toy.ids
    folder, options = converted(toy, tmp_path)
    tokenizer = toy.tokenizer()
    read = [tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) for text in TEXTS]
    # One by one: T5Gemma 2's merged attention there sees the padding of shorter inputs.
    written = ctranslate2.Translator(folder, **options).translate_batch(
        read,
        beam_size=1,
        max_decoding_length=LENGTH,
        min_decoding_length=0,
        max_batch_size=1 if name == "t5gemma2" else 0,
    )
    ids = [tokenizer.convert_tokens_to_ids(each.hypotheses[0]) for each in written]
    assert [cut(row) for row in ids] == toy.ids


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # The others compute what CTranslate2 computes in test_decoders_in_ctranslate2.
    mark_exhaustive(LONE, kept=["gpt2", "llama"]),
)
def test_a_decoder_writes_the_same_everywhere(name, tmp_path):
    import ctranslate2
    from transformers import AutoModelForCausalLM

    toy = Toy(tmp_path, LONE[name], name)
    told_apart(toy)
    assert in_transformers(toy, AutoModelForCausalLM) == toy.ids
    folder, options = converted(toy, tmp_path)
    tokenizer = toy.tokenizer()
    read = [tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) for text in TEXTS]
    generator = ctranslate2.Generator(folder, **options)
    # One by one: of prompts of unlike length it hands back the ends as if it had written them.
    results = [
        generator.generate_batch(
            [row], sampling_topk=1, max_length=LENGTH, include_prompt_in_result=False
        )
        for row in read
    ]
    assert [cut(each[0].sequences_ids[0]) for each in results] == toy.ids
