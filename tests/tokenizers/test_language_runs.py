# SPDX-License-Identifier: Apache-2.0
"""Runs of several languages: mixtures of pairs, their evaluation, resumption and export."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
import transformers
from translation_toys import FOLDERS, write_translator

from t5x_lite import config, convert, data, interactive, sharding
from t5x_lite.checkpoints import opening
from t5x_lite.data import tasks
from t5x_lite.evaluation.evaluate import Evaluator
from t5x_lite.tokenizers import vocabularies

ROWS = {"de": ["the fox\tder Zürich", "numbers\tlazy"], "ro": ["jumps\tover", "the\tdog"]}
CODES = {"m2m100": ("en", "de", "ro"), "nllb": ("eng_Latn", "deu_Latn", "zul_Latn")}


class Toy(NamedTuple):
    """A tiny model that translates.

    Attributes:
      folder: its files.
      theirs: the model in transformers.
      codes: languages: the source, and two targets.
    """

    folder: Path
    theirs: torch.nn.Module
    codes: tuple[str, str, str]


@pytest.fixture(scope="module", params=CODES)
def toy(request, tmp_path_factory) -> Toy:
    folder = tmp_path_factory.mktemp(request.param)
    return Toy(folder, write_translator(request.param, folder), CODES[request.param])


def two_pairs(toy: Toy, path: Path, **changes) -> config.Data:
    """Data of two tasks, each to a language of its own.

    Args:
      toy: the model.
      path: folder for rows and tokens.
      **changes: fields of the second vocabulary.
    """
    source, *targets = toy.codes
    parts = []
    for name, target in zip(ROWS, targets, strict=True):
        (path / f"{name}.tsv").write_text("\n".join(["in\tout", *ROWS[name], ""]))
        spoken = dict(source_language=source, target_language=target)
        spoken |= changes if name == "ro" else {}
        vocabulary = config.Vocabulary("checkpoint", path=str(toy.folder), **spoken)
        files = str(path / f"{name}.tsv")
        parts.append(
            config.Files(name, files, vocabulary, validation=files, inputs="in", targets="out")
        )
    mixture = config.Mixture(tuple(parts), (1.0, 2.0))
    return config.Data(mixture, {"inputs": 24, "targets": 24}, cache_dir=str(path / "cache"))


def read_ids(cfg: config.Data) -> list[tuple[list[int], list[int]]]:
    """Ids of all examples for training."""
    chunks = [chunk for task, _ in tasks.resolve(cfg) for chunk in task.read("train")]
    return [
        (inputs.tolist(), targets.tolist())
        for chunk in chunks
        for inputs, targets in zip(chunk.inputs, chunk.targets, strict=True)
    ]


def their_ids(toy: Toy) -> list[tuple[list[int], list[int]]]:
    """The same, of transformers' tokenizer."""
    source, *targets = toy.codes
    pairs = []
    for target, rows in zip(targets, ROWS.values(), strict=True):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            toy.folder, src_lang=source, tgt_lang=target
        )
        for row in rows:
            text, answer = row.split("\t")
            ids = tokenizer(text, text_target=answer)
            pairs.append((ids["input_ids"], ids["labels"]))
    return pairs


def make_run(toy: Toy, path: Path) -> config.Run:
    """A run of two pairs with a checkpoint, as training leaves it."""
    opened = opening.open_checkpoint(toy.folder)
    cfg = two_pairs(toy, path)
    convert.main([f"--from={toy.folder}", f"--to={path / 'run'}"])
    vocabularies.save_pair(path / "run" / "vocabulary", *data.open_vocabularies(cfg))
    return config.Run(str(path / "run"), opened.model, data=cfg)


def test_each_task_of_a_mixture_has_its_languages(toy, tmp_path):
    cfg = two_pairs(toy, tmp_path)
    assert read_ids(cfg) == their_ids(toy)
    batches = data.open_batches(cfg, "encoder_decoder", 4, seed=0)
    firsts = {ids[0] for _, ids in their_ids(toy)}
    assert len(firsts) == 2 and firsts <= set(np.unique(batches.at(0).targets))


