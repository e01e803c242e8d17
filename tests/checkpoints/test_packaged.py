# SPDX-License-Identifier: Apache-2.0
"""Laws of checkpoints that travel with the package, which are named as a folder would be."""

import json
from pathlib import Path

import pytest
from conversion_toys import T5, Drawn, write_ours

from t5x_lite import convert, infer, interactive
from t5x_lite.checkpoints.kinds import detect_kind
from t5x_lite.checkpoints.text_settings import read_text_settings
from t5x_lite.tokenizers import vocabularies
from t5x_lite.utils import hub_names, packaged

WORDS = ["abba", "cab", "d"]
LETTERS = [chr(97 + i) for i in range(26)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of packaged checkpoints with a toy, whose targets are joined by spaces."""
    folder = tmp_path_factory.mktemp("packaged")
    ours = write_ours(folder / "ours", T5, Drawn(T5))
    pair = (
        vocabularies.SymbolVocabulary(LETTERS),
        vocabularies.SymbolVocabulary(LETTERS, separator=" "),
    )
    vocabularies.save_pair(ours / "vocabulary", *pair)
    to = folder / "toys" / "toy"
    convert.main([f"--from={ours}", f"--to={to}", "--format=huggingface", "--dtype=bfloat16"])
    return folder / "toys"


@pytest.fixture
def toy(monkeypatch, tmp_path, folder) -> Path:
    """The folder of the packaged toy; the working folder is empty."""
    monkeypatch.setattr(packaged, "FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    return folder / "toy"


@pytest.mark.slow
def test_the_name_writes_and_scores_as_its_folder_does(toy, capsys):
    named, there = interactive.load("toy"), interactive.load(toy)
    assert named.predict(WORDS) == there.predict(WORDS)
    assert named.score("cab", "a b") == there.score("cab", "a b")
    Path("words.txt").write_text("\n".join(WORDS) + "\n")
    infer.main(["--checkpoint=toy", "--input=words.txt", "--output=out.jsonl"])
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == named.generate(WORDS)
    assert "is the folder here" not in capsys.readouterr().err


def test_targets_are_read_by_their_own_tokenizer(toy):
    inputs, targets = read_text_settings("toy").vocabularies
    assert inputs.encode("cab") == targets.encode("c a b")
    assert targets.decode(targets.encode("c a b")) == "c a b"


def test_a_local_folder_of_the_name_wins_and_is_reported(toy, capsys):
    Path("toy").mkdir()
    assert hub_names.parse_source("toy") == Path("toy")
    assert (
        f"toy is the folder here; the packaged checkpoint toy is {toy}" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="toy is not a checkpoint"):
        interactive.load("toy")


@pytest.mark.parametrize("text", ["./toy", "toy/", "Toy", "t", "../toys/toy", "runs/toy", " toy"])
def test_nothing_but_the_name_is_the_packaged_checkpoint(toy, text):
    assert hub_names.parse_source(text) != toy


def test_a_misspelled_name_is_answered_with_the_right_one(toy):
    with pytest.raises(ValueError, match="packaged with t5x_lite is named toy"):
        detect_kind("toyy")


def test_without_packaged_checkpoints_every_name_is_a_path(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "none")
    assert packaged.packaged_names() == [] and hub_names.parse_source("g2p") == Path("g2p")


@pytest.mark.parametrize("name", packaged.packaged_names())
def test_packaged_checkpoints_are_small_and_have_a_card(name):
    folder = packaged.FOLDER / name
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert (folder / "README.md").read_text().strip()
    sizes = {each.name: each.stat().st_size for each in folder.rglob("*") if each.is_file()}
    assert "model.safetensors" in sizes and sum(sizes.values()) < 3e6


def test_the_g2p_model_travels_with_the_package_and_says_words():
    assert packaged.packaged_names() == ["g2p"]
    words = ["photograph", "yoked"]
    assert interactive.load("g2p").generate(words) == ["F OW T AH G R AE F", "Y OW K T"]
    folder = packaged.find_packaged("g2p")
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 3_000_000
