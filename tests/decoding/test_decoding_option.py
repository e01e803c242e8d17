# SPDX-License-Identifier: Apache-2.0
"""Laws of --drafter: drafters by name, the text stays, figures add up, pictures are complete."""

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

from t5x_lite import config, decoding, interactive, model
from t5x_lite.checkpoints import manager
from t5x_lite.cli import options
from t5x_lite.config import gin_file
from t5x_lite.decoding.acceptance import approximate, exact, speculative
from t5x_lite.decoding.acceptance.stats import AcceptanceStats
from t5x_lite.decoding.adaptive.drafter import Adaptive
from t5x_lite.decoding.drafters import registry
from t5x_lite.decoding.drafters.draft_model import DraftModel
from t5x_lite.decoding.drafters.union import draft_sources
from t5x_lite.evaluation import draft_report, drafting
from t5x_lite.evaluation.prediction import Prediction

PAIR = toy_model("encoder_decoder", draft_heads=config.DraftHeads(block=4))
LARGE = toy_model("decoder_only", embed=1024, mlp=4096, layers=8, heads=16, head_dim=64)


def drafting_of(name, cfg=PAIR, load=None, **changes):
    return registry.make_drafting(cfg, config.Decode(drafter=name, **changes), load)


def test_every_name_has_a_line_of_help_and_a_drafter():
    assert list(options.DRAFTERS) == ["auto", "plain", *registry.METHODS]
    assert list(options.ACCEPTANCES) == list(registry.ACCEPTANCES)
    arguments = {"early": "early:1", "late": "late:1", "draft": "draft:small"}
    for name in registry.METHODS:
        resolved = drafting_of(arguments.get(name, name), load=lambda path: (PAIR, path))
        assert resolved.drafter.tree.width > 1
        assert resolved.accept == exact.Exact()
        assert name == "lookahead" or isinstance(resolved.drafter, Adaptive)


def test_a_draft_length_that_is_set_is_used_and_others_are_adaptive():
    assert drafting_of("lookup").drafter.widths == (1, 4, 8, 16)
    assert drafting_of("lookup", draft_length=5).drafter.tree.width == 5
    assert drafting_of("blockwise").drafter.widths == (1, 4)
    assert drafting_of("refined").drafter.widths == (1, 4)
    two = dataclasses.replace(PAIR, draft_heads=config.DraftHeads(block=2))
    assert drafting_of("medusa", two).drafter.tree.depth.max() == 1
    assert drafting_of("recycling", draft_length=20).drafter.tree.width == 20
    # A draft model has a cache that must keep up, even while nothing is verified.
    resolved = drafting_of("draft:there", load=lambda path: (PAIR, path))
    assert resolved.drafter.floor == 2
    assert (type(resolved.drafter.drafter), resolved.weights) == (DraftModel, "there")


def test_a_union_has_the_weights_of_each():
    resolved = drafting_of("lookup+draft:there", load=lambda path: (PAIR, path), draft_length=4)
    assert resolved.weights == (None, "there")
    assert resolved.drafter.tree.width == 7
    # A plus in a path is part of it.
    odd = drafting_of("draft:a+b+lookup", load=lambda path: (PAIR, path), draft_length=4)
    assert odd.weights == ("a+b", None)
    assert Counter(draft_sources(resolved.drafter)) == {"model": 1, "lookup": 3, "draftmodel": 3}


def test_auto_drafts_only_where_it_is_safe_and_pays():

    def auto(cfg, max_new_tokens=registry.MIN_LOOKUP_LENGTH, **changes):
        return drafting_of("auto", cfg, max_new_tokens=max_new_tokens, **changes)

    plain = decoding.Drafting()
    assert auto(PAIR) == auto(LARGE, max_new_tokens=64) == auto(LARGE, beams=4) == plain
    assert isinstance(auto(LARGE).drafter, Adaptive)
    assert auto(LARGE).drafter.tree.width == registry.MAX_AUTO_WIDTH
    assert auto(LARGE, temperature=0.5).drafter == auto(LARGE).drafter
    heads = dataclasses.replace(LARGE, draft_heads=config.DraftHeads(block=4))
    assert auto(heads, max_new_tokens=64).drafter.widths == (1, 4)
    assert type(auto(heads).drafter.drafter).__name__ == "Blockwise"


