# SPDX-License-Identifier: Apache-2.0
"""Laws of contrastive runs: pairs from files, evaluation by retrieval, vectors of texts."""

import json
from pathlib import Path

import numpy as np
import pytest

from t5x_lite import config, data, interactive, train
from t5x_lite import eval as eval_command
from t5x_lite.config import gin_file
from t5x_lite.data import label_names
from t5x_lite.evaluation import retrieval

MODEL = """
from __gin__ import dynamic_registration
from t5x_lite import config

include "runs/common.gin"
include "adaptation/contrastive.gin"

TRAIN_STEPS = 30
BATCH_SIZE = 8
MIXTURE_OR_TASK_NAME = @config.Files()
TASK_FEATURE_LENGTHS = {"inputs": 12, "targets": 10}

config.Files.name = "capitals"
config.Files.train = %TRAIN_FILES
config.Files.validation = %TRAIN_FILES
config.Files.inputs = "query"
config.Files.targets = "answer"
config.Files.negatives = "wrong"
config.Files.vocabulary = @config.Vocabulary()
config.Vocabulary.kind = "bytes"
config.Model.encoder = @config.Stack()
config.Stack.layers = 1
config.Stack.embed = 16
config.Stack.heads = 2
config.Stack.head_dim = 8
config.Stack.mlp = 32
config.Schedule.kind = "constant"
config.Schedule.peak = 0.01
config.Optimizer.name = "adamw"
config.Evaluate.every = 30
"""
WORDS = ["abc", "bca", "cab", "aab", "bbc", "cca", "acb", "bac", "xyz", "zyx", "yxz", "zzx"]


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """A folder with a run's file and its data, beside which the configs of the clone are found."""
    monkeypatch.chdir(Path(__file__).parents[2])
    rows = [
        {"query": word, "answer": [word[::-1], f"{word[0]}!"], "wrong": word[1:]} for word in WORDS
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.gin").write_text(MODEL)
    return tmp_path


def bindings(folder: Path) -> list[str]:
    return [f"TRAIN_FILES={folder / 'rows.jsonl'}", f"MODEL_DIR={folder / 'run'}"]


def load(folder: Path, *more: str) -> config.Run:
    return gin_file.load_run([str(folder / "run.gin")], [*bindings(folder), *more])


def test_a_row_has_a_pair_and_its_hard_negative(pairs):
    run = load(pairs, "config.Model.vocab=384")
    batches = data.open_batches(run.data, run.model.batch_layout, 4, seed=0, split="validation")
    vocabulary = data.open_dataset(run.data, "validation").vocabularies[0]
    rows = list(batches.evaluation())
    assert len(rows) == 3
    for number, batch in enumerate(rows):
        for row in range(4):
            word = WORDS[4 * number + row]
            sides = (batch.inputs, batch.targets, batch.negatives)
            texts = [vocabulary.decode(side[row][side[row] > 0]) for side in sides]
            assert texts == [word, word[::-1], word[1:]]
            assert batch.negative_segments[row].sum() == (batch.negatives[row] > 0).sum()


def test_streamed_pairs_are_those_of_the_cache(pairs):
    batches = {}
    for stream in (False, True):
        run = load(pairs, "config.Model.vocab=384", f"config.Data.stream={stream}")
        opened = data.open_batches(run.data, run.model.batch_layout, 12, seed=0)
        batch = opened.at(0)
        order = np.lexsort(batch.inputs.T)
        batches[stream] = np.hstack([batch.inputs, batch.targets, batch.negatives])[order]
    np.testing.assert_array_equal(batches[False], batches[True])


def test_a_mixture_with_pairs_without_negatives_leaves_theirs_empty(pairs):
    with_them = load(pairs, "config.Model.vocab=384").data.task
    without = config.Files(
        "plain", with_them.train, with_them.vocabulary, inputs="query", targets="answer"
    )
    cfg = config.Data(
        config.Mixture((with_them, without), (1.0, 1.0)),
        {"inputs": 12, "targets": 10},
        pack=False,
    )
    batch = data.open_batches(cfg, "encoder_decoder", 16, seed=0).at(0)
    there = (batch.negative_segments > 0).any(axis=1)
    assert 0 < there.sum() < 16 and (batch.target_segments > 0).any(axis=1).all()


@pytest.mark.slow
def test_a_run_learns_its_pairs_and_eval_finds_them(pairs, capsys):
    options = [f"--gin.{each}" for each in bindings(pairs)]
    train.main([f"--gin_file={pairs / 'run.gin'}", *options])
    folder = pairs / "run"
    eval_command.main([f"--checkpoint={folder}", f"--json={pairs / 'numbers.json'}"])
    numbers = json.loads((pairs / "numbers.json").read_text())["metrics"]
    assert numbers["queries"] == 12 and numbers["documents"] == 12 + 6
    assert numbers.keys() >= {"mrr", "recall@1", "recall@10", "ndcg@10"}
    # By chance: the mean of 1 / rank of the first of two right documents among 18, 29 percent.
    assert numbers["mrr"] > 60
    session = interactive.load(folder)
    vectors = session.embed(WORDS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    pool = retrieval.make_pool(WORDS, [[word[::-1], f"{word[0]}!"] for word in WORDS])
    ranks = retrieval.rank_documents(vectors, session.embed(pool.documents), pool.relevant)
    assert retrieval.reciprocal_rank(ranks)["mrr"] == pytest.approx(numbers["mrr"], abs=1e-3)
    assert "mrr" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, words",
    [
        (["config.Run.contrastive=None"], 'Readout.kind = "vector" has no labels to train on'),
        (["config.Readout.kind='number'", "config.Readout.normalize=False"], "trains vectors"),
        (["config.Data.pack=True"], "bind Data.pack = False"),
        (["config.Train.microbatches=2"], "bind Train.microbatches = 1"),
        (["config.Readout.kind='number'"], "Readout.normalize belongs to a vector"),
    ],
)
def test_what_contrast_cannot_train_is_refused(pairs, more, words):
    with pytest.raises(gin_file.ConfigError) as caught:
        load(pairs, "config.Model.vocab=384", *more)
    assert words in str(caught.value)


def test_a_decoder_trains_on_texts_that_begin_as_those_it_embeds(pairs):
    """All of a row begins with the start token that `embed` puts before a prompt."""
    changes = ["config.Model.encoder=None", "config.Model.decoder=@config.Stack()"]
    changes += ["config.Model.decoder_start_token_id=2", "config.Stack.positions='rotary'"]
    run = label_names.with_readout(load(pairs, "config.Model.vocab=384", *changes))
    batch = data.open_batches(run.data, run.model.batch_layout, 12, seed=0).at(0)
    for side in (batch.inputs, batch.targets, batch.negatives):
        assert (side[:, 0] == 2).all() and (side[:, 1:] != 2).all()
