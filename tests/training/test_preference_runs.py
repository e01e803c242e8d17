# SPDX-License-Identifier: Apache-2.0
"""Laws of runs on pairs and on rewards: resumption, references, rewards, and what is refused."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import mark_exhaustive
from hub_toys import write_folders
from test_fine_tuning import flags

from t5x_lite import interactive, train
from t5x_lite.checkpoints import manager

WORDS = ("abc", "bca", "cab", "aab", "bbca", "ccab", "a", "acbacb")
PAIRS = "--gin_file=configs/adaptation/preferences.gin"
GRPO = {
    "Run.grpo": "@config.Grpo()",
    "Grpo.reward": "edit_distance",
    "Grpo.samples": 4,
    "Model.dropout": 0.0,
    "Schedule.peak": 0.01,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with pairs of letters, beside which the configs of the clone are found."""
    monkeypatch.chdir(Path(__file__).parents[2])
    rows = [
        {
            "prompt": word,
            "chosen": word[::-1],
            "rejected": "c" + word,
            "inputs": word,
            "targets": word[::-1],
            "reference_chosen": -len(word) - 0.5,
            "reference_rejected": -2.0 * len(word),
        }
        for word in WORDS
    ] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def bind(fields: dict) -> list[str]:
    return [f"--gin.config.{name}={value}" for name, value in fields.items()]


def pair_flags(place, source, *more, steps=2, **fields) -> list[str]:
    first, *rest = flags(place, source, *bind(fields), *more, steps=steps)
    lengths = '--gin.TASK_FEATURE_LENGTHS={"inputs": 16, "targets": 20}'
    rate = bind({"Train.log_every": 1, "Schedule.peak": 0.01, "Schedule.warmup": 0})
    rate.append("--gin.config.Schedule.kind=constant")
    return [first, PAIRS, *rest, lengths, *rate]


def grpo_flags(place, source, *more, steps=2, **fields) -> list[str]:
    bound = bind(GRPO | {"Train.log_every": 1} | fields)
    return flags(place, source, *bound, *more, steps=steps)


def logged(place, run="run") -> list[dict]:
    lines = (place / run / "metrics.jsonl").read_text().splitlines()
    every = [json.loads(line) for line in lines]
    return [line for line in every if "train/objective" in line]


def assert_same_weights(one: Path, other: Path) -> None:
    jax.tree.map(
        np.testing.assert_array_equal, *(manager.load_params(path)[0] for path in (one, other))
    )


@pytest.mark.slow
# Rewards save more than pairs: samples are drawn by the step's number.
@pytest.mark.parametrize(
    "make_flags",
    mark_exhaustive([pair_flags, grpo_flags], kept=[grpo_flags]),
    ids=["pairs", "rewards"],
)
def test_a_run_that_is_stopped_goes_on_bitwise(make_flags, place, folders):
    fields = {} if make_flags is pair_flags else {"Grpo.updates": 2}
    assert train.main(make_flags(place, folders / "hf", steps=4, **fields)) == 0
    other = f"--gin.MODEL_DIR={place / 'other'}"
    for steps in (3, 4):
        assert train.main(make_flags(place, folders / "hf", other, steps=steps, **fields)) == 0
    assert_same_weights(place / "run", place / "other")
    names = ("train/objective", "train/loss", "train/gradient_norm")
    lines, again = ([[x[n] for n in names] for x in logged(place, d)] for d in ("run", "other"))
    assert lines == again and len(lines) == 4