def test_auto_is_plain_decoding_in_bfloat16(monkeypatch):
    monkeypatch.setattr(registry, "dtype_of_computation", lambda cfg, compute: cfg.dtype)
    narrow = dataclasses.replace(LARGE, dtype="bfloat16")
    assert (
        drafting_of("auto", narrow, max_new_tokens=registry.MIN_LOOKUP_LENGTH)
        == decoding.Drafting()
    )
    assert isinstance(drafting_of("lookup", narrow).drafter, Adaptive)


def test_rules_of_acceptance_by_name():
    assert registry.make_acceptance("exact") == exact.Exact()
    assert registry.make_acceptance("top-k:3") == approximate.TopK(3)
    assert registry.make_acceptance("typical") == approximate.Typical()
    assert registry.make_acceptance("typical:0.2:0.1") == approximate.Typical(0.2, 0.1)
    # Drafters that have distributions return them for rules that need them.
    assert drafting_of("blockwise", accept="block", draft_length=3).drafter.stochastic
    assert drafting_of("blockwise", accept="block").accept == speculative.BlockVerification()
    # What changes the text may not depend on measured prices.
    for rule in ("speculative", "always", "top-k:2"):
        assert drafting_of("lookup", accept=rule).drafter.tree.width == registry.FIXED_WIDTH
    assert not drafting_of("blockwise", draft_length=3).drafter.stochastic


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(name="lokup"), "did you mean lookup"),
        (dict(name="lookup+"), "did you mean lookup"),
        (dict(name="lookup+lokup"), "Unknown drafter"),
        (dict(name="plain+lookup"), "The drafter plain stands alone"),
        (dict(name="auto:3"), "The drafter auto stands alone"),
        (dict(name="lookup:3"), "nothing after a colon"),
        (dict(name="early"), "early:1"),
        (dict(name="early:two"), "number of layers"),
        (dict(name="draft"), "draft:PATH"),
        (dict(name="lookup", accept="exakt"), "did you mean exact"),
        (dict(name="lookup", accept="top-k"), "top-k:int"),
        (dict(name="lookup", accept="top-k:0"), "at least 1"),
        (dict(name="lookup", accept="lenient:x"), "accept=lenient:x"),
        (dict(name="lookup", beams=2), "one text per row"),
        (dict(name="lookup", draft_length=1), "Decode.draft_length"),
        (dict(name="lookahead", draft_length=8), "draft_length=8 is not for drafter=lookahead"),
        (dict(name="blockwise", cfg=LARGE), "need a model with heads"),
    ],
)
def test_an_unknown_name_is_refused_with_a_suggestion(arguments, message):
    with pytest.raises(ValueError, match=message):
        drafting_of(**arguments)


def result(step, node, lengths):
    step, node = (np.array(x)[:, None] for x in (step, node))
    lengths = np.array(lengths)[:, None]
    return decoding.Result(step, lengths, None, None, int(step.max()) + 1, step, node)


