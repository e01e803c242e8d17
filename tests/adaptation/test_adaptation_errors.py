# SPDX-License-Identifier: Apache-2.0
"""Impossible adaptations are refused, with both values and the remedy."""

import dataclasses

import adaptation_toys as toys
import pytest
from conftest import toy_model

from t5x_lite import config
from t5x_lite.adaptation import mapping, vocabulary_compatibility
from t5x_lite.tokenizers import extended, vocabularies

LONE = toy_model("decoder_only", **toys.GEMMA2)
PAIR = toys.pair_of(LONE)


@pytest.fixture(autouse=True)
def mesh():
    toys.one_device()


def stack(**changes) -> config.Stack:
    return dataclasses.replace(LONE.decoder, **changes)


def model(**changes) -> config.Model:
    return dataclasses.replace(PAIR, **changes)


@pytest.mark.parametrize(
    "wanted, source, adaptation, words",
    [
        (model(encoder=stack(layers=3)), LONE, {}, ["Stack.layers is 2 there and 3 here", "enc"]),
        (model(decoder=stack(mlp=8)), LONE, {}, ["Stack.mlp is 32 there and 8 here", "decoder"]),
        (model(decoder=stack(kv_heads=4)), LONE, {}, ["Stack.kv_heads is 2 there and 4 here"]),
        (model(decoder=stack(norm="rms")), LONE, {}, ["'rms_plus_one' there and 'rms' here"]),
        (model(encoder=stack(activation="relu")), LONE, {}, ["activation is 'gelu' there"]),
        (model(vocab=63), LONE, {}, ["Model.vocab is 63", "64 ids", "Model.vocab = 64"]),
        (LONE, LONE, {"encoder_source": "x"}, ["Adaptation.encoder_source", "no encoder"]),
        (PAIR, LONE, {"decoder_from": "encoder"}, ["decoder_from is 'encoder'", "no encoder"]),
        (
            model(decoder=None),
            LONE,
            {"encoder_source": "x"},
            ["encoder alone", "Adaptation.source = 'x'"],
        ),
        (model(decoder=stack(merged=True)), LONE, {"cross_scale": 0.5}, ["cross_scale is 0.5"]),
        (LONE, LONE, {"cross_scale": 0.0}, ["cross_scale is 0.0", "leave it out"]),
    ],
)
def test_what_does_not_fit_is_named_with_both_values(wanted, source, adaptation, words):
    adaptation = config.Adaptation(**{"source": "there"} | adaptation)
    other = source if adaptation.encoder_source else None
    with pytest.raises(ValueError) as caught:
        mapping.plan_adaptation(wanted, adaptation, source, other)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unequal_widths_cannot_copy_cross_attention():
    wide = toy_model("decoder_only", **toys.GEMMA2 | dict(embed=24))
    pair = toys.pair_of(LONE, encoder=wide.decoder, separate_embeddings=True)
    adaptation = config.Adaptation("small", encoder_source="large")
    with pytest.raises(ValueError, match="16 features.* is 24.*\n*.*random"):
        mapping.plan_adaptation(pair, adaptation, LONE, wide)
    mapping.plan_adaptation(pair, dataclasses.replace(adaptation, cross="random"), LONE, wide)


def test_learned_positions_are_cut_and_never_invented():
    lone = toy_model("decoder_only", **toys.LONE["gpt2"])
    longer = dataclasses.replace(lone.decoder, max_length=17)
    with pytest.raises(ValueError, match="max_length is 17.*learned 16"):
        mapping.plan_adaptation(
            toys.pair_of(lone, encoder=longer), config.Adaptation("there"), lone, None
        )


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"query_scale": 0.5}, "Stack.query_scale is 1.0"),
        ({"softcap": None}, "Stack.softcap is 5.0"),
        ({"rotary_base": 7.0}, "Stack.rotary_base is 10000.0"),
        ({"window": 4}, "Stack.window is 3"),
        ({"pattern": ("full", "sliding")}, "Stack.pattern is ('sliding', 'full')"),
    ],
)
def test_settings_that_change_the_computation_are_warned_about(changes, word):
    adapted = model(decoder=stack(**changes))
    plan = mapping.plan_adaptation(adapted, config.Adaptation("x"), LONE, None)
    assert len(plan.warnings) == 1 and word in plan.warnings[0]
    assert not mapping.plan_adaptation(PAIR, config.Adaptation("x"), LONE, None).warnings


