# SPDX-License-Identifier: Apache-2.0
"""Laws of opening: a checkpoint of another library does what the run it was exported from does."""

import dataclasses
import json
import re
import shutil

import gguf
import gguf_toys
import jax
import numpy as np
import pytest
from conversion_toys import T5, Drawn, write_ours

from t5x_lite import adapt, config, convert, interactive, model, sharding
from t5x_lite import eval as eval_command
from t5x_lite import infer as infer_command
from t5x_lite.checkpoints.formats.gguf import GgufTensors
from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, open_checkpoint, open_described
from t5x_lite.checkpoints.run_folder import SavedWeights
from t5x_lite.checkpoints.text_settings import read_text_settings
from t5x_lite.checkpoints.weight_paths import flatten_tree
from t5x_lite.config import gin_file
from t5x_lite.tokenizers import gguf_tokenizer, vocabularies
from t5x_lite.training import setup

WORDS = ["abba", "cab", "d"]


@pytest.fixture(scope="module")
def drawn():
    return Drawn(T5)


@pytest.fixture(scope="module")
def makes(tmp_path_factory, drawn):
    """The same T5 as a run folder of ours and as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("makes")
    ours = write_ours(folder / "ours", T5, drawn)
    symbols = vocabularies.SymbolVocabulary([chr(97 + i) for i in range(26)])
    vocabularies.save_pair(ours / "vocabulary", symbols, symbols)
    convert.main([f"--from={ours}", f"--to={folder / 'hf'}", "--format=huggingface"])
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of 48 byte-level tokens with a chat template, as a .gguf file."""
    path = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    write_with_tokenizer(path)
    return path