@pytest.mark.slow
def test_a_run_on_pairs_prefers_the_chosen_texts_and_begins_at_the_reference(place, folders):
    assert train.main(pair_flags(place, folders / "hf", steps=30)) == 0
    first, *_, last = logged(place)
    assert first["train/objective"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["train/reward_margin"] == pytest.approx(0, abs=1e-5)
    assert last["train/preference_accuracy"] == 100 and last["train/objective"] < 0.6
    assert last["train/reward_margin"] == pytest.approx(
        last["train/chosen_reward"] - last["train/rejected_reward"], abs=1e-4
    )
    report = json.loads((place / "run/report.json").read_text())
    assert "loss" in json.dumps(report)


@pytest.mark.slow
def test_the_reference_of_adapters_is_the_model_without_them(place, folders):
    lora = ["--gin_file=configs/adaptation/lora.gin", *bind({"Lora.rank": 2, "Lora.alpha": 4})]
    named = f"--gin.config.Preferences.reference={folders / 'hf'}"
    other = f"--gin.MODEL_DIR={place / 'other'}"
    for more in ([], [named, other]):
        first, second, *rest = pair_flags(place, folders / "hf", *lora[1:], *more, steps=3)
        assert train.main([first, second, lora[0], *rest]) == 0
    assert_same_weights(place / "run", place / "other")
    assert logged(place)[-1]["train/reward_margin"] != 0


@pytest.mark.slow
def test_scores_of_a_file_take_the_place_of_a_reference(place, folders):
    """Those of the checkpoint itself give the loss at the reference, log 2; others do not."""
    session = interactive.load(folders / "hf")
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"exact_{side}"] = session.score(row["prompt"], row[side])
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = {}
    for name in ("exact", "reference"):
        fields = {
            "Files.reference": f'("{name}_chosen", "{name}_rejected")',
            "Files.broken": "stop",
        }
        folder = f"--gin.MODEL_DIR={place / name}"
        assert train.main(pair_flags(place, folders / "hf", folder, steps=1, **fields)) == 0
        losses[name] = logged(place, name)[0]["train/objective"]
    assert losses["exact"] == pytest.approx(np.log(2), abs=1e-5)
    assert losses["reference"] != pytest.approx(np.log(2), abs=1e-3)


@pytest.mark.slow
def test_odds_need_no_reference(place, folders):
    fields = {"Preferences.loss": "orpo", "Preferences.beta": 0.5}
    assert train.main(pair_flags(place, folders / "hf", steps=4, **fields)) == 0
    first, *_, last = logged(place)
    assert "train/kl" not in first and last["train/objective"] < first["train/objective"]


@pytest.mark.slow
def test_rewards_rise_and_sampler_and_trainer_agree(place, folders, functions):
    fields = {"Grpo.kl_weight": 0.0, "Schedule.peak": 0.02, "Evaluate.examples": 4}
    fields |= {"Grpo.reward": f"{functions}.share_of_a"}
    assert train.main(grpo_flags(place, folders / "hf", steps=25, **fields)) == 0
    lines = logged(place)
    rewards = [line["train/reward"] for line in lines]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5])
    assert max(line["train/sampler_gap"] for line in lines) < 1e-4
    assert all(0 <= line["train/equal_groups"] <= 1 for line in lines)
    # Of random weights, whose logits are large; those of a trained model are within 1e-5.
    assert np.median([line["train/sampler_gap"] for line in lines]) < 1e-5
    assert lines[0]["train/sample_tokens"] <= 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields, cause",
    [
        ({"Grpo.temperature": 0.5}, "Grpo.temperature is 0.5"),
        pytest.param(
            {"Grpo.top_k": 2},
            "Grpo.top_k and Grpo.top_p leave tokens out",
            marks=pytest.mark.exhaustive,  # compiles a sampler for another sentence
        ),
    ],
    ids=["temperature", "truncation"],
)
def test_a_sampler_of_another_distribution_is_said(fields, cause, place, folders, caplog):
    assert train.main(grpo_flags(place, folders / "hf", steps=2, **fields)) == 0
    assert caplog.text.count("drew samples") == 1 and cause in caplog.text
    assert logged(place)[0]["train/sampler_gap"] > 1e-3


