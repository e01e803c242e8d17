# SPDX-License-Identifier: Apache-2.0
"""Laws of infer, eval and interactive: order, resumption, reports of mistakes, no TensorFlow."""

import errno
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from t5x_lite import config, interactive, model, sharding
from t5x_lite import eval as eval_command
from t5x_lite import infer as infer_command
from t5x_lite.checkpoints import manager, weights
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.cli import records
from t5x_lite.config import gin_file
from t5x_lite.data import built_in, save_pair
from t5x_lite.evaluation import evaluate, predict
from t5x_lite.tokenizers import vocabularies

WORDS = ["cat", "photograph", "a", "hats", "onomatopoeia", "zebra", "it", "window", "ox"]
STACK = config.Stack(layers=1, embed=16, heads=2, head_dim=8, mlp=32)


def run_in(folder, **changes):
    fields = dict(
        model_dir=str(folder),
        model=config.Model(vocab=128, encoder=STACK, decoder=STACK, dtype="float32"),
        data=config.Data(
            task="cmudict_g2p",
            lengths={"inputs": 32, "targets": 32},
            cache_dir=str(folder / "cache"),
        ),
        train=config.Train(steps=1, batch_size=8),
        schedule=config.Schedule(kind="constant", peak=0.001),
        decode=config.Decode(max_new_tokens=8),
    )
    return config.Run(**(fields | changes))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run folder as training leaves it; random weights stand in for its checkpoint of step 7."""
    run = run_in(tmp_path)
    (tmp_path / "config.gin").write_text(gin_file.to_text(run))
    save_pair(tmp_path / "vocabulary", *built_in.BUILT_IN["cmudict_g2p"].vocabularies())
    draw = np.random.default_rng(0)

    def make(shape):
        return (0.5 * draw.normal(size=shape.shape)).astype(np.float32)

    sharding.use_mesh(config.Mesh())
    params = jax.tree.map(make, model.shapes(run.model))
    (tmp_path / manager.FOLDER / "7").mkdir(parents=True)
    monkeypatch.setattr(manager, "load_params", lambda *_, **__: (params, 7))
    return tmp_path


def infer(folder, *options):
    infer_command.main([f"--checkpoint={folder}", *map(str, options)])


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_words(folder, words=WORDS):
    path = folder / "words.txt"
    path.write_text("".join(f"{word}\n" for word in words))
    return path


def test_every_line_gets_its_own_prediction_in_order(folder):
    out = folder / "new" / "out.jsonl"
    infer(folder, f"--input={write_words(folder)}", f"--output={out}", "--batch_size=4")
    results = rows(out)
    assert [row["input"] for row in results] == WORDS
    session = interactive.load(folder)
    for row in results[:3]:
        assert session.generate(row["input"]) == row["prediction"]


def test_an_interrupted_output_is_continued_to_the_same_content(folder):
    source, out = write_words(folder), folder / "out.jsonl"
    options = [f"--input={source}", f"--output={out}", "--temperature=1", "--seed=5"]
    infer(folder, *options)
    whole, content = rows(out), out.read_text()
    out.write_text(content[: content.index("\n", 200) + 9])
    infer(folder, *options)
    for before, after in zip(whole, rows(out), strict=True):
        assert after["prediction"] == before["prediction"]
        assert after["score"] == pytest.approx(before["score"], abs=1e-3)


def test_an_output_made_otherwise_is_refused_and_left_alone(folder, capsys):
    source, out = write_words(folder), folder / "out.jsonl"
    infer(folder, f"--input={source}", f"--output={out}")
    before = out.read_text()
    with pytest.raises(SystemExit):
        infer(folder, f"--input={source}", f"--output={out}", "--max_new_tokens=3")
    assert "decode.max_new_tokens 8, now it is 3" in capsys.readouterr().err
    write_words(folder, WORDS[:2])
    with pytest.raises(SystemExit):
        infer(folder, f"--input={source}", f"--output={out}")
    assert "input_digest" in capsys.readouterr().err
    assert out.read_text() == before
    infer(folder, f"--input={source}", f"--output={out}", "--overwrite")
    assert len(rows(out)) == 2


def test_an_output_of_unknown_origin_is_refused(folder, capsys):
    source, out = write_words(folder), folder / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(SystemExit):
        infer(folder, f"--input={source}", f"--output={out}")
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine\n"


def test_an_output_that_a_full_disk_left_empty_is_begun_again(folder, monkeypatch):
    source, out = write_words(folder), folder / "out.jsonl"
    settings = folder / "out.jsonl.settings.json"

    def fail(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as full:
        full.setattr(records, "write_atomically", fail)
        with pytest.raises(SystemExit) as end:
            infer(folder, f"--input={source}", f"--output={out}")
    assert end.value.code == 1 and not settings.exists()
    infer(folder, f"--input={source}", f"--output={out}")
    assert [row["input"] for row in rows(out)] == WORDS and json.loads(settings.read_text())


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_settings_that_are_empty_or_broken_are_none(folder, capsys, content):
    """Beside lines they are refused with the remedy; beside no line there is nothing to lose."""
    source, out = write_words(folder, WORDS[:2]), folder / "out.jsonl"
    settings = folder / "out.jsonl.settings.json"
    settings.write_text(content)
    out.write_text("mine\n")
    with pytest.raises(SystemExit) as end:
        infer(folder, f"--input={source}", f"--output={out}")
    assert end.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine\n"
    out.write_text("")
    infer(folder, f"--input={source}", f"--output={out}")
    assert len(rows(out)) == 2 and json.loads(settings.read_text())["decode.max_new_tokens"] == 8


def test_lines_that_cannot_be_read_are_numbered_and_keep_their_place(folder, capsys):
    source, out = folder / "words.txt", folder / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbfcat\r\n\nb\xffd\n  \nhats")
    infer(folder, f"--input={source}", f"--output={out}")
    results = rows(out)
    assert [row.get("input") for row in results] == ["cat", None, None, None, "hats"]
    assert [row.get("line") for row in results] == [None, 2, 3, 4, None]
    output = capsys.readouterr().err
    assert "line 3: not UTF-8 (byte 2 is 0xff)" in output
    assert "3 of these lines could not be read" in output
    with pytest.raises(SystemExit):
        infer(folder, f"--input={source}", "--output=-", "--broken=stop")
    assert "line 2: empty" in capsys.readouterr().err


def test_jsonl_keeps_its_fields_and_names_what_is_missing(folder, capsys):
    source, out = folder / "words.jsonl", folder / "out.jsonl"
    lines = ['{"word": "cat", "id": 3, "note": "\\ud83d"}', "{broken", '{"name": "x"}']
    lines += ['{"word": 5}', "[]", '{"word": "smile \\ud83d"}', '{"word": "a", "word": "b"}']
    source.write_text("\n".join(lines))
    infer(folder, f"--input={source}", "--field=word", f"--output={out}")
    results = rows(out)
    assert results[0]["word"] == "cat" and results[0]["id"] == 3 and "prediction" in results[0]
    assert results[0]["note"] == "\ud83d"
    reasons = ("not JSON", "it has name", "no text in field 'word'", "a JSON array")
    reasons += ("character 7 is half of a surrogate pair", "field 'word' is there twice")
    for row, reason in zip(results[1:], reasons, strict=True):
        assert reason in row["error"]


def test_a_line_with_ids_outside_of_the_vocabulary_is_one_bad_line(folder, capsys):
    numbers = vocabularies.IntegerVocabulary(50)
    save_pair(folder / "vocabulary", numbers, numbers)
    source, out = folder / "ids.txt", folder / "out.jsonl"
    source.write_text("3 4\n5 99\nhello\n7 2147483648\n6\n")
    infer(folder, f"--input={source}", f"--output={out}")
    assert ["error" in row for row in rows(out)] == [False, True, True, True, False]
    assert "line 4: '2147483648' is no id" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        infer(folder, f"--input={source}", "--output=-", "--broken=stop")
    assert "line 2: '99' is no id of this vocabulary" in capsys.readouterr().err


def test_a_line_with_ids_that_the_model_lacks_is_one_bad_line(folder):
    predictor = interactive.load(folder).predictor
    predictor.inputs = vocabularies.ByteVocabulary()
    assert predictor.describe_trouble("cat") == ""
    assert "has ids outside of the model's vocabulary 0..127" in predictor.describe_trouble("é")
    predictor.inputs = vocabularies.SymbolVocabulary(["AA"], separator=" ", ends=False)
    assert predictor.describe_trouble(" ").startswith("is empty, and the tokenizer adds no token")


def test_given_targets_are_scored(folder):
    source, out = folder / "pairs.jsonl", folder / "out.jsonl"
    pairs = [{"input": "cat", "said": "K AE T"}, {"input": "ox"}, {"input": "a", "said": "\ud83d"}]
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    infer(folder, f"--input={source}", "--targets=said", f"--output={out}")
    results = rows(out)
    expected = interactive.load(folder).score("cat", "K AE T")
    assert results[0]["log_probability"] == pytest.approx(expected, abs=1e-4)
    assert results[1]["error"] == "no text in field 'said'"
    assert "half of a surrogate pair" in results[2]["error"]


def test_a_pipe_gives_plain_text(folder, monkeypatch, capsysbinary):
    stream = SimpleNamespace(buffer=io.BytesIO(b"cat\n\nhats\n"), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stream)
    infer(folder, "--text")
    lines = capsysbinary.readouterr().out.decode().split("\n")
    session = interactive.load(folder)
    assert lines == [session.generate("cat"), "", session.generate("hats"), ""]


def test_half_written_lines_are_cut_off(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"one\ntwo\nthr")
    assert records.complete_lines(path) == 2
    assert path.read_bytes() == b"one\ntwo\n"


def test_eval_measures_and_keeps_every_prediction(folder, capsys):
    path = folder / "numbers.json"
    options = ["--examples=20", "--batches=2", "--beams=2", f"--json={path}", "--lengths=5,8"]
    eval_command.main([f"--checkpoint={folder}", "--split=test", *options])
    output, report = capsys.readouterr().out, json.loads(path.read_text())
    numbers = report["metrics"]
    assert sum(row["tokens"] for row in report["by_length"]) == numbers["target_tokens"]
    assert {"loss", "perplexity", "bits_per_byte", "per", "wer", "examples"} <= numbers.keys()
    assert numbers["perplexity"] == pytest.approx(np.exp(numbers["loss"]))
    kept = rows(folder / "predictions" / "test-7.jsonl")
    assert len(kept) == numbers["examples"] == 20 and "predictions/test-7.jsonl" in output
    assert set(kept[0]) == {"input", "prediction", "references", "score"}


def test_predictions_of_another_content_are_kept_beside_the_old_ones(tmp_path):
    path = tmp_path / "predictions" / "test-1.jsonl"
    assert evaluate.write_anew(path, [{"a": 1}]) == path
    assert evaluate.write_anew(path, [{"a": 1}]) == path
    assert evaluate.write_anew(path, [{"a": 2}]) == path.with_name("test-1-2.jsonl")
    assert rows(path) == [{"a": 1}]


def test_mistakes_are_told_with_what_would_be_right(folder, capsys):
    cases = [
        (eval_command, ["--metrics=wre"], "did you mean wer"),
        (eval_command, ["--split=tset"], "tset"),
        (infer_command, ["--beems=2"], "did you mean --beams"),
        (infer_command, ["--beams=2", "--temperature=1"], "cannot also sample"),
        (infer_command, ["--input=missing.txt"], "missing.txt"),
        (infer_command, ["--targets=x"], "JSONL"),
        (infer_command, ["--mesh=1,2"], "three numbers"),
    ]
    for command, options, expected in cases:
        with pytest.raises(SystemExit) as stopped:
            command.main([f"--checkpoint={folder}", *options])
        assert stopped.value.code == 2
        assert expected in capsys.readouterr().err
    with pytest.raises(SystemExit):
        infer_command.main([f"--checkpoint={folder}/nowhere"])
    assert f"There is no {folder}/nowhere. Train a run first" in capsys.readouterr().err


def test_weights_of_another_model_are_refused(folder):
    other = config.Model(vocab=128, encoder=STACK, decoder=STACK, tied=True)
    params, _ = manager.load_params(folder)
    with pytest.raises(ValueError, match="head: checkpoint"):
        weights.place_arrays(model.shapes(other), params, folder)


def test_sessions_generate_and_score_one_text_or_many(folder):
    session = interactive.load(folder)
    assert session.step == 7
    one = session.generate("cat", max_new_tokens=5)
    many = session.generate(WORDS, max_new_tokens=5)
    assert isinstance(one, str) and many[0] == one and len(many) == len(WORDS)
    best = session.generate(["cat", "ox"], beams=3, n_best=2, max_new_tokens=5)
    assert [len(texts) for texts in best] == [2, 2]
    prediction = session.predict("cat", max_new_tokens=5, beams=3, n_best=2)
    assert prediction.scores == sorted(prediction.scores, reverse=True)
    scores = session.score(["cat", "ox"], ["K AE T", "AA K S"])
    assert scores[0] == pytest.approx(session.score("cat", "K AE T"), abs=1e-4)
    with pytest.raises(ValueError, match="Unknown option beems: did you mean beams"):
        session.generate("cat", beems=2)
    with pytest.raises(ValueError, match="two texts"):
        session.score("cat", ["K"])


def test_predictions_do_not_depend_on_how_they_are_batched(folder):
    session = interactive.load(folder)
    decode = config.Decode(max_new_tokens=6, temperature=1.0, seed=2)
    whole = session.predictor.predict(WORDS, decode)
    session.predictor.batch_size = 3
    assert [each.texts for each in session.predictor.predict(WORDS, decode)] == [
        each.texts for each in whole
    ]


def test_text_to_be_continued_has_no_end(tmp_path):
    lone = config.Model(vocab=384, decoder=STACK)
    running = config.Data(task="python_stdlib", lengths={"targets": 32})
    assert not predict.has_inputs(run_in(tmp_path, model=lone, data=running))
    assert predict.has_inputs(run_in(tmp_path, model=lone))
    assert predict.has_inputs(run_in(tmp_path))


def test_a_vocabulary_of_another_run_is_refused(folder):
    save_pair(folder / "vocabulary", vocabularies.ByteVocabulary(), vocabularies.ByteVocabulary())
    with pytest.raises(ValueError, match="259 ids, more than the 128"):
        open_checkpoint(folder).load()


def test_data_in_another_vocabulary_are_not_measured(folder, capsys, monkeypatch):
    # As a seqio task does, which keeps its own vocabulary.
    monkeypatch.setattr(eval_command, "with_data", lambda run, *_: run)
    inputs, targets = built_in.BUILT_IN["cmudict_g2p"].vocabularies()
    swapped = vocabularies.SymbolVocabulary(targets.symbols[::-1], separator=" ")
    save_pair(folder / "vocabulary", inputs, swapped)
    with pytest.raises(SystemExit) as stopped:
        eval_command.main([f"--checkpoint={folder}", "--examples=0", "--batches=1"])
    assert stopped.value.code == 2
    assert "has another vocabulary than cmudict_g2p: id" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "infer"])
def test_help_is_quick_and_shows_examples(command):
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"t5x_lite.{command}", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "examples:" in answer.stdout
    assert f"python -m t5x_lite.{command} --checkpoint=" in answer.stdout
    assert not any(f" {heavy}\n" in answer.stderr for heavy in ("jax", "flax", "transformers"))


def test_sessions_import_no_tensorflow_and_the_module_itself_nothing_heavy():
    script = (
        "import sys, t5x_lite.interactive\n"
        "assert not {'jax', 'flax', 'numpy', 'tensorflow'} & set(sys.modules)\n"
        "from t5x_lite.evaluation import predict, evaluate\n"
        "from t5x_lite.checkpoints import opening\n"
        "assert 'jax' in sys.modules\n"
        "assert not {'tensorflow', 'seqio'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("jsonl", [False, True])
def test_a_line_without_end_is_one_broken_record_and_never_in_memory(tmp_path, monkeypatch, jsonl):
    monkeypatch.setattr(records, "MOST_BYTES", 64)
    good = b'{"input": "cat"}\n'
    sizes = (63, 64, 65, 128, 129, 130, 10_000)
    content = good + b"".join(size * b"x" + b"\n" + good for size in sizes) + 300 * b"y"
    (tmp_path / "in").write_bytes(content)
    source = records.Source(str(tmp_path / "in"), jsonl, "input")
    listed = list(source.records())
    assert len(listed) == source.count() == 2 + 2 * len(sizes)
    assert all(record.trouble is None for record in listed[0:-1:2])
    long = [record.trouble for record in listed[1::2]]
    assert ["longer than 64 bytes" in (trouble or "") for trouble in long] == [False, *7 * [True]]


def test_an_input_without_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        records.Source(str(tmp_path / "pipe"), False, "input").count()


@pytest.mark.parametrize("name", ["inputs", "targets"])
def test_an_empty_text_is_legal_where_the_tokenizer_ends_it(name):
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    cfg = config.Model(vocab=64, encoder=STACK, decoder=STACK, dtype="float32")
    params = model.initialize(cfg, jax.random.key(0))
    letters = vocabularies.SymbolVocabulary("abc")
    texts = {"inputs": ["ab", "a"], "targets": ["ab", "a"]} | {name: ["ab", ""]}
    assert len(predict.Predictor(cfg, params, (letters, letters)).score(**texts)) == 2
    bare = predict.Predictor(cfg, params, (letters, letters), ended=False)
    bare.targets.ends = False
    word = "Input" if name == "inputs" else "Target"
    with pytest.raises(ValueError, match=f"{word} 1 is empty, and the tokenizer adds no token"):
        bare.score(**texts)
