# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.adapt, and runs that adapt: what they write loads everywhere."""

import dataclasses
import shutil

import adaptation_toys as toys
import encoder_decoder_parity
import numpy as np
import parity
import pytest
import torch
import transformers
from conftest import toy_model

from t5x_lite import adapt, config, convert
from t5x_lite.adaptation.derive_config import Arrangement, derive_model
from t5x_lite.checkpoints import step_folders
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.tokenizers import vocabularies
from t5x_lite.training import loop

WORDS = [f"w{token}" for token in range(3, 64)]
LONE = toy_model("decoder_only", decoder_start_token_id=2, query_scale=8**-0.5, **toys.GEMMA2)


@pytest.fixture(autouse=True)
def mesh():
    toys.one_device()


@pytest.fixture
def lone(tmp_path):
    """A run folder of a small Gemma 2 with its vocabulary."""
    drawn = toys.written(tmp_path / "lone", LONE)
    symbols = vocabularies.SymbolVocabulary(WORDS, " ", ends=True)
    vocabularies.save_pair(tmp_path / "lone" / "vocabulary", symbols, symbols)
    return drawn


def test_the_ways_of_a_model():
    pair = derive_model(LONE, Arrangement("encoder_decoder"), 0)
    assert pair == toys.pair_of(LONE)
    assert derive_model(pair, Arrangement("decoder_only"), 0) == LONE
    assert derive_model(LONE, Arrangement("encoder_only"), 0).layout == "encoder_only"
    merged = derive_model(LONE, Arrangement("encoder_decoder", merged=True, eoi=5), 300)
    assert (merged.decoder.merged, merged.encoder.window_form) == (True, "halved")
    assert (merged.vocab, merged.eoi, merged.encoder.merged) == (384, 5, False)
    wide = dataclasses.replace(LONE, decoder=dataclasses.replace(LONE.decoder, embed=24))
    two = derive_model(LONE, Arrangement("encoder_decoder"), 0, wide)
    assert two.separate_embeddings and two.encoder.embed == 24
    alone = dataclasses.replace(LONE, encoder=LONE.decoder, decoder=None)
    with pytest.raises(ValueError, match="an encoder alone"):
        derive_model(alone, Arrangement("decoder_only"), 0)


