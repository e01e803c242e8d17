# SPDX-License-Identifier: Apache-2.0
"""Laws of --decoder: names make drafters, texts stay, figures add up, pictures show every token."""

import dataclasses
import json
import re
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
from conftest import toy_model
from test_decoding_loop import use_one_device
from test_evaluation_commands import WORDS, folder, infer, rows, run_in, write_words  # noqa: F401

from t5x_lite import config, config_file, decoding, interactive, model
from t5x_lite.decoding import acceptance, choosing, lossy, speculative
from t5x_lite.decoding.drafters.draft_model import DraftModel
from t5x_lite.decoding.drafters.union import sources
from t5x_lite.decoding.tally import Tally
from t5x_lite.decoding.widths import Adaptive
from t5x_lite.evaluation import blocks, drafting, options, predict
from t5x_lite.training import checkpoint

PAIR = toy_model("pair", blockwise=config.Heads(block=4))
LARGE = toy_model("joined", embed=1024, mlp=4096, layers=8, heads=16, head_dim=64)


def made(name, cfg=PAIR, load=None, **changes):
    return choosing.drafting(cfg, config.Decode(decoder=name, **changes), load)


def test_every_name_has_a_line_of_help_and_makes_a_drafter():
    assert list(options.DECODERS) == ["auto", "plain", *choosing.METHODS]
    assert list(options.ACCEPTANCES) == list(choosing.ACCEPTANCES)
    arguments = {"early": "early:1", "late": "late:1", "draft": "draft:small"}
    for name in choosing.METHODS:
        found = made(arguments.get(name, name), load=lambda path: (PAIR, path))
        assert found.drafter.tree.width > 1
        assert found.accept == acceptance.Exact()
        assert name == "lookahead" or isinstance(found.drafter, Adaptive)


def test_a_width_that_is_named_is_taken_and_others_are_chosen_among():
    assert made("lookup").drafter.widths == (1, 4, 8, 16)
    assert made("lookup", width=5).drafter.tree.width == 5
    assert made("blockwise").drafter.widths == (1, 4)
    assert made("refined").drafter.widths == (1, 4)
    two = dataclasses.replace(PAIR, blockwise=config.Heads(block=2))
    assert made("medusa", two).drafter.tree.depth.max() == 1
    assert made("recycling", width=20).drafter.tree.width == 20
    # A draft model has a cache that must keep up, even while nothing is verified.
    found = made("draft:there", load=lambda path: (PAIR, path))
    assert found.drafter.floor == 2
    assert (type(found.drafter.drafter), found.weights) == (DraftModel, "there")


def test_a_union_has_the_weights_of_each():
    found = made("lookup+draft:there", load=lambda path: (PAIR, path), width=4)
    assert found.weights == (None, "there")
    assert found.drafter.tree.width == 7
    # A plus in a path is part of it.
    odd = made("draft:a+b+lookup", load=lambda path: (PAIR, path), width=4)
    assert odd.weights == ("a+b", None)
    assert Counter(sources(found.drafter)) == {"model": 1, "lookup": 3, "draftmodel": 3}


def test_auto_guesses_only_where_it_is_safe_and_pays():
    auto = lambda cfg, length=choosing.LONG, **changes: made("auto", cfg, length=length, **changes)
    plain = decoding.Drafting()
    assert auto(PAIR) == auto(LARGE, length=64) == auto(LARGE, beams=4) == plain
    assert isinstance(auto(LARGE).drafter, Adaptive)
    assert auto(LARGE).drafter.tree.width == choosing.WIDEST
    assert auto(LARGE, temperature=0.5).drafter == auto(LARGE).drafter
    heads = dataclasses.replace(LARGE, blockwise=config.Heads(block=4))
    assert auto(heads, length=64).drafter.widths == (1, 4)
    assert type(auto(heads).drafter.drafter).__name__ == "Blockwise"


def test_auto_writes_plainly_in_bfloat16(monkeypatch):
    monkeypatch.setattr(choosing.target, "precise", lambda cfg: cfg)
    narrow = dataclasses.replace(LARGE, activations="bfloat16")
    assert made("auto", narrow, length=choosing.LONG) == decoding.Drafting()
    assert isinstance(made("lookup", narrow).drafter, Adaptive)


def test_rules_of_acceptance_by_name():
    assert choosing.rule("exact") == acceptance.Exact()
    assert choosing.rule("top-k:3") == lossy.TopK(3)
    assert choosing.rule("typical") == lossy.Typical()
    assert choosing.rule("typical:0.2:0.1") == lossy.Typical(0.2, 0.1)
    # A drafter with probabilities tells them to rules that ask.
    assert made("blockwise", accept="block", width=3).drafter.drawn
    assert made("blockwise", accept="block").accept == speculative.BlockVerification()
    # What changes the text may not depend on measured prices.
    for rule in ("speculative", "always", "top-k:2"):
        assert made("lookup", accept=rule).drafter.tree.width == choosing.FIXED
    assert not made("blockwise", width=3).drafter.drawn


