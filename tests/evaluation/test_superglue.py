# SPDX-License-Identifier: Apache-2.0
"""Laws of choice by likelihood, and of SuperGLUE's tasks from files as they are downloaded."""

import json
from pathlib import Path

import numpy as np
import pytest

from t5x_lite import config, data, interactive
from t5x_lite import eval as evaluation
from t5x_lite.data.superglue import TASKS, list_questions
from t5x_lite.evaluation import multiple_choice, superglue

# One record of each task in the form of its file.
RECORDS = {
    "boolq": {"question": "is it so", "passage": "It is so.", "idx": 0, "label": True},
    "cb": {"premise": "It rains.", "hypothesis": "it is wet", "label": "entailment", "idx": 0},
    "copa": {
        "premise": "My body cast a shadow over the grass.",
        "choice1": "The sun was rising.",
        "choice2": "The grass was cut.",
        "question": "cause",
        "label": 0,
        "idx": 0,
    },
    "multirc": {
        "idx": 0,
        "version": 1.1,
        "passage": {
            "text": "A cat sat. A dog ran.",
            "questions": [
                {
                    "question": "Who sat?",
                    "idx": 0,
                    "answers": [
                        {"text": "A cat", "idx": 0, "label": 1},
                        {"text": "A dog", "idx": 1, "label": 0},
                    ],
                },
                {
                    "question": "Who ran?",
                    "idx": 1,
                    "answers": [{"text": "A dog", "idx": 2, "label": 1}],
                },
            ],
        },
    },
    "record": {
        "source": "Daily mail",
        "passage": {
            "text": "Tucker met Tom Smith.\n@highlight\nTucker {won}\n@highlight\nTom lost",
            "entities": [
                {"start": 0, "end": 5},
                {"start": 11, "end": 19},
                {"start": 33, "end": 38},
            ],
        },
        "qas": [
            {
                "query": "A prize went to @placeholder, he said",
                "answers": [{"start": 0, "end": 5, "text": "Tucker"}],
                "idx": 0,
            }
        ],
        "idx": 0,
    },
    "rte": {"premise": "It rains.", "hypothesis": "It is dry.", "label": "not_entailment"},
    "wic": {
        "word": "place",
        "sentence1": "Do you want to come over to my place later?",
        "sentence2": "A political system with no place for the less prominent groups.",
        "idx": 0,
        "label": False,
        "version": 1.1,
    },
    "wsc": {
        "text": "Mark told Pete many lies about himself, which he put in his book.",
        "target": {"span2_index": 8, "span1_index": 0, "span1_text": "Mark", "span2_text": "he"},
        "idx": 0,
        "label": True,
    },
}
T5_PROMPTS = {
    "boolq": "boolq passage: It is so. question: is it so",
    "cb": "cb hypothesis: it is wet premise: It rains.",
    "copa": "copa choice1: The sun was rising. choice2: The grass was cut. premise: My body cast a "
    "shadow over the grass. question: cause",
    "multirc": "multirc question: Who sat? answer: A cat paragraph: A cat sat. A dog ran.",
    "record": "record query: A prize went to @placeholder, he said entities: Tucker, Tom Smith "
    "passage: Tucker met Tom Smith. Tucker {won}. Tom lost",
    "rte": "rte hypothesis: It is dry. premise: It rains.",
}


@pytest.mark.parametrize("name", T5_PROMPTS)
def test_prompts_are_those_of_t5(name):
    question = next(list_questions(name, RECORDS[name]))
    assert question.input == T5_PROMPTS[name]


def test_plain_prompts_go_on_as_sentences():
    (copa,) = list_questions("copa", RECORDS["copa"], "plain")
    assert copa.input + copa.choices[0] == (
        "My body cast a shadow over the grass because the sun was rising."
    )
    (record,) = list_questions("record", RECORDS["record"], "plain")
    assert record.input.endswith("Tom lost\nA prize went to")
    assert record.choices == (" Tucker, he said", " Tom Smith, he said")
    assert (record.answers, record.entities) == ((0,), ("Tucker", "Tom Smith"))
    (wsc,) = list_questions("wsc", RECORDS["wsc"], "plain")
    assert "which *he* put in his book" in wsc.input and 'refer to "Mark"' in wsc.input