def test_the_command_writes_a_run_folder_that_gives_the_source_back(lone, tmp_path, capsys):
    grown = ["--sentinels=20", "--names=[NLU],[S2S]", "--rows=random"]
    source, pair = f"--source={tmp_path / 'lone'}", tmp_path / "encoder_decoder"
    adapt.main([source, f"--output={pair}", *grown, "--dry_run"])
    assert "decoder cross attention" in capsys.readouterr().out and not pair.exists()
    adapt.main([source, f"--output={pair}", *grown])
    loaded = open_checkpoint(pair).load()
    assert loaded.run.model == toys.pair_of(LONE, vocab=86)
    targets = loaded.vocabularies[1]
    assert targets.size == 86 and targets.encode("w3 [S2S]")[-1] == 65
    assert list(targets.sentinel_ids[:2]) == [85, 84]
    back = tmp_path / "back"
    adapt.main([f"--source={pair}", "--to=decoder_only", f"--output={back}"])
    params = toys.flat(open_checkpoint(back).load().params)
    for path, array in lone.arrays.items():
        np.testing.assert_array_equal(params[path][: len(array)], array, err_msg=path)
    with pytest.raises(SystemExit):
        adapt.main([source, f"--output={pair}"])
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--source=nowhere"], "nowhere"),
        (["--source={lone}", "--vocabulary=none", "--sentinels=5"], "without a vocabulary"),
        (["--source={lone}", "--encoder_source=nowhere"], "Adaptation.encoder_source"),
        (["--source={lone}", "--to=decoder_only", "--encoder_source={lone}"], "no encoder"),
        (["--source={lone}", "--cross_scale=2"], "cross_scale must be in [0, 1]"),
        (["--source={lone}", "--to=decoder_only", "--new_decoder=1"], "--new_decoder belongs to"),
    ],
)
def test_mistakes_of_the_command_are_reported_in_one_line(lone, arguments, word, tmp_path, capsys):
    arguments = [each.format(lone=tmp_path / "lone") for each in arguments]
    with pytest.raises(SystemExit) as caught:
        adapt.main([*arguments, f"--output={tmp_path / 'out'}"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and word in error and error.count("\n") <= 2
    assert not (tmp_path / "out").exists()


def test_a_new_shallow_decoder_is_a_flag(lone, tmp_path, capsys):
    arguments = [f"--source={tmp_path / 'lone'}", f"--output={tmp_path / 'out'}"]
    adapt.main([*arguments, "--new_decoder=1"])
    layers = open_checkpoint(tmp_path / "lone").model.decoder.layers
    adapted = open_checkpoint(tmp_path / "out").model
    assert (adapted.encoder.layers, adapted.decoder.layers) == (layers, 1) and layers > 1
    assert "new: drawn as for pretraining" in capsys.readouterr().err


@pytest.mark.slow
def test_a_t5gemma_made_of_a_gemma_gives_transformers_the_same_logits(lone, tmp_path):
    pair, exported = tmp_path / "encoder_decoder", tmp_path / "theirs"
    adapt.main(
        [f"--source={tmp_path / 'lone'}", f"--output={pair}", "--separate_embeddings"]
        + ["--names=[S2S]", "--sentinels=15"]
    )
    arguments = [f"--from={pair}", f"--to={exported}", "--format=huggingface"]
    # Words and sentinels of a list have no tokenizer of theirs: the weights are what is compared.
    convert.main([*arguments, "--family=t5gemma", "--vocabulary=none"])
    kind = transformers.T5GemmaForConditionalGeneration
    theirs, loading = kind.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    checkpoint = open_checkpoint(pair).load()
    toys.one_device()
    cfg = dataclasses.replace(
        checkpoint.run.model,
        # transformers 5.23 sees |q - k| <= window: see checkpoints/formats/huggingface/t5gemma.py.
        encoder=dataclasses.replace(checkpoint.run.model.encoder, window_form="within"),
    )
    params = toys.nested(toys.flat(checkpoint.params), cfg)
    both = parity.Pair(theirs.eval(), None, cfg, params)
    encoder_decoder_parity.assert_alike(
        both, encoder_decoder_parity.drawn_ids(cfg.vocab, 2, seed=5)
    )


def run_of(folder, steps: int) -> config.Run:
    vocabulary = config.Vocabulary("checkpoint", str(folder / "lone"), extra_ids=16)
    text = folder / "text.txt"
    draw = np.random.default_rng(0)
    text.write_text("\n".join(" ".join(draw.choice(WORDS, 20)) for _ in range(64)))
    task = config.Files("toy", str(text), vocabulary, format="text")
    lengths = {"inputs": 16, "targets": 12}
    return config.Run(
        model_dir=str(folder / "run"),
        model=toys.pair_of(LONE, vocab=80),
        data=config.Data(task, lengths, config.SpanCorruption(), cache_dir=str(folder / "cache")),
        train=config.Train(steps=steps, batch_size=8, log_every=1, tensorboard=False),
        schedule=config.Schedule("constant", 1e-3),
        evaluate=config.Evaluate(batches=0, examples=0),
        adaptation=config.Adaptation(str(folder / "lone")),
    )


@pytest.mark.slow
def test_a_run_adapts_once_and_goes_on_without_the_source(lone, tmp_path):
    loop.train(run_of(tmp_path, 1))
    shutil.rmtree(tmp_path / "lone" / "checkpoints")
    loop.train(run_of(tmp_path, 2))
    assert max(step_folders.list_steps(tmp_path / "run")) == 2


def test_data_in_other_ids_than_the_source_are_refused(lone, tmp_path):
    run = run_of(tmp_path, 1)
    other = dataclasses.replace(run.data.task, vocabulary=config.Vocabulary("bytes"))
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, vocab=512),
        data=dataclasses.replace(run.data, task=other, objective=config.PrefixLM()),
    )
    with pytest.raises(ValueError, match="another vocabulary than the data.*checkpoint"):
        loop.train(run)