@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(name="lokup"), "did you mean lookup"),
        (dict(name="lookup+"), "did you mean lookup"),
        (dict(name="lookup+lokup"), "Unknown --decoder"),
        (dict(name="lookup:3"), "nothing after a colon"),
        (dict(name="early"), "early:1"),
        (dict(name="early:two"), "number of layers"),
        (dict(name="draft"), "draft:PATH"),
        (dict(name="lookup", accept="exakt"), "did you mean exact"),
        (dict(name="lookup", accept="top-k"), "top-k:int"),
        (dict(name="lookup", accept="top-k:0"), "at least 1"),
        (dict(name="lookup", accept="lenient:x"), "--accept=lenient:x"),
        (dict(name="lookup", beams=2), "one text per row"),
        (dict(name="lookup", width=1), "Decode.width"),
        (dict(name="blockwise", cfg=LARGE), "need a model with heads"),
    ],
)
def test_a_name_that_means_nothing_says_what_would(asked, message):
    with pytest.raises(ValueError, match=message):
        made(**asked)


def result(call, node, lengths):
    call, node = (np.array(x)[:, None] for x in (call, node))
    lengths = np.array(lengths)[:, None]
    return decoding.Result(call, lengths, None, None, int(call.max()) + 1, call, node)


def test_the_tally_counts_calls_of_each_text_and_guesses_that_held():
    tally = Tally()
    call = [[0, 0, 0, 1, 2, 2], [0, 1, 1, 2, 0, 0], [5, 5, 5, 5, 5, 5]]
    node = [[1, 2, 0, 0, 3, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    tally.add(result(call, node, [6, 4, 6]), ("model", "a", "a", "b"), rows=2)
    assert (tally.tokens, tally.calls) == (10, 6)
    assert tally.held() == pytest.approx([3 / 6, 1 / 6])
    report = tally.report()
    assert report["guessed_by"] == {"model": 6, "a": 3, "b": 1}
    assert report["tokens_per_call"] == pytest.approx(10 / 6, abs=1e-4)
    assert "1.67 each" in str(tally) and "50% 17%" in str(tally)
    assert Tally().report()["tokens_per_call"] == 0 and str(Tally())


def test_infer_writes_the_same_with_any_decoder_and_says_so(folder, capsys):  # noqa: F811
    words = write_words(folder, [*WORDS[:4], "bananabanana"])
    outputs = []
    for name in ("plain", "lookup"):
        out = folder / f"{name}.jsonl"
        extra = ["--verify", f"--draw={folder / 'b.html'}", "--width=4"] if name != "plain" else []
        infer(folder, f"--input={words}", f"--output={out}", f"--decoder={name}", *extra)
        outputs.append(rows(out))
    assert [row["prediction"] for row in outputs[0]] == [row["prediction"] for row in outputs[1]]
    said = capsys.readouterr().err
    assert "identical to plain decoding: 5 of 5" in said
    assert "tokens in" in said and "each" in said
    shown = (folder / "b.html").read_text()
    assert shown.count("<pre>") == 5
    assert "http" not in shown
    settings = json.loads((folder / "lookup.jsonl.settings.json").read_text())
    assert settings["decode.decoder"] == "lookup"


def test_a_text_that_differs_is_told_with_its_gap(folder, capsys, monkeypatch):  # noqa: F811
    words = write_words(folder, WORDS[:3])
    every = ["--decoder=lookup", "--width=4", "--accept=always", "--verify"]
    infer(folder, f"--input={words}", *every)
    said = capsys.readouterr().err
    found = re.search(r"identical to plain decoding: (\d) of 3", said)
    assert int(found[1]) < 3
    assert "differs from plain decoding at token" in said


def test_the_gap_is_that_of_the_log_probabilities(folder):  # noqa: F811
    session = interactive.load(folder)
    predictor = session.predictor
    plain = session.predict("cat", decoder="plain").tokens[0]
    ids = predictor.read(["cat"])[0]
    other = [*plain[:2], (plain[2] + 1) % 50, *plain[3:]]
    assert drafting.difference(predictor, ids, plain, plain) is None
    found = drafting.difference(predictor, ids, plain, other)
    assert (found.place, found.plain, found.drafted) == (2, plain[2], other[2])
    scored = decoding.score(predictor.cfg, predictor.params, [ids] * 8, [plain[:3], other[:3]] * 4)
    assert found.gap == pytest.approx(scored.tokens[0, 2] - scored.tokens[1, 2], abs=1e-4)
    assert found.gap > 0
    shorter = drafting.difference(predictor, ids, plain, plain[:-1])
    assert shorter.place == len(plain) - 1 and np.isnan(shorter.gap)


def test_a_draft_model_of_another_vocabulary_is_refused(folder):  # noqa: F811
    session = interactive.load(folder)
    drafters = session.predictor.drafters

    own, drafters.targets = drafters.targets, session.predictor.inputs
    with pytest.raises(ValueError, match="another vocabulary"):
        drafters.load(str(folder))
    drafters.targets = own
    cfg, weights = drafters.load(str(folder))
    assert cfg == session.predictor.cfg


def smaller(ours, monkeypatch):
    """A second checkpoint beside ours: the same with a decoder half as wide inside."""
    run = run_in(ours)
    stack = dataclasses.replace(run.model.decoder, mlp=16)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=stack))
    small, (params, step) = ours / "small", jax.device_get(checkpoint.load_params(ours))
    small.mkdir()
    (small / "config.gin").write_text(config_file.text(run))
    shutil.copytree(ours / "vocabulary", small / "vocabulary")
    shapes = jax.tree.leaves(model.shapes(run.model))
    flat, tree = jax.tree.flatten(params)
    cut = [leaf[tuple(map(slice, like.shape))] for leaf, like in zip(flat, shapes, strict=True)]
    known = {str(ours): params, str(small): jax.tree.unflatten(tree, cut)}
    monkeypatch.setattr(checkpoint, "load_params", lambda path, **given: (known[str(path)], step))
    return small


