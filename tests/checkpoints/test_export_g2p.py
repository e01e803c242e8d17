# SPDX-License-Identifier: Apache-2.0
"""A trained run, exported: transformers and CTranslate2 write what we write, word for word.

With a run of your own: T5X_LITE_G2P_RUN=runs/g2p pytest tests/checkpoints/test_export_g2p.py
"""

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from t5x_lite import config, convert, data, interactive
from t5x_lite.checkpoints.run_folder import read_run_config
from t5x_lite.data import built_in
from t5x_lite.training import loop

pytestmark = pytest.mark.slow  # trains: a minute of one core

WORDS = 500
LENGTH = 16
STACK = config.Stack(layers=1, embed=32, heads=2, head_dim=16, mlp=64, activation="relu")


class Exported(NamedTuple):
    """The folder that our model was exported to, held-out words, and the texts of our model for
    them."""

    folder: Path
    words: list[str]
    texts: list[str]


def trained(path: Path) -> Path:
    """A small run of the g2p recipe: some hundred steps, so that words differ."""
    run = config.Run(
        model_dir=str(path / "run"),
        model=config.Model(vocab=128, encoder=STACK, decoder=STACK),
        data=config.Data(
            task="cmudict_g2p",
            lengths={"inputs": 64, "targets": 64},
            cache_dir=str(path / "cache"),
        ),
        train=config.Train(steps=150, batch_size=8, tensorboard=False, remat="none"),
        schedule=config.Schedule("constant", 0.02),
        evaluate=config.Evaluate(examples=8, batches=1, batch_size=8),
        checkpoint=config.Checkpoint(every=150),
        decode=config.Decode(max_new_tokens=LENGTH),
    )
    loop.train(run)
    return path / "run"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    path = tmp_path_factory.mktemp("g2p")
    existing = os.environ.get("T5X_LITE_G2P_RUN")
    run = Path(existing) if existing else trained(path)
    folder = path / "huggingface"
    convert.main([f"--from={run}", f"--to={folder}", "--format=huggingface"])
    session = interactive.load(run)
    held_out = data.open_dataset(read_run_config(run).data, "test")
    words = [held_out.inputs_text(number) for number in range(WORDS)]
    return Exported(folder, words, session.generate(words, max_new_tokens=LENGTH))


def tokenizer_of(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_the_held_out_words_are_reported_apart(exported):
    assert len(exported.words) == WORDS
    assert len(set(exported.texts)) > WORDS / 5


def test_transformers_writes_the_same(exported):
    import torch
    from transformers import AutoModelForSeq2SeqLM

    tokenizer = tokenizer_of(exported.folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(exported.folder).eval()
    texts = []
    for start in range(0, WORDS, 50):
        batch = tokenizer(exported.words[start : start + 50], padding=True, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=LENGTH,
                do_sample=False,
                num_beams=1,
            )
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert texts == exported.texts


def test_ctranslate2_writes_the_same(exported, tmp_path):
    import ctranslate2

    tokenizer = tokenizer_of(exported.folder)
    converted = str(tmp_path / "ctranslate2")
    ctranslate2.converters.TransformersConverter(str(exported.folder)).convert(converted)
    translator = ctranslate2.Translator(converted, compute_type="float32", intra_threads=1)
    read = [tokenizer.convert_ids_to_tokens(tokenizer.encode(word)) for word in exported.words]
    written = translator.translate_batch(read, beam_size=1, max_decoding_length=LENGTH)
    ids = [tokenizer.convert_tokens_to_ids(each.hypotheses[0]) for each in written]
    assert [tokenizer.decode(row) for row in ids] == exported.texts


def test_the_targets_tokenizer_reads_phonemes(exported):
    targets = tokenizer_of(exported.folder / "targets")
    ours = built_in.BUILT_IN["cmudict_g2p"].vocabularies()[1]
    assert targets.encode("F OW T AH G R AE F") == [*ours.encode("F OW T AH G R AE F"), ours.eos]


def test_the_folder_is_a_checkpoint_that_writes_the_same(exported):
    session = interactive.load(exported.folder)
    assert session.generate(exported.words[:50], max_new_tokens=LENGTH) == exported.texts[:50]
