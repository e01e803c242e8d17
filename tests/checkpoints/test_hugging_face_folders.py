# SPDX-License-Identifier: Apache-2.0
"""Laws of Hugging Face folders: read as transformers reads them, or a sentence about what it is."""

import json
import os
import shutil
import warnings

import numpy as np
import pytest
from conversion_toys import LLAMA, T5, Drawn, assert_same, write_hugging_face, write_ours

from t5x_lite import config, convert
from t5x_lite.checkpoints import kinds, tensors
from t5x_lite.checkpoints.formats.huggingface import kept_fields, llama, t5
from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, open_checkpoint
from t5x_lite.tokenizers import vocabularies
from t5x_lite.tokenizers.errors import SourceError
from t5x_lite.training import model_dir


@pytest.fixture(scope="module")
def drawn():
    return Drawn(LLAMA)


@pytest.fixture
def folder(tmp_path, drawn):
    """A Llama without a tokenizer."""
    return write_hugging_face(tmp_path / "llama", llama, LLAMA, drawn)


def change_json(path, **fields) -> None:
    """Writes fields into a .json file; None removes one."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | fields
    path.write_text(json.dumps({name: v for name, v in content.items() if v is not None}))


def test_the_single_file_is_read_before_an_old_index(folder, drawn, tmp_path):
    old = write_hugging_face(tmp_path / "old", llama, LLAMA, Drawn(LLAMA, seed=1), limit=4000)
    index = "model.safetensors.index.json"
    (folder / index).write_bytes((old / index).read_bytes())
    with pytest.warns(UserWarning, match="model.safetensors is read and the shards are not"):
        opened = tensors.open_hugging_face_tensors(folder)
    assert_same(opened.weights(), drawn)


def test_weights_under_another_name_say_what_to_rename(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(SourceError, match=r"in model.fp16.safetensors, .* rename it to model.safe"):
        tensors.open_hugging_face_tensors(folder)


def test_an_adapter_is_never_left_out_silently(folder, tmp_path):
    change_json(folder / kinds.ADAPTER, base_model_name_or_path=str(tmp_path / "base"), r=8)
    with pytest.raises(SourceError, match=r"adapters \(LoRA\) of .*base, which cannot be opened"):
        open_checkpoint(folder, options=WEIGHTS_ONLY)
    (folder / kinds.ADAPTER).unlink()
    assert open_checkpoint(folder, options=WEIGHTS_ONLY).model.vocab == LLAMA.vocab


def test_an_entry_of_the_hubs_cache_names_its_snapshot(tmp_path):
    entry = tmp_path / "models--org--name"
    for name in ("old", "new"):
        (entry / "snapshots" / name).mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("old\n")
    with pytest.raises(SourceError, match="hub's cache: the model is in its snapshot, .*/old"):
        open_checkpoint(entry)
    outside = tmp_path / "clone"
    (outside / "inside").mkdir(parents=True)
    (outside / "inside" / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="has one inside: .*clone/inside"):
        open_checkpoint(outside)


@pytest.mark.parametrize(
    "architectures, extra, message",
    [
        (["LlamaForSequenceClassification"], {}, "a classifier of texts"),
        (["LlamaForTokenClassification"], {}, "a classifier of tokens"),
        (["LlamaForQuestionAnswering"], {"qa_outputs.weight": 2}, "marks answers"),
        (None, {"score.weight": 2}, r"a head of its own \(score.weight\)"),
    ],
)
def test_another_head_is_named(tmp_path, drawn, architectures, extra, message):
    folder = write_hugging_face(tmp_path / "llama", llama, LLAMA, drawn)
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / "model.safetensors")
    del arrays["lm_head.weight"]
    arrays |= {name: np.zeros((rows, 8), np.float32) for name, rows in extra.items()}
    save_file(arrays, folder / "model.safetensors")
    change_json(folder / "config.json", architectures=architectures)
    with pytest.raises(SourceError, match=message):
        open_checkpoint(folder, options=WEIGHTS_ONLY).weights()


def test_a_t5_with_a_classifier_is_named_and_not_listed(tmp_path):
    folder = write_hugging_face(tmp_path / "t5", t5, T5, Drawn(T5))
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / "model.safetensors")
    arrays = {f"transformer.{name}": array for name, array in arrays.items()}
    save_file(arrays, folder / "model.safetensors")
    change_json(folder / "config.json", architectures=["T5ForSequenceClassification"])
    with pytest.raises(SourceError, match=r"a classifier of texts \(T5ForSeq") as caught:
        open_checkpoint(folder, options=WEIGHTS_ONLY).weights()
    assert "missing" not in str(caught.value)


def test_layer_types_of_full_layers_change_nothing_in_a_llama(folder):
    path = folder / "config.json"
    change_json(path, layer_types=["full_attention"] * LLAMA.decoder.layers)
    with pytest.warns(UserWarning, match="layer_types changes nothing"):
        read = tensors.open_hugging_face_tensors(folder)
    change_json(path, layer_types=None)
    assert read.model == tensors.open_hugging_face_tensors(folder).model
    change_json(path, layer_types=["sliding_attention"] * LLAMA.decoder.layers)
    with pytest.raises(ValueError, match="layer_types"):
        tensors.open_hugging_face_tensors(folder)


GENERATION = {
    "encoder_repetition_penalty": 1.1,
    "repetition_penalty": 1.2,
    "begin_suppress_tokens": [3],
    "do_sample": False,
    "temperature": 0.7,
    "no_repeat_ngram_size": 0,
    "transformers_version": "5.0",
}


@pytest.fixture
def run(tmp_path):
    """A T5 of ours with a vocabulary of symbols."""
    ours = write_ours(tmp_path / "ours", T5, Drawn(T5))
    symbols = vocabularies.SymbolVocabulary([chr(97 + i) for i in range(26)])
    vocabularies.save_pair(ours / "vocabulary", symbols, symbols)
    return ours


def export(origin, to):
    """Writes a checkpoint as a Hugging Face folder; returns its two .json files."""
    convert.main([f"--from={origin}", f"--to={to}", "--format=huggingface"])
    names = ("config.json", "generation_config.json")
    return [json.loads((to / name).read_text()) for name in names]


def test_fields_that_no_logit_depends_on_come_back(run, tmp_path):
    first_config, first_generation = export(run, tmp_path / "first")
    change_json(
        tmp_path / "first/config.json", n_positions=512, task_specific_params={"s": {"prefix": "a"}}
    )
    change_json(tmp_path / "first/generation_config.json", **GENERATION)
    convert.main([f"--from={tmp_path / 'first'}", f"--to={tmp_path / 'back'}"])
    for origin in ("first", "back"):
        config_json, generation = export(tmp_path / origin, tmp_path / f"again_{origin}")
        kept = {"n_positions": 512, "task_specific_params": {"s": {"prefix": "a"}}}
        assert config_json == first_config | kept
        expected = {name: v for name, v in GENERATION.items() if name not in kept_fields.WRITTEN}
        assert generation == first_generation | expected


def test_kept_fields_replace_nothing_that_an_export_writes():
    kept = {"max_position_embeddings": 9, "text": {"n_ctx": 3}, "gone": {"n_ctx": 4}}
    merged = kept_fields.merge_config({"max_position_embeddings": 5, "text": {"a": 1}}, kept)
    assert merged == {"max_position_embeddings": 5, "text": {"a": 1, "n_ctx": 3}}
    nested = {"encoder": {"max_position_embeddings": 7, "heads": 2}, "heads": 3}
    assert kept_fields.pick_config(nested) == {"encoder": {"max_position_embeddings": 7}}


def test_the_context_of_a_llama_is_exported(folder, tmp_path):
    change_json(folder / "config.json", max_position_embeddings=8192)
    arguments = ["--vocabulary=none", "--format=huggingface"]
    convert.main([f"--from={folder}", f"--to={tmp_path / 'out'}", *arguments])
    exported = json.loads((tmp_path / "out/config.json").read_text())
    assert exported["max_position_embeddings"] == 8192


def test_settings_of_generation_that_are_not_followed_are_named(run, tmp_path):
    export(run, tmp_path / "hf")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        open_checkpoint(tmp_path / "hf").load()
    change_json(tmp_path / "hf/generation_config.json", **GENERATION)
    convert.main([f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'back'}"])
    for path in (tmp_path / "hf", tmp_path / "back"):
        with pytest.warns(UserWarning) as caught:
            open_checkpoint(path).load()
        (message,) = [str(each.message) for each in caught if each.category is UserWarning]
        assert "encoder_repetition_penalty = 1.1, begin_suppress_tokens = [3]. Give" in message
        assert open_checkpoint(path).run.decode == config.Decode(repetition_penalty=1.2)
        assert "temperature" not in message and "no_repeat" not in message


@pytest.mark.parametrize(
    "fields, followed, ignored",
    [
        ({}, {}, ""),
        ({"temperature": 0.6, "top_k": 20}, {}, ""),
        ({"do_sample": True}, {"temperature": 1.0}, ""),
        (
            {"top_k": 20, "top_p": 0.9, "do_sample": True, "temperature": 0.6, "top_h": 0.4},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.9},
            "top_h = 0.4",
        ),
        ({"do_sample": True, "temperature": 1e-9}, {}, "temperature = 1e-09"),
        ({"forced_bos_token_id": 0, "num_beams": 1}, {"forced_bos_token_id": 0}, ""),
        ({"forced_bos_token_id": 99}, {}, "forced_bos_token_id = 99"),
        ({"bad_words_ids": [[3], [4, 5]]}, {"bad_words_ids": ((3,), (4, 5))}, ""),
        ({"bad_words_ids": [[3], [99]]}, {}, "bad_words_ids = [[3], [99]]"),
        ({"suppress_tokens": [3, 9]}, {"suppress_tokens": (3, 9)}, ""),
        ({"suppress_tokens": "x"}, {}, "suppress_tokens = 'x'"),
        ({"suppress_tokens": [[3]]}, {}, "suppress_tokens = [[3]]"),
        (
            {"min_new_tokens": 3, "max_new_tokens": 8, "no_repeat_ngram_size": 2},
            {"max_new_tokens": 8, "min_new_tokens": 3, "no_repeat_ngram_size": 2},
            "",
        ),
        ({"min_new_tokens": 300}, {}, "min_new_tokens = 300"),
        ({"repetition_penalty": 0.0}, {}, "repetition_penalty = 0.0"),
        ({"num_beams": 4, "length_penalty": 2.0}, {}, "num_beams = 4, length_penalty = 2.0"),
        ({"use_cache": True, "length_penalty": None, "max_length": 20}, {}, "max_length = 20"),
    ],
)
def test_what_decoding_knows_is_followed_and_what_else_would_change_a_text_named(
    fields, followed, ignored
):
    assert kept_fields.follow_generation(fields, 10) == config.Decode(**followed)
    assert kept_fields.describe_ignored(fields, 10) == ignored


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"]
)
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(run, tmp_path, name):
    export(run, tmp_path / "hf")
    (tmp_path / "hf" / name).unlink()
    os.mkfifo(tmp_path / "hf" / name)
    with pytest.raises(ValueError, match=f"{name} .*not a regular file|{name} is not a regular"):
        open_checkpoint(tmp_path / "hf").load()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 50_000, '"\\ud800', "\x00", "3"])
def test_json_of_any_depth_or_kind_is_refused_by_name(run, tmp_path, name, content):
    export(run, tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        open_checkpoint(tmp_path / "hf").load()


def test_a_run_that_begins_with_a_folder_keeps_its_fields_when_that_is_gone(run, tmp_path):
    export(run, tmp_path / "hf")
    change_json(tmp_path / "hf/config.json", n_positions=512)
    symbols = vocabularies.SymbolVocabulary(["a"])
    begun = config.Run(
        model_dir=str(tmp_path / "tuned"),
        model=T5,
        data=config.Data("cmudict_g2p", {"inputs": 8, "targets": 8}),
        checkpoint=config.Checkpoint(initial=str(tmp_path / "hf")),
    )
    (tmp_path / "tuned").mkdir()
    for _ in range(2):
        model_dir.write_description(begun, (symbols, symbols))
        assert kept_fields.load_kept(tmp_path / "tuned").config == {"n_positions": 512}
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