def test_another_checkpoint_drafts(folder, capsys, monkeypatch):  # noqa: F811
    small, words = smaller(folder, monkeypatch), write_words(folder, WORDS[:4])
    out = folder / "out.jsonl"
    asked = [f"--decoder=draft:{small}", "--width=4", "--verify"]
    infer(folder, f"--input={words}", f"--output={out}", *asked)
    assert "identical to plain decoding: 4 of 4" in capsys.readouterr().err
    assert len(rows(out)) == 4


def test_recycling_begins_with_what_was_written(folder, capsys):  # noqa: F811
    words = write_words(folder, WORDS[:4])
    out = folder / "out.jsonl"
    infer(folder, f"--input={words}", f"--output={out}")
    capsys.readouterr()
    for name in ("recycling", f"recycling:{out}"):
        infer(folder, f"--input={words}", f"--decoder={name}", "--width=16", "--verify")
    said = capsys.readouterr().err
    assert said.count("identical to plain decoding: 4 of 4") == 2
    alone, begun = (float(each) for each in re.findall(r"([\d.]+) each", said))
    assert begun > alone
    (folder / "none.txt").write_text("\n")
    drafters = interactive.load(folder).predictor.drafters
    for path, message in (("none.txt", "has no text"), ("nowhere", "No such file")):
        with pytest.raises(ValueError, match=message):
            drafters.texts(str(folder / path))


def test_mistakes_are_told_before_anything_is_read(folder):  # noqa: F811
    words = write_words(folder)
    for extra in (["--draw=b.gif"], ["--verify", "--embed=mean"], ["--draw=-", "--beams=2"]):
        with pytest.raises(SystemExit):
            infer(folder, f"--input={words}", *extra)


TEXT = blocks.Drawn(
    "an <input>",
    ["a", " b\n", "\tc", "<d>", "", "é" * 130],
    [0, 0, 1, 1, 2, 3],
    ["lookup", "model", "draft", "model", "model", "model"],
)


def test_pictures_show_every_token_and_every_call(tmp_path):
    page = blocks.page([TEXT])
    assert page.count("<b>") == 4
    assert "&lt;d&gt;" in page and "<d>" not in page and "an &lt;input&gt;" in page
    assert page.count('title="call') == 6
    assert "6 tokens in 4 calls, 1.50 each" in page
    terminal = blocks.terminal([TEXT])
    assert terminal.count("|") == 4 + 1
    assert "lookup" in terminal and "draft" in terminal
    blocks.draw(str(tmp_path / "b.png"), [TEXT])
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="must end in"):
        blocks.draw("b.gif", [TEXT])
    blocks.draw(str(tmp_path / "empty.html"), [])


def test_lines_are_broken_where_they_are_full_and_where_the_text_says():
    placed = blocks.laid_out(["ab", "c\nd", "x" * 99, "", "y"])
    assert [(piece.line, piece.column) for piece in placed] == [
        *[(0, 0), (0, 2), (1, 0), (1, 1), (1, 100), (2, 0)]
    ]


def test_pieces_of_a_text_are_what_each_token_adds():
    class Bytes:
        decode = staticmethod(lambda ids: bytes(ids).decode("utf-8", "replace"))

    ids = list("né".encode())
    prediction = predict.Prediction(["né"], [0.0], [0.0], [ids], [0, 0, 1], ["model"] * 3)
    found = blocks.drawn("x", prediction, Bytes())
    assert found.pieces[0] == "n" and len(found.pieces) == 3


@pytest.fixture(autouse=True)
def alone():
    use_one_device()
