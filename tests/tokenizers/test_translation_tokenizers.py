# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of BART, Marian, M2M100, NLLB, mBART-50 and Pegasus: the ids of transformers."""

import json
import shutil

import pytest
from translation_toys import FOLDERS, LINES, write_translator

from t5x_lite import config
from t5x_lite.checkpoints import text_settings
from t5x_lite.data import built_in
from t5x_lite.tokenizers import huggingface_tokenizer, renumbered, vocabularies


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    built = {}
    for name, build in FOLDERS.items():
        built[name] = tmp_path_factory.mktemp(name)
        build(built[name])
    return built


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_transformers(name, folders):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders[name])
    inputs, targets = text_settings.read_hugging_face(folders[name]).vocabularies
    expected = theirs(LINES)["input_ids"]
    rows = vocabularies.encode_texts(inputs, LINES)
    unlike = [
        (line, row.tolist(), ids)
        for line, row, ids in zip(LINES, rows, expected, strict=True)
        if row.tolist() != ids
    ]
    assert unlike == []
    if name == "marian":
        expected = theirs(text_target=LINES)["input_ids"]
        rows = vocabularies.encode_texts(targets, LINES)
        assert [row.tolist() for row in rows] == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_vocabulary_gives_the_same_ids(name, folders, tmp_path):
    pair = text_settings.read_hugging_face(folders[name]).vocabularies
    vocabularies.save_pair(tmp_path, *pair)
    for saved, vocabulary in zip(vocabularies.load_pair(tmp_path), pair, strict=True):
        for one, other in zip(
            vocabularies.encode_texts(saved, LINES[:50]),
            vocabularies.encode_texts(vocabulary, LINES[:50]),
            strict=True,
        ):
            assert one.tolist() == other.tolist()
            assert saved.decode(one[1:]) == vocabulary.decode(other[1:])


@pytest.mark.parametrize("name", FOLDERS)
def test_an_exported_tokenizer_gives_the_same_ids_in_transformers(name, folders, tmp_path):
    from transformers import AutoTokenizer

    pair = text_settings.read_hugging_face(folders[name]).vocabularies
    (tmp_path / "config.json").write_text((folders[name] / "config.json").read_text())
    huggingface_tokenizer.write_tokenizers(*pair, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    again = text_settings.read_hugging_face(tmp_path).vocabularies
    rows = [each.tolist() for each in vocabularies.encode_texts(pair[0], LINES)]
    assert theirs(LINES)["input_ids"] == rows
    for saved, vocabulary in zip(again, pair, strict=True):
        both = (vocabularies.encode_texts(each, LINES[:200]) for each in (saved, vocabulary))
        assert all(one.tolist() == other.tolist() for one, other in zip(*both, strict=True))


def test_a_language_may_stand_before_a_text_of_marian(folders):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders["marian"])
    vocabulary, _ = huggingface_tokenizer.read_tokenizer(folders["marian"])
    text = ">>fra<< the quick fox"
    assert vocabularies.encode_with_ends(vocabulary, text) == theirs(text)["input_ids"]
    token = renumbered.language_token(vocabulary.special, "fra")
    assert vocabularies.encode_with_ends(vocabulary, text)[0] == token
    with pytest.raises(ValueError, match="xyz is no language .*>>fra<<"):
        renumbered.language_token(vocabulary.special, "xyz")


def open_task(folder, path, **languages):
    """A task of two rows with the vocabulary of a folder.

    Args:
      folder: the checkpoint.
      path: folder for the rows.
      languages: fields of config.Vocabulary.
    """
    (path / "rows.tsv").write_text("in\tout\nthe fox\tder Zürich\nnumbers\tlazy\n")
    vocabulary = config.Vocabulary("checkpoint", path=str(folder), **languages)
    files = config.Files("t", str(path / "rows.tsv"), vocabulary, inputs="in", targets="out")
    return built_in.from_files(files, str(path))


@pytest.mark.parametrize(
    "name, source, target",
    [
        ("m2m100", "de", "ro"),
        ("m2m100", None, "ro"),
        ("mbart50", "en_XX", "de_DE"),
        ("nllb", "eng_Latn", "deu_Latn"),
    ],
)
def test_training_reads_and_predicts_the_ids_of_languages(name, source, target, folders, tmp_path):
    from transformers import AutoTokenizer

    options = {} if source is None else {"src_lang": source}
    theirs = AutoTokenizer.from_pretrained(folders[name], tgt_lang=target, **options)
    task = open_task(folders[name], tmp_path, source_language=source, target_language=target)
    (chunk,) = task.read("train")
    rows = [(row.inputs, row.targets) for row in chunk.rows]
    expected = theirs([text for text, _ in rows], text_target=[text for _, text in rows])
    assert [ids.tolist() for ids in chunk.inputs] == expected["input_ids"]
    assert [ids.tolist() for ids in chunk.targets] == expected["labels"]
    vocabularies.save_pair(tmp_path / "saved", *task.vocabularies)
    saved = vocabularies.load_pair(tmp_path / "saved")
    assert [each.bos for each in saved] == [each.bos for each in task.vocabularies]
    texts = [saved[1].decode(ids) for ids in chunk.targets]
    assert texts == [task.vocabularies[1].decode(ids[1:]) for ids in chunk.targets]


def test_marian_trains_on_inputs_after_the_language_to_write(folders, tmp_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders["marian"])
    (chunk,) = open_task(folders["marian"], tmp_path, target_language="fra").read("train")
    expected = theirs([f">>fra<< {row.inputs}" for row in chunk.rows])["input_ids"]
    assert [ids.tolist() for ids in chunk.inputs] == expected
    expected = theirs(text_target=[row.targets for row in chunk.rows])["input_ids"]
    assert [ids.tolist() for ids in chunk.targets] == expected