REWARDS = """
def first_letter(input, texts, references):
    assert isinstance(input, str) and len(references) == 1
    return [float(text[:1] == input[-1:]) for text in texts]

def share_of_a(input, texts, references):
    return [text.count("a") / max(len(text), 1) for text in texts]

def fails(input, texts, references):
    raise KeyError("weights")

def nan(input, texts, references):
    return [float("nan")] * len(texts)

def too_few(input, texts, references):
    return [1.0]

def nothing(input, texts, references):
    return None

number = 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "toy_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    return "function:toy_rewards"


def refuse(words, capsys) -> str:
    with pytest.raises(SystemExit, match="2"):
        train.main(words)
    return capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_a_user_s_reward_is_called_with_input_texts_and_references(place, folders, functions):
    fields = {"Grpo.reward": f"{functions}.first_letter"}
    assert train.main(grpo_flags(place, folders / "hf", steps=1, **fields)) == 0
    assert 0 <= logged(place)[0]["train/reward"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words",
    [
        ("fails", "failed on input '.*': KeyError: 'weights'"),
        ("nan", "must return a finite number for each of 4 texts; .* it returned .nan"),
        ("too_few", r"must return .* of 4 texts; .* it returned \[1.0\]"),
        ("nothing", "must return .* of 4 texts; .* it returned None"),
    ],
)
def test_a_reward_that_is_no_number_for_each_text_is_named(
    name, words, place, folders, functions, capsys
):
    fields = {"Grpo.reward": f"{functions}.{name}"}
    error = refuse(grpo_flags(place, folders / "hf", steps=1, **fields), capsys)
    assert re.search(rf"Grpo.reward {functions}.{name} {words}", error), error
    assert not list((place / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"Grpo.reward": "exactmatch"}, "'exactmatch' is not a reward: did you mean exact_match"),
        ({"Grpo.reward": "function:toy_rewards.none"}, "no function that can be imported"),
        ({"Grpo.reward": "function:toy_rewards.number"}, "function:toy_rewards.number is no func"),
        ({"Grpo.samples": 1}, "Grpo.samples must be at least 2; got 1"),
        ({"Grpo.kl_weight": 0.0, "Grpo.reference": "x"}, "Grpo.reference has no effect"),
        ({"Model.dropout": 0.1}, "Run.grpo compares probabilities of texts: bind Model.dropout"),
        ({"Train.label_smoothing": 0.1}, "bind Train.label_smoothing = 0.0"),
        ({"Grpo.reference": "/nowhere"}, "Grpo.reference: .*/nowhere"),
        ({"Files.rejected": "rejected"}, "Files.rejected names texts that are not to be learned"),
        ({"Data.objective": "@config.PrefixLM()"}, "Run.grpo reads inputs and targets of a task"),
    ],
)
def test_what_cannot_be_rewarded_is_refused_at_the_door(
    fields, message, place, folders, functions, capsys
):
    if "Files.rejected" in fields:
        fields = fields | {"Run.grpo": None}
        words = flags(place, folders / "hf", "--dry_run", *bind(fields))
    else:
        words = grpo_flags(place, folders / "hf", "--dry_run", **fields)
    assert re.search(message, refuse(words, capsys))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"Files.rejected": None}, "bind Files.rejected, the field of the text"),
        (
            {"Files.rejected": "missing", "Files.broken": "stop"},
            "rows.jsonl, line 1: no field 'missing'",
        ),
        ({"Data.stream": True}, "bind Data.stream = False"),
        ({"Preferences.loss": "kto"}, "Preferences.loss must be"),
        ({"Preferences.loss": "orpo", "Preferences.reference": "x"}, "is for dpo and ipo; orpo"),
        ({"Preferences.gamma": 0.5}, "Preferences.gamma is for simpo"),
        ({"Preferences.reference": "/nowhere"}, "Preferences.reference: .*/nowhere"),
        ({"Checkpoint.initial": None}, "compares with a reference model: bind Preferences.ref"),
        ({"Run.grpo": "@config.Grpo()", "Grpo.reward": "per"}, "are two objectives"),
        ({"Files.reference": '("prompt", "chosen")'}, "Files.broken = .stop"),
        (
            {"Files.reference": '("prompt", "chosen")', "Files.broken": "stop"},
            "field 'prompt' is 'abc', not a log-prob",
        ),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused_at_the_door(
    fields, message, place, folders, capsys
):
    words = pair_flags(place, folders / "hf", "--dry_run", **fields)
    if "Checkpoint.initial" in fields:
        words.append("--gin_file=configs/models/t5_tiny.gin")
    assert re.search(message, refuse(words, capsys))