def test_an_untied_head_that_differs_cannot_become_a_tied_one(tmp_path):
    untied = dataclasses.replace(LONE, tied=False)
    toys.written(tmp_path / "there", untied)
    with pytest.raises(ValueError, match="head of Adaptation.source, but they differ.*tied = Fal"):
        toys.adapted(PAIR, source=tmp_path / "there")


def test_two_tables_that_differ_cannot_become_one(tmp_path):
    for number in (0, 1):
        toys.written(tmp_path / str(number), LONE, seed=number)
    adaptation = dict(source=tmp_path / "0", encoder_source=tmp_path / "1")
    with pytest.raises(ValueError, match="separate_embeddings = True"):
        toys.adapted(PAIR, **adaptation)
    separate = dataclasses.replace(PAIR, separate_embeddings=True)
    toys.adapted(separate, **adaptation)


@pytest.mark.parametrize("path", ["nowhere", "file.gguf", "empty"])
def test_a_source_that_is_none_is_named_by_its_binding(path, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Adaptation.source: "):
        toys.adapted(PAIR, source=tmp_path / path)


def test_a_vocabulary_that_means_other_texts_is_refused_with_the_first_difference():
    ours = vocabularies.SymbolVocabulary(["a", "b", "c"], " ", ends=True)
    swapped = vocabularies.SymbolVocabulary(["a", "c", "b"], " ", ends=True)
    larger = extended.extend_vocabulary(ours, ("[NLU]",), 5)
    assert vocabulary_compatibility.describe_difference(ours, larger) is None
    assert (
        vocabulary_compatibility.describe_difference(
            ours, vocabularies.SymbolVocabulary(["a", "b", "c", "d"], " ")
        )
        is None
    )
    difference = vocabulary_compatibility.describe_difference(ours, swapped)
    assert "is 'b' there and 'c' here" in difference
    assert "ids there and" in vocabulary_compatibility.describe_difference(larger, ours)


def test_weights_of_another_vocabulary_are_begun_with_a_warning(tmp_path, recwarn):
    ours = vocabularies.SymbolVocabulary(["a", "b", "c"], " ", ends=True)
    swapped = vocabularies.SymbolVocabulary(["a", "c", "b"], " ", ends=True)
    larger = extended.extend_vocabulary(ours, ("[NLU]",), 5)
    vocabularies.save_pair(tmp_path / "run" / "vocabulary", ours, ours)
    (tmp_path / "run" / "config.gin").touch()
    for path, pair in (("run", (ours, larger)), ("elsewhere", (swapped, swapped))):
        vocabulary_compatibility.warn_of_difference(str(tmp_path / path), pair)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"Checkpoint.initial \(.*run\) .* id 4 is 'b'"):
        vocabulary_compatibility.warn_of_difference(str(tmp_path / "run"), (ours, swapped))


NEW = {"decoder_from": None}


@pytest.mark.parametrize(
    "wanted, adaptation, words",
    [
        (LONE, NEW, ["decoder_from is None", "no encoder"]),
        (PAIR, NEW | {"encoder_source": "x"}, ["Adaptation.source = 'x'"]),
        (model(encoder=stack(layers=3)), NEW, ["Stack.layers is 2 there and 3 here"]),
    ],
)
def test_a_new_decoder_needs_an_encoder_from_the_source(wanted, adaptation, words):
    adaptation = config.Adaptation(**{"source": "there"} | adaptation)
    other = LONE if adaptation.encoder_source else None
    with pytest.raises(ValueError) as caught:
        mapping.plan_adaptation(wanted, adaptation, LONE, other)
    assert all(word in str(caught.value) for word in words), str(caught.value)
