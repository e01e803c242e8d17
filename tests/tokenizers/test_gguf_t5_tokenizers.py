# SPDX-License-Identifier: Apache-2.0
"""Laws of a T5's tokenizer in a .gguf file: the ids of its SentencePiece model."""

import json

import gguf_t5_toys as toys
import gguf_toys
import numpy as np
import parity
import pytest
from test_tokenizers import NASTY, SENTENCES, t5_pieces
from translation_toys import LINES, without_ties

from t5x_lite.checkpoints import text_settings
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.tokenizers import huggingface_tokenizer, vocabularies
from t5x_lite.tokenizers.errors import GgufError
from t5x_lite.tokenizers.renumbered import parse_proto


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 with its tokenizer as a Hugging Face folder, and as a .gguf file in it."""
    folder, model = tmp_path_factory.mktemp("t5"), without_ties(t5_pieces())
    pieces = len(parse_proto(model).pieces)
    theirs = toys.t5(toys.T5, tie_word_embeddings=False, vocab_size=pieces + 128, **toys.GATED)(4)
    theirs.save_pretrained(folder)
    (folder / "spiece.model").write_bytes(model)
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    toys.write_t5(folder / "toy.gguf", theirs, add_tokens=gguf_toys.add_t5_tokenizer(model))
    return folder


def test_a_t5s_file_gives_a_text_the_ids_of_its_sentencepiece_model(folder):
    expected, ends = huggingface_tokenizer.read_tokenizer(folder)
    text = text_settings.read_text_settings(folder / "toy.gguf")
    vocabulary = text.vocabularies[0]
    assert text.ends == ends
    assert (vocabulary.eos, vocabulary.pad, vocabulary.ends) == (1, 0, True)
    np.testing.assert_array_equal(vocabulary.sentinel_ids, expected.sentinel_ids)
    lines = [*NASTY, *LINES, *SENTENCES[:7], "a <extra_id_0> b <extra_id_99>"]
    assert [vocabulary.encode(line) for line in lines] == [expected.encode(line) for line in lines]


@pytest.mark.slow
def test_a_t5s_file_writes_the_ids_of_transformers(folder):
    from t5x_lite import interactive

    session, theirs = interactive.load(folder / "toy.gguf"), toys.T5.from_pretrained(folder)
    for line in SENTENCES[:3]:
        ids = vocabularies.encode_with_ends(session.predictor.inputs, line)
        # With a cache, transformers has one of the encoder's layers.
        options = dict(max_new_tokens=8, do_sample=False, use_cache=False)
        out = theirs.generate(parity.tensor(np.array([ids])), **options)
        expected = out[0, 1:].tolist()
        written = list(map(int, session.predict(line, max_new_tokens=8).tokens[0]))
        assert written[: len(expected)] == expected


def test_added_sentinels_are_those_of_the_file(tmp_path):
    names = [f"<extra_id_{k}>" for k in reversed(range(5))]
    model = without_ties(t5_pieces())
    theirs = toys.TOYS["tied"](1)
    path = toys.write_t5(
        tmp_path / "toy.gguf",
        theirs,
        add_tokens=gguf_toys.add_t5_tokenizer(model, padding=9, user=names),
    )
    vocabulary, _ = text_settings.read_text_settings(path).vocabularies
    pieces = len(parse_proto(model).pieces)
    assert vocabulary.size == pieces + 5
    assert vocabulary.sentinel_ids.tolist() == [pieces + 4 - k for k in range(5)]
    assert vocabulary.encode("a <extra_id_1> b").count(pieces + 3) == 1


def test_a_t5s_tokenizer_without_scores_is_named(folder, tmp_path):
    def add(writer):
        writer.add_tokenizer_model("t5")
        writer.add_token_list(["<pad>", "</s>", "<unk>"])
        writer.add_token_types([3, 3, 2])
        writer.add_eos_token_id(1)

    toys.write_t5(tmp_path / "toy.gguf", toys.TOYS["tied"](1), add_tokens=add)
    with pytest.raises(GgufError, match="has no tokenizer.ggml.scores"):
        open_checkpoint(tmp_path / "toy.gguf")
