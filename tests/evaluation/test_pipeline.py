# SPDX-License-Identifier: Apache-2.0
"""Laws of pipelines: the texts that transformers generates, in the shape of its old pipelines."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import mark_exhaustive
from hub_toys import write_folders

from t5x_lite import convert, interactive

WORDS = ["abba", "cab", "d"]
PARAMETERS = {
    "summarization": {"prefix": "ab", "num_beams": 2, "max_length": 9, "min_length": 4},
    "translation_en_to_de": {"prefix": "cc", "max_length": 5, "early_stopping": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A toy T5 of letters, with the settings of tasks that T5's config.json has."""
    path = write_folders(tmp_path_factory.mktemp("folders")) / "hf"
    settings = json.loads((path / "config.json").read_text())
    settings["task_specific_params"] = PARAMETERS
    (path / "config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def session(folder):
    return interactive.load(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    import transformers

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def generate(text: str, **arguments) -> list[list[int]]:
        ids = tokenizer([text], return_tensors="pt").input_ids
        # Its cache has as many layers as the encoder: too few for this decoder.
        rows = model.generate(ids, do_sample=False, use_cache=False, **arguments)
        ends = [model.config.eos_token_id, model.config.pad_token_id]
        return [[i for i in row.tolist()[1:] if i not in ends] for row in rows]

    return generate


ARGUMENTS = [
    ("text2text-generation", dict(max_length=7, min_length=5)),
    ("text2text-generation", dict(max_new_tokens=4, num_beams=3, length_penalty=0.0)),
    ("text2text-generation", dict(max_length=8, num_beams=4)),
    ("text2text-generation", dict(max_length=8, num_beams=4, early_stopping=True)),
    ("text2text-generation", dict(num_beams=3, max_length=9, early_stopping="never")),
    ("text2text-generation", dict(max_length=9, num_beams=3, length_penalty=-1.5)),
    ("text2text-generation", dict(max_length=7, min_new_tokens=5, no_repeat_ngram_size=1)),
    ("summarization", dict(length_penalty=0.0)),
    ("translation_en_to_de", {}),
]


@pytest.mark.parametrize(
    "task, arguments",
    mark_exhaustive(
        ARGUMENTS,
        # Greedy with lengths; beams that end early; repeated words; a task's own settings.
        kept=[ARGUMENTS[number] for number in (0, 3, 6, 8)],
    ),
)
@pytest.mark.slow
def test_the_ids_are_those_of_transformers(session, theirs, task, arguments):
    task_parameters = dict(PARAMETERS.get(task, {}))
    prefix = task_parameters.pop("prefix", "")
    pipe = interactive.pipeline(task, session)
    name = {"summarization": "summary", "text2text-generation": "generated"}.get(
        task, "translation"
    )
    for word in WORDS:
        expected = theirs(prefix + word, **(task_parameters | arguments))
        (result,) = pipe(word, return_tensors=True, **arguments)
        eos = session.predictor.targets.eos
        assert [[i for i in result[f"{name}_token_ids"] if i != eos]] == expected
        (text,) = pipe(word, **arguments)
        assert text.keys() == {f"{name}_text"}


@pytest.mark.slow
def test_results_have_the_shape_of_the_old_pipelines(session):
    pipe = interactive.pipeline("text2text-generation", session, max_length=4)
    one, three = pipe("abba"), pipe(WORDS, batch_size=2)
    assert [each.keys() for each in one] == [{"generated_text"}]
    assert len(three) == 3 and three[0] == one[0]
    several = pipe(WORDS, num_beams=3, num_return_sequences=2)
    assert [len(each) for each in several] == [2, 2, 2]
    assert pipe("abba", num_beams=3, num_return_sequences=2) == several[0]
    assert pipe("abba", return_text=False) == [{}]
    drawn = pipe("abba", do_sample=True, top_p=0.9, seed=3)
    assert drawn == pipe("abba", do_sample=True, top_p=0.9, seed=3)
    assert session.predictor.batch_size != 2


@pytest.mark.slow
def test_a_call_replaces_the_defaults_and_other_names_are_answered(session):
    pipe = interactive.pipeline("summarization", session, max_length=5, min_length=0, num_beams=1)
    length = len(pipe("abba", return_tensors=True)[0]["summary_token_ids"])
    assert length <= 4
    longer = pipe("abba", max_length=9, min_length=8, return_tensors=True)
    assert len(longer[0]["summary_token_ids"]) >= 7
    with pytest.raises(ValueError, match="Unknown option num_beam"):
        pipe("abba", num_beam=2)
    with pytest.raises(ValueError, match="There is no pipeline 'summarisation' here: did you mean"):
        interactive.pipeline("summarisation", "runs/never-opened")
    with pytest.raises(ValueError, match="text"):
        pipe([1, 2])


def test_inputs_are_cut_at_the_length_of_the_tokenizer(session):
    pipe = interactive.pipeline("text2text-generation", session, max_length=3)
    pipe.predictor.inputs.origin["model_max_length"] = 4
    whole = interactive.pipeline("text2text-generation", session, max_length=3)
    assert pipe("abcdefgh", truncation=True) == whole("abc")
    assert pipe.truncate([5, 6, 7, 8, 9, 1]) == [5, 6, 7, 1]
    del pipe.predictor.inputs.origin["model_max_length"]


def test_spaces_before_punctuation_are_cleaned_as_tokenizers_do(session, monkeypatch):
    pipe = interactive.pipeline("text2text-generation", session, max_length=3)
    (prediction,) = pipe.predictor.predict_ids([[3, 1]], pipe.settings({"max_new_tokens": 2}))
    written = prediction._replace(texts=["It 's a text , is n't it ?"])
    monkeypatch.setattr(pipe.predictor, "predict_ids", lambda ids, decode: [written])
    clean = pipe("a", clean_up_tokenization_spaces=True)
    assert clean == [{"generated_text": "It's a text, isn't it?"}]
    assert pipe("a") == [{"generated_text": "It 's a text , is n't it ?"}]


@pytest.mark.slow
def test_a_converted_run_keeps_the_prefixes_of_tasks(folder, session, tmp_path):
    convert.main([f"--from={folder}", f"--to={tmp_path / 'run'}"])
    ours = interactive.pipeline("summarization", str(tmp_path / "run"))
    assert ours.prefix == "ab"
    assert ours(WORDS) == interactive.pipeline("summarization", session)(WORDS)
    shutil.rmtree(tmp_path / "run")


def test_a_decoder_alone_has_no_such_pipeline(tmp_path, folder):
    from t5x_lite import adapt

    adapt.main([f"--source={folder}", "--to=decoder_only", f"--output={tmp_path / 'lone'}"])
    with pytest.raises(ValueError, match="is for an encoder-decoder: session.generate"):
        interactive.pipeline("summarization", tmp_path / "lone")