def write_with_tokenizer(path, **changes):
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in gguf_toys.metadata("llama").items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"llama.{name}", value)
    tokens = ["<end>", "<begin>", "<turn>", *map(chr, range(97, 123)), "Ġ", "Ċ", "ab", "abb"]
    tokens += [f"<unused{k}>" for k in range(gguf_toys.VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges(["a b", "ab b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)
    writer.add_add_bos_token(changes.get("begins", True))
    writer.add_chat_template(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}<turn>"
    )
    for name, array in gguf_toys.converted("llama", gguf_toys.draw("llama")).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_hugging_face_folder_writes_what_the_run_writes(makes):
    ours, theirs = interactive.load(makes / "ours"), interactive.load(makes / "hf")
    assert theirs.generate(WORDS, max_new_tokens=6) == ours.generate(WORDS, max_new_tokens=6)
    # An empty input is the tokenizer's end of the sequence.
    pairs = ["", *WORDS], ["a", "ab", "c", "dd"]
    scores = [session.score(*pairs) for session in (ours, theirs)]
    np.testing.assert_allclose(*scores, rtol=1e-6)
    assert ours.score("", "a") == pytest.approx(scores[0][0], rel=1e-5)


@pytest.mark.slow
def test_infer_takes_a_folder_and_a_file(makes, llama, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("".join(f"{word}\n" for word in WORDS))
    for number, path in enumerate([makes / "hf", llama]):
        out = tmp_path / f"{number}.jsonl"
        infer_command.main([f"--checkpoint={path}", f"--input={words}", f"--output={out}"])
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["input"] for row in rows] == WORDS
        assert interactive.load(path).generate(WORDS[0]) == rows[0]["prediction"]


@pytest.mark.slow
def test_a_file_brings_its_tokenizer_its_ends_and_its_chat_template(llama):
    opened = open_checkpoint(llama)
    inputs, targets = opened.text.vocabularies
    assert inputs.encode("abba ab") == [32, 3, 29, 31]
    assert inputs.decode([32, 3, 29, 31]) == "abba ab"
    assert opened.text.ends == (1, True, (0, 2), None)
    assert (inputs.ends, targets.ends, targets.stops) == (False, True, (0, 2))
    assert (opened.model.decoder_start_token_id, opened.model.add_bos) == (1, True)
    session = interactive.load(llama)
    assert session.prompt("abc") == "<begin>abc<turn>"
    # The template began the text already, so the model is not given its start twice.
    assert session.predictor.encode_inputs([session.prompt("abc")]) == [[31, 5, 2]]
    assert isinstance(session.chat("abc", max_new_tokens=4), str)


def test_a_file_that_does_not_begin_its_texts_leaves_prompts_alone(tmp_path):
    write_with_tokenizer(tmp_path / "toy.gguf", begins=False)
    assert not open_checkpoint(tmp_path / "toy.gguf").model.add_bos
    assert not gguf_tokenizer.begins_with_bos(GgufTensors(tmp_path / "toy.gguf").metadata)


def test_a_converted_file_keeps_weights_ends_and_template(llama, tmp_path):
    convert.main([f"--from={llama}", f"--to={tmp_path / 'run'}"])
    ours, theirs = interactive.load(tmp_path / "run"), interactive.load(llama)
    assert ours.generate(WORDS, max_new_tokens=8) == theirs.generate(WORDS, max_new_tokens=8)
    assert ours.predictor.targets.stops == (0, 2)
    assert ours.template.template == theirs.template.template


def test_eval_measures_a_checkpoint_of_another_library_on_data_that_are_named(
    makes, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = [{"inputs": word, "targets": word[::-1]} for word in WORDS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from t5x_lite import config\n"
        "config.Data.task = @config.Files()\n"
        'config.Data.lengths = {"inputs": 16, "targets": 16}\n'
        f'config.Data.cache_dir = "{tmp_path / "cache"}"\n'
        'config.Files.name = "words"\n'
        'config.Files.train = "pairs.jsonl"\n'
        'config.Files.inputs = "inputs"\n'
        "config.Files.vocabulary = @config.Vocabulary()\n"
        'config.Vocabulary.kind = "bytes"\n'
    )
    report = tmp_path / "report.json"
    eval_command.main(
        [
            f"--checkpoint={makes / 'hf'}",
            "--gin_file=data.gin",
            "--gin.config.Files.validation=pairs.jsonl",
            "--max_new_tokens=4",
            f"--json={report}",
        ]
    )
    numbers = json.loads(report.read_text())["metrics"]
    assert numbers["examples"] == 3 and np.isfinite(numbers["loss"])
    assert (tmp_path / "runs/eval_hf/predictions/validation-0.jsonl").exists()
    with pytest.raises(SystemExit):
        eval_command.main([f"--checkpoint={makes / 'hf'}"])
    assert "has no data of its own: name some with --gin_file" in capsys.readouterr().err


def test_a_run_begins_with_the_weights_of_another_library(makes, llama, drawn):
    sharding.use_mesh(config.Mesh())
    shapes = model.shapes(T5)
    begun = flatten_tree(setup.initial_weights(str(makes / "hf"), T5, shapes), "/")
    for name, array in drawn.arrays.items():
        np.testing.assert_array_equal(begun[name], array)
    with pytest.raises(setup.CheckpointError, match=r"Checkpoint.initial: .*toy.gguf does not fit"):
        setup.initial_weights(str(llama), T5, shapes)


def test_a_checkpoint_with_too_few_ids_names_the_command_that_adds_them(makes):
    sharding.use_mesh(config.Mesh())
    wider = dataclasses.replace(T5, vocab=T5.vocab + 8)
    with pytest.raises(setup.CheckpointError) as caught:
        setup.initial_weights(str(makes / "hf"), wider, model.shapes(wider))
    text = str(caught.value)
    assert "t5x_lite.adapt" in text and "t5x_lite.convert --from=" in text
    options = {adapt: ("--names", "--sentinels"), convert: ("--dry_run", "--allow")}
    for command, names in options.items():
        assert all(name in text and name in command.parser().format_help() for name in names)


def test_a_run_begins_with_the_weights_of_t5x(makes, drawn, tmp_path):
    convert.main([f"--from={makes / 'ours'}", f"--to={tmp_path / 'checkpoint_5'}", "--format=t5x"])
    sharding.use_mesh(config.Mesh())
    begun = setup.initial_weights(str(tmp_path / "checkpoint_5"), T5, model.shapes(T5))
    for name, array in flatten_tree(begun, "/").items():
        np.testing.assert_array_equal(array, drawn.arrays[name])


@pytest.mark.parametrize("text", [False, True])
def test_a_field_that_needs_a_model_is_named_with_the_remedy(makes, tmp_path, text):
    folder = tmp_path / "checkpoint_5"
    convert.main([f"--from={makes / 'ours'}", f"--to={folder}", "--format=t5x"])
    with pytest.raises(ValueError, match="^Some.field: .*_5 does not say .*: include it"):
        open_described("Some.field", str(folder), "include it", text)
    with pytest.raises(ValueError, match="^Some.field: .*nothing"):
        open_described("Some.field", str(tmp_path / "nothing"), "include it", text)
    # Without its tokenizer, too.
    bare = shutil.copytree(makes / "hf", tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    assert open_described("Some.field", str(bare), "", text).model.encoder == T5.encoder


def test_a_vocabulary_of_the_config_may_be_that_of_a_checkpoint(makes, llama):
    from t5x_lite.data import open_vocabularies

    for path in (makes / "hf", makes / "ours", llama):
        vocabulary = config.Vocabulary(kind="checkpoint", path=str(path))
        data = config.Data(task="cmudict_g2p", lengths={"targets": 8}, vocabulary=vocabulary)
        pair = open_vocabularies(data)
        expected = read_text_settings(path).vocabularies
        for vocabulary_opened, wanted in zip(pair, expected, strict=True):
            assert vocabularies.fingerprint(vocabulary_opened) == vocabularies.fingerprint(wanted)


def test_what_is_no_checkpoint_says_what_it_is(tmp_path, makes, monkeypatch):
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="There is no google/flan.* here or in the cache"):
        open_checkpoint("google/flan-t5-small")
    with pytest.raises(ValueError, match="There is no runs/mine. Train a run first"):
        open_checkpoint("runs/mine")
    with pytest.raises(ValueError, match="There is no .*/absent. Train a run first"):
        open_checkpoint(folder / "absent")
    with pytest.raises(ValueError, match="There is no .* is named owner/name:absent.gguf"):
        open_checkpoint(folder / "absent.gguf")
    (folder / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="neither a run folder .* nor a .gguf file"):
        open_checkpoint(folder)
    (folder / "a.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="name the file, such as .*a.gguf"):
        open_checkpoint(folder)
    with pytest.raises(ValueError, match="a.gguf is cut off"):
        open_checkpoint(folder / "a.gguf")
    (folder / "config.json").write_bytes((makes / "hf/config.json").read_bytes())
    (folder / "tokenizer.json").write_bytes((makes / "hf/tokenizer.json").read_bytes())
    settings = makes / "hf/tokenizer_config.json"
    (folder / settings.name).write_bytes(settings.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="pickle.*safe_serialization=True"):
        open_checkpoint(folder)
    with pytest.raises(ValueError, match="pickle"):
        open_checkpoint(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="one set of weights"):
        open_checkpoint(makes / "hf", best=True)


def test_two_devices_shards_or_one_the_weights_are_the_same(makes):
    whole = open_checkpoint(makes / "hf").load().params
    split = open_checkpoint(makes / "hf").load(config.Mesh(data=2, fsdp=4)).params
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_that_computes_otherwise_with_the_same_weights_is_warned(makes):
    sharding.use_mesh(config.Mesh())
    changed = dataclasses.replace(T5, decoder=dataclasses.replace(T5.decoder, max_distance=64))
    with pytest.warns(UserWarning, match=r"decoder's Stack.max_distance = 128; this run"):
        setup.initial_weights(str(makes / "hf"), changed, model.shapes(changed))


@pytest.mark.parametrize("there", [True, False])
def test_a_path_inside_a_run_names_the_run_and_its_step(tmp_path, there):
    run = tmp_path / "quick"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.gin").write_text("")
    if there:
        (run / "checkpoints" / "2500" / "state").mkdir(parents=True)
    inside = rf"--checkpoint={run} --step=2500 .*load\(\"{run}\", step=2500\)"
    with pytest.raises(ValueError, match=inside):
        open_checkpoint(run / "checkpoints" / "2500")
    for path in ("checkpoints", "checkpoints/newest", "checkpoints/2500/state"):
        with pytest.raises(ValueError, match=rf"--checkpoint={run} \(in Python"):
            open_checkpoint(run / path)


def test_a_model_of_another_library_may_lie_in_a_folder_of_checkpoints(tmp_path, makes):
    (tmp_path / "config.gin").write_text("")
    folder = tmp_path / "checkpoints" / "t5"
    folder.parent.mkdir()
    folder.symlink_to(makes / "hf")
    assert open_checkpoint(folder).kind == "Hugging Face"


EDITS = [
    ("norm = 'rms'", "norm = 'rms_plus_one'", "Stack.norm = 'rms_plus_one', saved as 'rms'"),
    ("activation = 'gelu'", "activation = 'silu'", "Stack.activation = 'silu', saved as 'gelu'"),
    ("tied = False", "tied = True", "Model.tied = True, saved as False"),
    ("layers = 2", "layers = 3", "encoder's Stack.layers = 3, saved as 2"),
]


@pytest.mark.parametrize("before, after, words", EDITS, ids=[edit[0] for edit in EDITS])
def test_a_checkpoint_has_the_model_that_it_was_saved_with(tmp_path, drawn, before, after, words):
    folder = write_ours(tmp_path / "ours", T5, drawn)
    text = (folder / "config.gin").read_text()
    assert before in text
    (folder / "config.gin").write_text(text.replace(before, after))
    for door in (lambda path: open_checkpoint(path, options=WEIGHTS_ONLY), SavedWeights):
        with pytest.warns(UserWarning, match=re.escape(words)) as raised:
            assert door(folder).run.model == T5
        assert str(folder) in str(raised[0].message)


def test_fields_that_no_weight_depends_on_may_be_edited(tmp_path, drawn, recwarn):
    folder = write_ours(tmp_path / "ours", T5, drawn)
    edited = dataclasses.replace(T5, dtype="float32", dropout=0.5, attention="reference")
    (folder / "config.gin").write_text(
        gin_file.to_text(dataclasses.replace(SavedWeights(folder).run, model=edited))
    )
    assert open_checkpoint(folder, options=WEIGHTS_ONLY).model == edited
    assert not recwarn.list


@pytest.mark.parametrize("content", ["null", "[]", '"bytes"', "{}", '{"kind": []}', "7" * 5000])
def test_a_vocabulary_that_is_no_object_is_refused_in_words(tmp_path, content):
    (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path} holds no vocabulary that can be") as raised:
        vocabularies.load_vocabulary(tmp_path)
    assert "Type" not in str(raised.value) and "Attribute" not in str(raised.value)
