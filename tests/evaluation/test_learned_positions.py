# SPDX-License-Identifier: Apache-2.0
"""Positions beyond a learned table are refused at every door, and all that it has can be used."""

import dataclasses
import json

import pytest
from conftest import toy_model
from conversion_toys import Drawn, write_ours

from t5x_lite import config, distill, infer, interactive, sharding
from t5x_lite.data import save_pair
from t5x_lite.decoding.request import check_row_lengths, describe_excess
from t5x_lite.evaluation.evaluate import Evaluator
from t5x_lite.tokenizers import vocabularies
from t5x_lite.training import setup

MOST = 16
LEARNED = dict(layers=1, positions="learned", max_length=MOST)
MODELS = {
    "begins": toy_model("decoder_only", **LEARNED),
    "does not begin": dataclasses.replace(toy_model("decoder_only", **LEARNED), add_bos=False),
    "pair": toy_model("encoder_decoder", **LEARNED),
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PLAIN = config.Decode(drafter="plain")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders of the models, whose vocabularies have an id for each letter."""
    folder = tmp_path_factory.mktemp("learned")
    symbols = vocabularies.SymbolVocabulary(list(LETTERS))
    for name, cfg in MODELS.items():
        ours = write_ours(folder / name, cfg, Drawn(cfg))
        save_pair(ours / "vocabulary", symbols, symbols)
    return folder


@pytest.fixture(params=MODELS)
def session(request, folders):
    session = interactive.load(folders / request.param, mesh=config.Mesh())
    session.decode = PLAIN
    return session


def longest(predictor, new_tokens: int, text: str = "") -> str:
    """The longest continuation of text after which a predictor has room for new_tokens."""
    more = text + "a"
    fits = not describe_excess(predictor.cfg, predictor.encode_inputs([more])[0], new_tokens)
    return longest(predictor, new_tokens, more) if fits and len(more) < 40 else text


# Each door reads a text with 3 new tokens, or the target "abc".
DOORS = {
    "generate": lambda session, text: session.generate(text, max_new_tokens=3),
    "beams": lambda session, text: session.generate(text, max_new_tokens=3, beams=2),
    "lookup": lambda session, text: session.generate(
        text, max_new_tokens=3, drafter="lookup", draft_length=4
    ),
    "stream": lambda session, text: list(session.stream(text, max_new_tokens=3)),
    "score": lambda session, text: session.score(text, "ab"),
    "train_step": lambda session, text: session.train_step(text, "ab"),
    "explain": lambda session, text: session.explain(text, "a"),
    "embed": lambda session, text: session.embed(text),
}
# Tokens after the text that each door needs positions for, the end of a target among them.
NEEDED = {"embed": 1}


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_every_door_reads_the_whole_table_and_no_more(session, door):
    text = longest(session.predictor, NEEDED.get(door, 3))
    assert 8 < len(text) < 20
    DOORS[door](session, text)
    with pytest.raises(ValueError, match=r" 0 takes 17 positions.*Stack.max_length"):
        DOORS[door](session, text + "a")


def test_an_error_numbers_the_inputs_as_the_caller_does(session):
    texts = ["ab", "abcdefg", 30 * "a", "b"]
    with pytest.raises(ValueError, match="Input 2 takes"):
        session.generate(texts, max_new_tokens=3)
    with pytest.raises(ValueError, match="Input 2 takes"):
        session.score(texts, 4 * ["ab"])
    with pytest.raises(ValueError, match="Text 2 takes"):
        session.embed(texts)


def test_an_encoder_decoder_has_its_tables_apart(folders):
    session = interactive.load(folders / "pair", mesh=config.Mesh())
    session.decode = PLAIN
    session.generate("ab", max_new_tokens=MOST)
    with pytest.raises(ValueError, match="takes 17 positions with 17 tokens after it"):
        session.generate("ab", max_new_tokens=MOST + 1)
    with pytest.raises(ValueError, match="the encoder has 16"):
        session.generate(30 * "a", max_new_tokens=1)


@pytest.mark.parametrize("extra", [[], ["--embed=mean"], ["--targets=t"]], ids=str)
def test_infer_reports_the_line_and_reads_the_others(folders, tmp_path, extra):
    rows = [{"input": text, "t": "ab"} for text in ("ab", 30 * "a", "abc")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    arguments = [f"--checkpoint={folders / 'begins'}", f"--input={tmp_path / 'in.jsonl'}"]
    infer.main([*arguments, f"--output={out}", *extra, "--max_new_tokens=3"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[1].keys() == {"line", "error"} and lines[1]["line"] == 2
    assert "positions" in lines[1]["error"]
    assert all("error" not in lines[number] for number in (0, 2))
    with pytest.raises(SystemExit):
        stop = ["--broken=stop", "--overwrite", "--max_new_tokens=3"]
        infer.main([*arguments, f"--output={out}", *extra, *stop])


def test_distill_leaves_out_what_the_teacher_cannot_read(folders, tmp_path):
    (tmp_path / "in.txt").write_text("ab\n" + 30 * "a" + "\nabc\n")
    out = tmp_path / "out.jsonl"
    distill.main(
        [
            "generate",
            f"--teacher={folders / 'does not begin'}",
            f"--input={tmp_path / 'in.txt'}",
            f"--output={out}",
            "--max_new_tokens=3",
        ]
    )
    numbers = [json.loads(line)["line"] for line in out.read_text().splitlines()]
    assert 2 not in numbers


def test_rows_of_data_are_no_longer_than_the_table(tmp_path):
    cfg = MODELS["begins"]
    data = config.Data(task="cmudict_g2p", lengths={"inputs": 10, "targets": 10})
    run = config.Run(
        model_dir=str(tmp_path), model=cfg, data=data, train=config.Train(steps=1, batch_size=8)
    )
    sharding.use_mesh(config.Mesh())
    for door in (setup.assemble_run, Evaluator):
        with pytest.raises(ValueError, match="16 positions .*Data.lengths .*rows of 20 tokens"):
            door(run)
    check_row_lengths(cfg, {"inputs": 6, "targets": 10}, "The model")
    with pytest.raises(ValueError, match="rows of 17"):
        check_row_lengths(MODELS["pair"], {"inputs": 17, "targets": 10}, "The model")


@pytest.mark.slow
def test_a_draft_model_has_positions_for_what_it_drafts(folders, tmp_path):
    long = toy_model("decoder_only", layers=1, positions="rotary")
    write_ours(tmp_path / "long", long, Drawn(long))
    symbols = vocabularies.SymbolVocabulary(list(LETTERS))
    save_pair(tmp_path / "long" / "vocabulary", symbols, symbols)
    session = interactive.load(tmp_path / "long", mesh=config.Mesh())
    options = dict(drafter=f"draft:{folders / 'begins'}", draft_length=3)
    session.generate("abc", max_new_tokens=4, **options)
    with pytest.raises(ValueError, match=r"--drafter=draft:.*positions.*Stack.max_length"):
        session.generate("abc", max_new_tokens=20, **options)
