# SPDX-License-Identifier: Apache-2.0
"""Laws of readouts as transformers' classes: equal outputs, labels and weights there and back."""

import dataclasses
import json

import numpy as np
import pytest

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.checkpoints import weights
from t5x_lite.checkpoints.formats.huggingface import readouts
from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, open_checkpoint
from t5x_lite.checkpoints.outputs import (
    CheckpointContents,
    OutputSettings,
    make_output,
    write_output,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

T5 = dict(
    vocab_size=32,
    d_model=16,
    d_kv=8,
    d_ff=16,
    num_layers=2,
    decoder_start_token_id=0,
    num_heads=2,
    feed_forward_proj="gated-gelu",
)
DECODER = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    pad_token_id=0,
)
BART = dict(vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, pad_token_id=0)
BART |= dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=16)
BART |= dict(encoder_ffn_dim=16, decoder_ffn_dim=16, eos_token_id=1, decoder_start_token_id=1)
TAGS = {0: "O", 1: "B-x", 2: "I-x"}
CLASSES = {0: "no", 1: "yes", 2: "maybe"}
CASES = {
    "T5ForSequenceClassification": ("T5Config", T5, CLASSES, "classes"),
    "T5ForTokenClassification": ("T5Config", T5, TAGS, "tags"),
    "LlamaForSequenceClassification": ("LlamaConfig", DECODER, CLASSES, "labels"),
    "LlamaForTokenClassification": ("LlamaConfig", DECODER, TAGS, "tags"),
    "Qwen2ForSequenceClassification": ("Qwen2Config", DECODER, {0: "LABEL_0"}, "number"),
    "BartForSequenceClassification": ("BartConfig", BART, CLASSES, "classes"),
}
PROBLEMS = {"labels": "multi_label_classification", "number": "regression"}
# Both end in id 1, T5's and BART's end of a text.
TEXTS = ([5, 6, 7, 9, 1], [8, 3, 1])


def make_theirs(name: str):
    """A toy of a class of transformers with random weights, in float32."""
    config_class, fields, labels, kind = CASES[name]
    torch.manual_seed(0)
    cfg = getattr(transformers, config_class)(**fields, id2label=labels, label2id=None)
    cfg.label2id = {label: number for number, label in labels.items()}
    if kind in PROBLEMS:
        cfg.problem_type = PROBLEMS[kind]
    theirs = getattr(transformers, name)(cfg).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return theirs


def their_outputs(theirs) -> np.ndarray:
    """Outputs for TEXTS, padded with id 0."""
    ids = torch.tensor([[*row, *[0] * (5 - len(row))] for row in TEXTS])
    with torch.no_grad():
        return theirs(input_ids=ids, attention_mask=(ids != 0).long()).logits.numpy()


def our_outputs(cfg: config.Model, params: dict) -> np.ndarray:
    """Outputs for TEXTS, padded to 8 places; of tags for each place, else one for each text."""
    ids = np.array([[*row, *[0] * (8 - len(row))] for row in TEXTS], np.int32)
    segments = (ids > 0).astype(np.int32)
    places = np.where(ids > 0, np.arange(8), 0).astype(np.int32)
    wanted = segments if cfg.readout.kind == "tags" else segments[:, :1]
    zeros = np.zeros_like(wanted)
    batch = Batch(zeros, wanted, zeros, zeros, ids, segments, places)
    outputs = model.Transformer(cfg).apply({"params": params}, sharding.place_batch(batch))
    return np.asarray(outputs if cfg.readout.kind == "tags" else outputs[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_outputs_labels_and_weights_are_those_of_transformers_there_and_back(name, tmp_path):
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path / "theirs")
    opened = open_checkpoint(tmp_path / "theirs", options=WEIGHTS_ONLY)
    cfg = dataclasses.replace(opened.model, dtype="float32")
    labels = () if CASES[name][3] == "number" else tuple(CASES[name][2].values())
    assert (cfg.readout.kind, cfg.readout.labels) == (CASES[name][3], labels)
    with sharding.one_device_mesh():
        ours = our_outputs(cfg, weights.place_weights(opened.weights(), cfg))
    expected = their_outputs(theirs)
    if cfg.readout.kind == "tags":
        for row, text in enumerate(TEXTS):
            np.testing.assert_allclose(
                ours[row, : len(text)], expected[row, : len(text)], atol=1e-4
            )
    else:
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    contents = CheckpointContents(opened.run, None)
    output = make_output(contents, tmp_path / "back", OutputSettings("huggingface"))
    write_output(output, opened.weights(), tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["architectures"] == [name]
    back = getattr(transformers, name).from_pretrained(tmp_path / "back").eval()
    assert back.config.id2label == CASES[name][2]
    # Of the tokenizer, which this toy does not have.
    for field in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        setattr(back.config, field, getattr(theirs.config, field, None))
    np.testing.assert_allclose(their_outputs(back), expected, atol=1e-6)
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for weight, values in before.items():
        assert torch.equal(values, after[weight]), weight


def test_a_readout_that_transformers_lacks_is_refused_by_its_field(tmp_path):
    stack = config.Stack(layers=1, embed=16, heads=2, head_dim=8, mlp=16)
    readout = config.Readout("classes", "mean", labels=("a", "b"))
    cfg = config.Model(vocab=32, encoder=stack, decoder=stack, readout=readout)
    run = config.Run("runs/toy", cfg)
    with pytest.raises(ValueError, match="needs Readout.dense = True, Readout.pooling = 'last'"):
        output = make_output(CheckpointContents(run, None), tmp_path, OutputSettings("huggingface"))
        output.files(set())


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"id2label": {"0": "no", "2": "yes"}}, "does not name outputs 0, 1, 2"),
        ({"id2label": {"zero": "no"}}, "does not name outputs 0, 1, 2"),
        ({"id2label": ["no", "yes"]}, "does not name outputs 0, 1, 2"),
        ({"problem_type": "ranking"}, "problem_type = 'ranking' with 2 labels is not implemented"),
        ({"problem_type": "regression"}, "with 2 labels is not implemented"),
    ],
)
def test_a_head_that_cannot_be_read_is_named_by_its_field(fields, words):
    described = {"architectures": ["T5ForSequenceClassification"], "model_type": "t5"} | fields
    with pytest.raises(ValueError, match=words):
        readouts.parse_readout(described)