@pytest.mark.parametrize(
    "name, languages, message",
    [
        ("m2m100", {"target_language": "xx"}, "xx is no language of the tokenizer"),
        ("bart", {"source_language": "en"}, "en is no language of the tokenizer"),
        ("marian", {"source_language": "en", "target_language": "fra"}, "nothing of the source"),
    ],
)
def test_a_language_that_a_tokenizer_lacks_is_refused(name, languages, message, folders, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_task(folders[name], tmp_path, **languages)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("mbart50", {"tokenizer_class": "MBartTokenizer"}, "mBART-25 .* Take an mBART-50"),
        ("mbart50", {"tokenizer_class": None}, "mBART-25"),
        ("nllb", {"legacy_behaviour": True}, "legacy_behaviour .*: set it to false in"),
        ("marian", {"separate_vocabs": True}, r"\(separate_vocabs\) is not read; take one"),
    ],
)
def test_tokenizers_that_are_not_read_are_refused_with_the_remedy(
    name, settings, message, folders, tmp_path
):
    shutil.copytree(folders[name], tmp_path / name)
    path = tmp_path / name / "tokenizer_config.json"
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        text_settings.read_hugging_face(tmp_path / name)


@pytest.mark.parametrize("language", [None, "deu_Latn"])
def test_an_older_nllb_file_is_read_as_transformers_reads_it(language, folders, tmp_path):
    """Files of before transformers 4.28 have the language after the text."""
    from transformers import AutoTokenizer

    shutil.copytree(folders["nllb"], tmp_path / "nllb")
    path = tmp_path / "nllb/tokenizer.json"
    content = json.loads(path.read_text())
    single = content["post_processor"]["single"]
    content["post_processor"]["single"] = [*single[1:], single[0]]
    path.write_text(json.dumps(content))
    path = tmp_path / "nllb/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"src_lang": language}))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "nllb")
    inputs, _ = text_settings.read_hugging_face(tmp_path / "nllb").vocabularies
    rows = [ids.tolist() for ids in vocabularies.encode_texts(inputs, LINES[:50])]
    assert rows == theirs(LINES[:50])["input_ids"]


def test_languages_are_a_checkpoints():
    with pytest.raises(ValueError, match='bind Vocabulary.kind = "checkpoint"'):
        config.Vocabulary("bytes", target_language="de")


@pytest.fixture(scope="module")
def translators(folders):
    """Tiny models in the folders of these tokenizers."""
    return {name: write_translator(name, folders[name]) for name in ("m2m100", "mbart50", "bart")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, source, target, token",
    [("m2m100", "de", "ro", "__ro__"), ("mbart50", "en_XX", "de_DE", "de_DE")],
)
def test_a_translation_writes_what_transformers_writes(
    name, source, target, token, translators, folders
):
    import torch
    from transformers import AutoTokenizer

    from t5x_lite import interactive

    theirs = AutoTokenizer.from_pretrained(folders[name], src_lang=source)
    session = interactive.load(folders[name])
    session.set_languages(source, target)
    for line in LINES[:3]:
        ids = torch.tensor([theirs(line)["input_ids"]])
        first = theirs.convert_tokens_to_ids(token)
        options = dict(max_new_tokens=8, num_beams=1, do_sample=False, forced_bos_token_id=first)
        expected = translators[name].generate(ids, **options)[0].tolist()[1:]
        written = session.predict(line, max_new_tokens=8).tokens[0]
        assert list(map(int, written))[: len(expected)] == expected
        assert expected[0] == first
    session = interactive.load(folders[name])
    options = dict(max_new_tokens=8, return_tensors=True)
    pipe = interactive.pipeline("translation", session, **options)
    named = interactive.pipeline(f"translation_{source}_to_{target}", session, **options)
    same = [{"translation_token_ids": written}]
    before, inputs = pipe(line), session.predictor.inputs
    assert pipe(line, src_lang=source, tgt_lang=target) == same
    # Codes with a region are no part of a task's name.
    assert (named(line) == same) == (name == "m2m100")
    assert pipe(line) == before != same and session.predictor.inputs is inputs
    with pytest.raises(ValueError, match="xx is no language"):
        pipe(line, tgt_lang="xx")


@pytest.mark.slow
def test_the_defaults_of_a_folder_write_what_transformers_writes(translators, folders, tmp_path):
    import torch
    from transformers import AutoTokenizer

    from t5x_lite import interactive

    def write(**settings):
        out = translators["bart"].generate(ids, max_new_tokens=10, do_sample=False, **settings)
        return out[0].tolist()[1:]

    ids = torch.tensor([AutoTokenizer.from_pretrained(folders["bart"])(LINES[0])["input_ids"]])
    free = write(num_beams=1)
    followed = {
        "forced_bos_token_id": 9,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[write(num_beams=1, forced_bos_token_id=9)[3]], [free[1], free[2]]],
    }
    ignored = {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True}
    ignored["forced_eos_token_id"] = 2
    shutil.copytree(folders["bart"], tmp_path / "bart")
    path = tmp_path / "bart/generation_config.json"
    settings = json.loads(path.read_text()) | followed | ignored | {"max_new_tokens": 10}
    path.write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="not followed here") as warned:
        session = interactive.load(tmp_path / "bart")
    assert all(f"{name} = " in str(warned[0].message) for name in ignored)
    expected = write(num_beams=1, **followed)
    assert expected[0] == 9 and expected != free
    assert list(map(int, session.predict(LINES[0]).tokens[0]))[: len(expected)] == expected
