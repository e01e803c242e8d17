# SPDX-License-Identifier: Apache-2.0
"""Laws of sentence-transformers folders: a readout gives the same vectors there and here."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conversion_toys import T5, Drawn, write_ours

from t5x_lite import config, convert, interactive, sharding
from t5x_lite.checkpoints.formats.huggingface import sentence_t5
from t5x_lite.tokenizers import vocabularies

LETTERS = [chr(97 + i) for i in range(26)]
TEXTS = ["cab", "a", "zebra", "abcabcabcabc"]
READOUTS = {
    "sentence_t5": config.Readout("vector", "mean", project=5, normalize=True, max_length=9),
    "trained": config.Readout("vector", "last", temperature=0.1, matching=True),
    "first": config.Readout("vector", "first", query_prompt="qq", document_prompt="d"),
}


@pytest.fixture(autouse=True)
def one_device():
    """Sets a mesh of one device."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


@pytest.fixture(params=READOUTS)
def folders(request, tmp_path):
    """A run folder of an encoder with a readout, and what convert makes of it."""
    cfg = dataclasses.replace(
        T5, decoder=None, tied=True, dtype="float32", readout=READOUTS[request.param]
    )
    ours = write_ours(tmp_path / "ours", cfg, Drawn(cfg))
    symbols = vocabularies.SymbolVocabulary(LETTERS)
    vocabularies.save_pair(ours / "vocabulary", symbols, symbols)
    theirs = tmp_path / "theirs"
    convert.main([f"--from={ours}", f"--to={theirs}", "--format=huggingface"])
    return ours, theirs, cfg.readout


@pytest.mark.slow
def test_an_exported_folder_is_read_with_its_readout(folders):
    ours, theirs, readout = folders
    one, other = interactive.load(ours), interactive.load(theirs)
    # The temperature and the classifier of training are left out.
    kept = dataclasses.replace(readout, temperature=None, matching=False)
    assert other.predictor.cfg.readout == kept
    np.testing.assert_allclose(other.embed(TEXTS), one.embed(TEXTS), atol=1e-6)


def test_sentence_transformers_gives_the_same_vectors(folders):
    library = pytest.importorskip("sentence_transformers")
    ours, theirs, readout = folders
    session, reader = interactive.load(ours), library.SentenceTransformer(str(theirs), device="cpu")
    np.testing.assert_allclose(session.embed(TEXTS), reader.encode(TEXTS), atol=1e-4)
    if readout.query_prompt:
        for prompt, encode in (
            ("query", reader.encode_query),
            ("document", reader.encode_document),
        ):
            vectors = session.embed(TEXTS, prompt=prompt)
            np.testing.assert_allclose(vectors, encode(TEXTS), atol=1e-4)
            assert np.abs(vectors - session.embed(TEXTS)).max() > 1e-3
    else:
        with pytest.raises(ValueError, match="The model has no prompts"):
            session.embed(TEXTS, prompt="query")


@pytest.mark.parametrize(
    "readout, words",
    [
        (config.Readout("vector", "attention"), "cannot express Readout.pooling = 'attention'"),
        (config.Readout("vector", "mean", dense=True), "Readout.dense of a vector"),
    ],
)
def test_a_readout_that_sentence_transformers_lacks_is_not_exported(
    tmp_path, capsys, readout, words
):
    cfg = dataclasses.replace(T5, decoder=None, tied=True, readout=readout)
    ours = write_ours(tmp_path / "ours", cfg, Drawn(cfg))
    with pytest.raises(SystemExit):
        convert.main(
            [
                f"--from={ours}",
                f"--to={tmp_path / 'x'}",
                "--format=huggingface",
                "--vocabulary=none",
            ]
        )
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "name, content, words",
    [
        (sentence_t5.PROMPTS_FILE, {"prompts": ["q: "]}, "prompts are not texts by name"),
        (sentence_t5.PROMPTS_FILE, {"prompts": {"query": 1}}, "prompts are not texts by name"),
        (
            sentence_t5.PROMPTS_FILE,
            {"prompts": {"query": "q: "}, "default_prompt_name": "query"},
            "default_prompt_name = 'query' is not implemented; name the prompt",
        ),
        ("sentence_bert_config", {"max_seq_length": "many"}, "'many' is no length of a text"),
        ("sentence_bert_config", {"max_seq_length": 0}, "0 is no length of a text in tokens"),
        ("sentence_bert_config", {"do_lower_case": True}, "do_lower_case = true is not impl"),
        ("tokenizer_config", {"model_max_length": True}, "tokenizer_config.json: True is no len"),
    ],
)
def test_a_folder_that_cannot_be_followed_is_named_by_its_file(tmp_path, name, content, words):
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    read = sentence_t5.read_prompts if "prompts" in content else sentence_t5.longest_text
    with pytest.raises(ValueError, match=words):
        read(tmp_path)