@pytest.mark.parametrize("style", ["t5", "plain"])
@pytest.mark.parametrize("name", TASKS)
def test_the_label_of_a_record_is_the_number_of_its_choice(name, style):
    for question in list_questions(name, RECORDS[name], style):
        assert len(question.answers) == 1 and question.answers[0] < len(question.choices)
    unlabeled = {k: v for k, v in RECORDS[name].items() if k != "label"}
    if name not in ("multirc", "record"):
        assert [each.answers for each in list_questions(name, unlabeled, style)] == [()]
    with pytest.raises(ValueError, match=f"no record of SuperGLUE's {TASKS[name].folder}"):
        list(list_questions(name, {"idx": 0}, style))


def test_metrics_are_those_of_scikit_learn_and_of_the_official_script():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    labels, chosen = draw.integers(0, 3, 50), draw.integers(0, 3, 50)
    base = next(list_questions("cb", RECORDS["cb"]))
    questions = [base._replace(answers=(int(label),)) for label in labels]
    expected = 100 * metrics.f1_score(labels, chosen, average="macro")
    assert superglue.mean_f1(questions, chosen.tolist()) == pytest.approx(expected, rel=1e-12)
    binary, picked = labels % 2, (chosen % 2).tolist()
    questions = [
        base._replace(answers=(int(label),), group=number // 5)
        for number, label in enumerate(binary)
    ]
    expected = 100 * metrics.f1_score(binary, picked)
    assert superglue.answer_f1(questions, picked) == pytest.approx(expected, rel=1e-12)
    groups = (binary == picked).reshape(-1, 5).all(axis=1)
    assert superglue.group_match(questions, picked) == 100 * groups.mean()


@pytest.mark.parametrize(
    "one, other, f1",
    [
        ("The United States", "united states!", 1.0),
        ("Tom Smith", "Smith", 2 / 3),
        ("Tom", "Smith", 0.0),
        ("the", "a", 1.0),
    ],
)
def test_answers_are_compared_as_squad_does(one, other, f1):
    assert superglue.token_f1(one, other) == pytest.approx(f1)


@pytest.mark.parametrize("name", TASKS)
def test_a_run_trains_on_prompts_and_answers(tmp_path, name):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(RECORDS[name]) + "\n")
    vocabulary = config.Vocabulary("bytes")
    files = config.Files(name=name, train=str(path), vocabulary=vocabulary, superglue=name)
    lengths = {"inputs": 400, "targets": 20}
    dataset = data.open_dataset(config.Data(files, lengths, cache_dir=str(tmp_path)), "train")
    questions = list(list_questions(name, RECORDS[name]))
    assert len(dataset) == len(questions)
    for number, question in enumerate(questions):
        assert dataset.inputs_text(number) == question.input
        assert dataset.references(number) == list(question.answer_texts)


def test_files_of_superglue_have_no_templates_and_name_broken_lines(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"passage": "a"}\n')
    shared = dict(name="mine", train=str(path), vocabulary=config.Vocabulary("bytes"))
    with pytest.raises(ValueError, match="Files.superglue makes inputs and targets itself"):
        config.Files(**shared, superglue="boolq", inputs="passage")
    files = config.Files(**shared, superglue="boolq")
    cfg = config.Data(files, {"inputs": 40, "targets": 20}, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="it is no record of SuperGLUE's BoolQ: KeyError"):
        len(data.open_dataset(cfg, "train"))


@pytest.fixture(scope="module")
def session():
    return interactive.load("g2p")