def test_acceptance_stats_count_steps_and_accepted_drafts_of_each_text():
    stats = AcceptanceStats()
    step = [[0, 0, 0, 1, 2, 2], [0, 1, 1, 2, 0, 0], [5, 5, 5, 5, 5, 5]]
    node = [[1, 2, 0, 0, 3, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    stats.add(result(step, node, [6, 4, 6]), ("model", "a", "a", "b"), rows=2)
    assert (stats.tokens, stats.steps) == (10, 6)
    assert stats.acceptance_by_position() == pytest.approx([3 / 6, 1 / 6])
    report = stats.report()
    assert report["guessed_by"] == {"model": 6, "a": 3, "b": 1}
    assert report["tokens_per_call"] == pytest.approx(10 / 6, abs=1e-4)
    assert "1.67 each" in str(stats) and "50% 17%" in str(stats)
    assert AcceptanceStats().report()["tokens_per_call"] == 0 and str(AcceptanceStats())
    # As of a masked block, whose tokens are all the model's own.
    alone = AcceptanceStats()
    alone.add(result([[0, 1, 0, 1]], [[0] * 4], [4]), ("model",), rows=1)
    assert "2.00 each" in str(alone) and "draft" not in str(alone)


@pytest.mark.slow
def test_infer_writes_the_same_with_any_drafter_and_says_so(folder, capsys):  # noqa: F811
    words = write_words(folder, [*WORDS[:4], "bananabanana"])
    outputs = []
    for name in ("plain", "lookup"):
        out = folder / f"{name}.jsonl"
        extra = (
            ["--verify", f"--draw={folder / 'b.html'}", "--draft_length=4"]
            if name != "plain"
            else []
        )
        infer(folder, f"--input={words}", f"--output={out}", f"--drafter={name}", *extra)
        outputs.append(rows(out))
    assert [row["prediction"] for row in outputs[0]] == [row["prediction"] for row in outputs[1]]
    output = capsys.readouterr().err
    assert "identical to plain decoding: 5 of 5" in output
    assert "tokens in" in output and "each" in output
    shown = (folder / "b.html").read_text()
    assert shown.count("<pre>") == 5
    assert "http" not in shown
    settings = json.loads((folder / "lookup.jsonl.settings.json").read_text())
    assert settings["decode.drafter"] == "lookup"


@pytest.mark.slow
def test_a_text_that_differs_is_reported_with_its_gap(folder, capsys, monkeypatch):  # noqa: F811
    words = write_words(folder, WORDS[:3])
    every = ["--drafter=lookup", "--draft_length=4", "--accept=always", "--verify"]
    infer(folder, f"--input={words}", *every)
    output = capsys.readouterr().err
    match = re.search(r"identical to plain decoding: (\d) of 3", output)
    assert int(match[1]) < 3
    assert "differs from plain decoding at token" in output


def test_the_gap_is_that_of_the_log_probabilities(folder):  # noqa: F811
    session = interactive.load(folder)
    predictor = session.predictor
    plain = session.predict("cat", drafter="plain").tokens[0]
    ids = predictor.encode_inputs(["cat"])[0]
    other = [*plain[:2], (plain[2] + 1) % 50, *plain[3:]]
    assert drafting.first_difference(predictor, ids, plain, plain) is None
    difference = drafting.first_difference(predictor, ids, plain, other)
    assert (difference.place, difference.plain, difference.drafted) == (2, plain[2], other[2])
    scored = decoding.score(predictor.cfg, predictor.params, [ids] * 8, [plain[:3], other[:3]] * 4)
    assert difference.gap == pytest.approx(scored.tokens[0, 2] - scored.tokens[1, 2], abs=1e-4)
    assert difference.gap > 0
    shorter = drafting.first_difference(predictor, ids, plain, plain[:-1])
    assert shorter.place == len(plain) - 1 and np.isnan(shorter.gap)


def test_a_draft_model_of_another_vocabulary_is_refused(folder):  # noqa: F811
    session = interactive.load(folder)
    drafters = session.predictor.drafters

    targets, drafters.targets = drafters.targets, session.predictor.inputs
    with pytest.raises(ValueError, match="another vocabulary"):
        drafters.load_draft_model(str(folder))
    drafters.targets = targets
    cfg, weights = drafters.load_draft_model(str(folder))
    assert cfg == session.predictor.cfg


def smaller(ours, monkeypatch):
    """A second checkpoint beside ours: the same with a decoder half as wide inside."""
    run = run_in(ours)
    stack = dataclasses.replace(run.model.decoder, mlp=16)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=stack))
    small, (params, step) = ours / "small", jax.device_get(manager.load_params(ours))
    (small / manager.FOLDER / "7").mkdir(parents=True)
    (small / "config.gin").write_text(gin_file.to_text(run))
    shutil.copytree(ours / "vocabulary", small / "vocabulary")
    shapes = jax.tree.leaves(model.shapes(run.model))
    flat, tree = jax.tree.flatten(params)
    cut = [leaf[tuple(map(slice, like.shape))] for leaf, like in zip(flat, shapes, strict=True)]
    known = {str(ours): params, str(small): jax.tree.unflatten(tree, cut)}
    monkeypatch.setattr(manager, "load_params", lambda path, **options: (known[str(path)], step))
    return small