def test_a_run_that_resumes_reads_the_same_ids(toy, tmp_path):
    run = make_run(toy, tmp_path)
    resumed = data.with_run_vocabulary(run)
    assert resumed.data != run.data and read_ids(resumed.data) == their_ids(toy)
    data.check_run_vocabulary(run.model_dir, data.open_vocabularies(resumed.data))
    grown = two_pairs(toy, tmp_path)
    for each in grown.task.tasks:
        object.__setattr__(each.vocabulary, "names", ("[new]",))
    assert read_ids(grown) == their_ids(toy)


@pytest.mark.parametrize("side", ["source_language", "target_language"])
def test_a_language_is_bound_for_all_tasks_or_for_none(toy, tmp_path, side):
    with pytest.raises(ValueError, match=f"Vocabulary.{side} is bound for some of Mixture.tasks"):
        two_pairs(toy, tmp_path, **{side: None})


def test_tasks_of_other_tokenizers_are_still_refused(toy, tmp_path):
    (tmp_path / "bart").mkdir()
    FOLDERS["bart"](tmp_path / "bart")
    other = config.Vocabulary("checkpoint", path=str(tmp_path / "bart"))
    mixture = two_pairs(toy, tmp_path).task
    plain = [
        config.Files(each.name, each.train, other, inputs="in", targets="out")
        for each in mixture.tasks
    ]
    bare = config.Vocabulary("checkpoint", path=str(toy.folder))
    plain[0] = config.Files("de", plain[0].train, bare, inputs="in", targets="out")
    cfg = config.Data(config.Mixture(tuple(plain), (1.0, 1.0)), {"inputs": 24, "targets": 24})
    with pytest.raises(ValueError, match="must share one vocabulary: ro"):
        tasks.resolve(cfg)


@pytest.mark.slow
def test_evaluation_writes_each_task_in_its_language(toy, tmp_path):
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    run = make_run(toy, tmp_path)
    session = interactive.load(run.model_dir)
    evaluator = Evaluator(run, "validation")
    ids, _ = evaluator.inputs(4)
    decode = config.Decode(max_new_tokens=5)
    done = []
    written = evaluator.decode_inputs(session.predictor, decode, ids, done.append)
    assert [each.tokens[0][0] for each in written] == [targets[0] for _, targets in their_ids(toy)]
    assert done[-1] == 4 and done == sorted(done)
    for row, each in zip(ids, written, strict=True):
        expected = toy.theirs.generate(
            torch.tensor([row]),
            max_new_tokens=5,
            num_beams=1,
            do_sample=False,
            forced_bos_token_id=int(each.tokens[0][0]),
        )
        assert expected[0].tolist()[1 : 1 + len(each.tokens[0])] == [*map(int, each.tokens[0])]


@pytest.mark.slow
def test_an_export_of_a_run_writes_its_language_in_transformers(toy, tmp_path):
    run = make_run(toy, tmp_path)
    folder = tmp_path / "hf"
    convert.main([f"--from={run.model_dir}", f"--to={folder}", "--format=huggingface"])
    generation = json.loads((folder / "generation_config.json").read_text())
    first = their_ids(toy)[0][1][0]
    assert generation["forced_bos_token_id"] == first
    assert generation["decoder_start_token_id"] == run.model.decoder_start_token_id
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    (inputs, _), *_ = their_ids(toy)
    text = ROWS["de"][0].split("\t")[0]
    assert tokenizer(text)["input_ids"] == inputs
    options = dict(max_new_tokens=6, num_beams=1, do_sample=False)
    expected = theirs.generate(torch.tensor([inputs]), **options)[0].tolist()[1:]
    assert expected[0] == first
    for path in (run.model_dir, folder):
        session = interactive.load(path)
        assert session.decode.forced_bos_token_id == first
        written = [*map(int, session.predict(text, max_new_tokens=6).tokens[0])]
        assert written == expected[: len(written)]
        # The source language alone leaves the other one.
        session.set_languages(source=toy.codes[0])
        assert session.decode.forced_bos_token_id == first