@pytest.mark.slow
def test_choices_are_compared_by_their_log_probability_in_each_way(session):
    inputs, choices = ["cat", "dog"], [["K AE T", "D AO G"], ["K AE T", "D AO G", "D"]]
    predictor = session.predictor
    expected = [
        [session.score(text, each) for each in row]
        for text, row in zip(inputs, choices, strict=True)
    ]
    results = {
        kind: multiple_choice.score_choices(predictor, inputs, choices, kind)
        for kind in ("none", "tokens", "characters", "prior")
    }
    assert [each.best for each in results["none"]] == [0, 1]
    assert session.choose(inputs, choices) == results["none"]
    assert session.choose("dog", choices[1], "tokens") == results["tokens"][1]
    for row in range(2):
        raw = results["none"][row]
        np.testing.assert_allclose(raw.scores, expected[row], rtol=1e-5)
        sizes = [len(ids) for ids in predictor.encode_targets(choices[row])]
        np.testing.assert_allclose(
            results["tokens"][row].scores, np.array(raw.scores) / sizes, rtol=1e-5
        )
        sizes = [len(each) for each in choices[row]]
        np.testing.assert_allclose(
            results["characters"][row].scores, np.array(raw.scores) / sizes, rtol=1e-5
        )
        prior = [session.score("", each) for each in choices[row]]
        np.testing.assert_allclose(
            results["prior"][row].scores, np.array(raw.scores) - prior, rtol=1e-4
        )


def test_mistakes_of_choices_are_answered(session):
    predictor = session.predictor
    with pytest.raises(ValueError, match="normalize must be one of none, tokens, "):
        multiple_choice.score_choices(predictor, ["cat"], [["K"]], "words")
    with pytest.raises(ValueError, match="Choices are lists of texts; got 'K AE T'"):
        session.choose(["cat"], ["K AE T"])
    with pytest.raises(ValueError, match="2 inputs but choices for 1 of them"):
        session.choose(["cat", "dog"], [["K AE T"]])
    with pytest.raises(ValueError, match="Input 1 has no choices"):
        multiple_choice.score_choices(predictor, ["cat", "dog"], [["K"], []])


def write_file(folder: Path, labels: tuple) -> Path:
    """Writes BoolQ's validation file with a record for each label; None for no label."""
    (folder / "BoolQ").mkdir()
    lines = [RECORDS["boolq"] | ({} if each is None else {"label": each}) for each in labels]
    if None in labels:
        lines = [{k: v for k, v in line.items() if k != "label"} for line in lines]
    path = folder / "BoolQ" / "val.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_the_command_measures_what_lies_in_a_folder(session, tmp_path, capsys):
    write_file(tmp_path, (True, False, True))
    path = tmp_path / "numbers.json"
    words = ["--checkpoint=g2p", f"--superglue={tmp_path}", "--normalize=tokens"]
    assert evaluation.main([*words, "--prompts=plain", f"--json={path}"]) == 0
    (question,) = list_questions("boolq", RECORDS["boolq"], "plain")
    scores = [
        session.score(question.input, each) / len(session.predictor.encode_targets([each])[0])
        for each in question.choices
    ]
    right = 2 if scores[1] > scores[0] else 1
    numbers = json.loads(path.read_text())["boolq"]
    assert numbers == {"accuracy": pytest.approx(100 * right / 3), "questions": 3}
    assert f"accuracy {numbers['accuracy']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "has no labels"),
        (json.dumps(RECORDS["cb"]), "val.jsonl, line 1: it is no record of SuperGLUE's BoolQ"),
        ("{", "val.jsonl, line 1: "),
        ('{"passage": "a", "question": "b", "label": "maybe"}', "its label 'maybe' is none of"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = write_file(tmp_path, (True,))
    path.write_text(content)
    (file,) = superglue.find_files(tmp_path, "val")
    with pytest.raises(ValueError, match=message):
        superglue.read_questions(file, "t5")
    with pytest.raises(ValueError, match="--superglue: .* has none of BoolQ/test.jsonl"):
        superglue.find_files(tmp_path, "test")


def test_files_without_labels_are_not_measured(tmp_path):
    write_file(tmp_path, (None,))
    (file,) = superglue.find_files(tmp_path, "val")
    with pytest.raises(ValueError, match="has no labels, as the test files have none"):
        superglue.read_questions(file, "t5")
