# SPDX-License-Identifier: Apache-2.0
"""Laws of the options by which infer writes several texts and chooses among them."""

import sys

import pytest
import test_evaluation_commands as commands
from test_evaluation_commands import WORDS, infer, rows, write_words

from t5x_lite import interactive
from t5x_lite.evaluation import metrics

folder = commands.folder
SAMPLES = ("--temperature=1", "--n_best=3", "--seed=4")


def predicted(folder, *options):
    """Lines that infer writes for two words."""
    out = folder / "out.jsonl"
    infer(folder, f"--input={write_words(folder, WORDS[:2])}", f"--output={out}", *options)
    return rows(out)


@pytest.mark.slow
def test_choose_orders_the_texts_of_a_line_by_its_utility(folder):
    for row in predicted(folder, *SAMPLES, "--choose=mbr:edit_distance"):
        assert row["prediction"] == row["predictions"][0]
        assert row["utilities"] == sorted(row["utilities"], reverse=True)
        for text, utility in zip(row["predictions"], row["utilities"], strict=True):
            risks = [
                metrics.find_metric("edit_distance")([text], [[other]])["edit_distance"]
                for other in row["predictions"]
            ]
            assert utility == pytest.approx(-sum(risks) / 3, abs=1e-4)


@pytest.mark.slow
def test_logprobs_writes_the_probability_of_every_token_and_of_alternatives(folder):
    for row in predicted(folder, *SAMPLES, "--logprobs=2"):
        assert [len(text) for text in row["all_logprobs"]] == [
            len(text) for text in row["all_logprobs"]
        ]
        assert row["logprobs"] == row["all_logprobs"][0]
        for token in row["logprobs"]:
            best = [each["logprob"] for each in token["top_logprobs"]]
            assert best == sorted(best, reverse=True) and len(best) == 2
            assert token["logprob"] <= best[0] and 0 <= token["truncated"] < 1
        assert "logprobs" not in predicted(folder, *SAMPLES, "--overwrite")[0]
        break


def test_pairs_are_the_best_and_the_worst_text_of_a_line(folder):
    several = predicted(folder, *SAMPLES, "--choose=mbr:edit_distance")
    pairs = predicted(folder, *SAMPLES, "--choose=mbr:edit_distance", "--pairs", "--overwrite")
    for row, pair, word in zip(several, pairs, WORDS, strict=False):
        utilities = row["utilities"]
        assert pair["prompt"] == word and pair["chosen"] == row["prediction"]
        assert pair["rejected"] == row["predictions"][utilities.index(min(utilities))]


@pytest.mark.slow
def test_a_search_is_guided_by_a_function_of_the_working_folder(folder, monkeypatch):
    (folder / "judge_of_mine.py").write_text(
        "def short(input, texts):\n    return [-len(text) for text in texts]\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    options = ("--search=best", "--particles=3", "--segment_tokens=4", "--segment_stop", " ")
    judged = predicted(folder, *SAMPLES, *options, "--judge=function:judge_of_mine.short")
    for row in judged:
        assert row["utilities"] == [-len(text) for text in row["predictions"]]
        assert row["utilities"] == sorted(row["utilities"], reverse=True)
    session = interactive.load(folder)
    results = session.search(
        WORDS[:2],
        lambda input, texts: [-len(text) for text in texts],
        **dict(search="best", particles=3, segment_tokens=4, segment_stop=" ", n_best=3, seed=4),
    )
    assert [each.texts for each in results] == [row["predictions"] for row in judged]


@pytest.mark.slow
def test_a_companion_guides_the_texts_of_a_command_and_of_a_session(folder):
    def written(*options):
        return [row["prediction"] for row in predicted(folder, *options, "--overwrite")]

    plain, named = written(), "--companion=unconditional"
    guided = written(named, "--combine=guidance:3")
    assert guided != plain and written(named, "--combine=guidance:1") == plain
    drafts = ("--drafter=lookup", "--draft_length=4")
    assert written(named, "--combine=guidance:3", *drafts) == guided
    session = interactive.load(folder)
    options = dict(companion="unconditional", combine="guidance:3")
    assert session.generate(WORDS[:2], **options) == guided
    assert "".join(session.stream(WORDS[0], **options)) == guided[0]


@pytest.mark.parametrize(
    "options, words",
    [
        (("--pairs",), "--pairs compares several texts of a line: pass --n_best=2 or more"),
        (("--choose=score",), "--choose score orders several texts: set --n_best to 2 or more"),
        (("--search=smc", "--temperature=1"), "--search smc needs a --judge: score, mbr:METRIC"),
        (("--search=smc", "--judge=score"), "searches among samples: set --temperature"),
        (("--judge=score",), "--judge score guides a search: set --search"),
        (
            ("--search=smc", "--judge=score", "--temperature=1", "--verify"),
            "leave out --search",
        ),
        (
            ("--search=smc", "--judge=function:nowhere.f", "--temperature=1"),
            "Decode.judge function:nowhere.f is no function that can be imported",
        ),
        (("--beams=4", "--beam_groups=3"), "--beams (4) must be a multiple of --beam_groups (3)"),
        (("--beams=4", "--diversity_penalty=1"), "set --beam_groups to 2 or more"),
        (("--companion=layers:high",), "companion layers:high: the decoder has one layer only"),
        (
            ("--logit_bias=3",),
            "this field of config.Decode has none; set it in the",
        ),
        (("--companion=guidance",), "is not one of model:PATH, prompt:TEXT"),
        (("--combine=dola",), "--combine dola has nothing to combine: set --companion"),
    ],
)
def test_contradictions_are_refused_by_the_names_of_their_options(folder, capsys, options, words):
    with pytest.raises(SystemExit) as stopped:
        predicted(folder, *options)
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