@pytest.mark.slow
def test_another_checkpoint_drafts(folder, capsys, monkeypatch):  # noqa: F811
    small, words = smaller(folder, monkeypatch), write_words(folder, WORDS[:4])
    out = folder / "out.jsonl"
    arguments = [f"--drafter=draft:{small}", "--draft_length=4", "--verify"]
    infer(folder, f"--input={words}", f"--output={out}", *arguments)
    assert "identical to plain decoding: 4 of 4" in capsys.readouterr().err
    assert len(rows(out)) == 4


@pytest.mark.slow
def test_recycling_begins_with_texts(folder, capsys):  # noqa: F811
    words = write_words(folder, WORDS[:4])
    out = folder / "out.jsonl"
    infer(folder, f"--input={words}", f"--output={out}")
    capsys.readouterr()
    for name in ("recycling", f"recycling:{out}"):
        infer(folder, f"--input={words}", f"--drafter={name}", "--draft_length=16", "--verify")
    output = capsys.readouterr().err
    assert output.count("identical to plain decoding: 4 of 4") == 2
    alone, begun = (float(each) for each in re.findall(r"([\d.]+) each", output))
    assert begun > alone
    (folder / "none.txt").write_text("\n")
    drafters = interactive.load(folder).predictor.drafters
    for path, message in (("none.txt", "has no text"), ("nowhere", "No such file")):
        with pytest.raises(ValueError, match=message):
            drafters.load_texts(str(folder / path))


def test_mistakes_are_reported_before_anything_is_read(folder):  # noqa: F811
    words = write_words(folder)
    for extra in (["--draw=b.gif"], ["--verify", "--embed=mean"], ["--draw=-", "--beams=2"]):
        with pytest.raises(SystemExit):
            infer(folder, f"--input={words}", *extra)


TEXT = draft_report.DraftedText(
    "an <input>",
    ["a", " b\n", "\tc", "<d>", "", "é" * 130],
    [0, 0, 1, 1, 2, 3],
    ["lookup", "model", "draft", "model", "model", "model"],
)


def test_pictures_show_every_token_and_every_step(tmp_path):
    page = draft_report.html_page([TEXT])
    assert page.count("<b>") == 4
    assert "&lt;d&gt;" in page and "<d>" not in page and "an &lt;input&gt;" in page
    assert page.count('title="call') == 6
    assert "6 tokens in 4 passes, 1.50 each" in page
    terminal = draft_report.terminal_text([TEXT])
    assert terminal.count("|") == 4 + 1
    assert "lookup" in terminal and "draft" in terminal
    draft_report.write_picture(str(tmp_path / "b.png"), [TEXT])
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="must end in"):
        draft_report.write_picture("b.gif", [TEXT])
    draft_report.write_picture(str(tmp_path / "empty.html"), [])


def test_lines_are_broken_where_they_are_full_and_where_the_text_says():
    placed = draft_report.lay_out(["ab", "c\nd", "x" * 99, "", "y"])
    assert [(piece.line, piece.column) for piece in placed] == [
        *[(0, 0), (0, 2), (1, 0), (1, 1), (1, 100), (2, 0)]
    ]


def test_pieces_of_a_text_are_what_each_token_adds():
    class Bytes:
        decode = staticmethod(lambda ids: bytes(ids).decode("utf-8", "replace"))

    ids = list("né".encode())
    prediction = Prediction(["né"], [0.0], [0.0], [ids], [0, 0, 1], ["model"] * 3)
    text = draft_report.draft_text("x", prediction, Bytes())
    assert text.pieces[0] == "n" and len(text.pieces) == 3


@pytest.fixture(autouse=True)
def alone():
    use_one_device()
