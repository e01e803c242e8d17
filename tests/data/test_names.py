# SPDX-License-Identifier: Apache-2.0
"""Laws of objectives of names: what is hidden, that it can be put back, and what is no code."""

import ast
import functools
import inspect
import json
import logging
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite import config, data
from t5x_lite.config import gin_file
from t5x_lite.config.windows import LengthLimits
from t5x_lite.data import names, objectives, randomness
from t5x_lite.data.names import TokenText
from t5x_lite.tokenizers import vocabularies
from t5x_lite.tokenizers.token_bytes import token_bytes

BYTES = vocabularies.ByteVocabulary(extra_ids=300)
SOURCES = [inspect.getsource(module) for module in (textwrap, inspect, json.decoder)]
WIDE = LengthLimits(4000, 4000, "encoder_decoder")


def byte_level() -> vocabularies.TokenizerJsonVocabulary:
    """A tokenizer whose tokens are words of code with the space before them."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SOURCES, trainer)
    return vocabularies.TokenizerJsonVocabulary(tokenizer.to_str().encode(), extra_ids=300)


@pytest.fixture(scope="module", params=["bytes", "byte_level"])
def vocabulary(request):
    return BYTES if request.param == "bytes" else byte_level()


def cut(vocabulary, ids, objective=None, lengths=WIDE, key=3):
    """Inputs and targets of a window without their ends, and the preprocessor.

    Args:
      vocabulary: of the tokens.
      ids: tokens of the window.
      objective: config of the objective; None for one that hides every name.
      lengths: limits of the row.
      key: random key.
    """
    cutter = preprocessor(vocabulary, objective or config.MaskedNames(), lengths)
    row = np.array([ids[: cutter.window]], np.int32)
    inputs, targets, _ = cutter(row, randomness.keys(key, np.arange(1)))
    assert inputs.tokens[-1] == targets.tokens[-1] == vocabulary.eos
    return inputs.tokens[:-1].tolist(), targets.tokens[:-1].tolist(), cutter


@functools.cache
def spelling(vocabulary) -> dict[int, bytes]:
    return token_bytes(vocabulary).by_id


@functools.cache
def preprocessor(vocabulary, objective, lengths):
    return objectives.make_preprocessor(objective, lengths, vocabulary)


def written(vocabulary, ids) -> bytes:
    spelled = spelling(vocabulary)
    return b"".join(spelled.get(int(token), b"") for token in ids)


def put_back(vocabulary, inputs, targets) -> bytes:
    """Bytes of a window: each sentinel of its inputs stands for what follows it in the targets.

    Args:
      vocabulary: of the tokens.
      inputs: tokens of the inputs.
      targets: tokens of the targets.
    """
    sentinels, runs, run = set(vocabulary.sentinel_ids.tolist()), {}, []
    for token in targets:
        if token in sentinels:
            assert token not in runs
            runs[token] = run = []
        else:
            run.append(token)
    return b"".join(written(vocabulary, runs.get(token, [token])) for token in inputs)


@pytest.mark.parametrize("source", range(len(SOURCES)))
def test_unmasking_returns_every_window_of_a_file_bitwise(vocabulary, source):
    ids = vocabulary.encode(SOURCES[source])
    draw = np.random.default_rng(source)
    lengths = LengthLimits(120, 90, "encoder_decoder")
    for begin in draw.integers(0, len(ids) - 120, 60).tolist():
        window = ids[begin : begin + 110]
        share = float(draw.choice([0.3, 1.0]))
        inputs, targets, cutter = cut(
            vocabulary, window, config.MaskedNames(share=share), lengths, key=begin
        )
        assert len(inputs) < 120 and len(targets) < 90
        text = put_back(vocabulary, inputs, targets)
        assert text == written(vocabulary, window[: cutter.window])
    assert cutter.names.counts.other < cutter.names.counts.total / 2


def names_of(tree: ast.AST) -> set[str]:
    """Identifiers of a module by its syntax tree, without those in f-strings."""
    every: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.JoinedStr):
            continue
        for field in ("id", "name", "arg", "attr", "module", "asname"):
            value = getattr(node, field, None)
            every |= set(value.split(".")) if isinstance(value, str) else set()
        every |= {each for each in getattr(node, "names", ()) if isinstance(each, str)}
        every |= names_of(node)
    return every


@pytest.mark.parametrize("source", range(len(SOURCES)))
def test_the_names_of_a_file_are_those_of_its_syntax_tree(source):
    ids = np.array(BYTES.encode(SOURCES[source]))
    actual = TokenText(token_bytes(BYTES)).find_names(ids)
    assert set(actual) == names_of(ast.parse(SOURCES[source])) - {"*", ""}


def test_all_occurrences_of_a_name_have_one_sentinel(vocabulary):
    text = "def total(rows, key):\n    return sum(row[key] for row in rows) + total([], key)\n"
    inputs, targets, cutter = cut(vocabulary, vocabulary.encode(text))
    runs = vocabulary.decode(targets)
    expected = ["total", "rows", "key", "sum", "row"]
    for number, name in enumerate(expected):
        assert f"<extra_id_{number}>{name}<" in runs.replace("> ", ">") + "<"
    shown = vocabulary.decode(inputs)
    counts = [shown.count(f"<extra_id_{number}>") for number in range(len(expected) + 1)]
    assert counts == [2, 2, 3, 1, 2, 0]
    for name in expected:
        assert name not in shown


@given(st.integers(0, 2**32), st.integers(8, 60), st.integers(6, 60), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_inputs_and_targets_fit_whatever_the_lengths(seed, inputs, targets, sentinels):
    small = vocabularies.ByteVocabulary(extra_ids=sentinels)
    ids = small.encode(SOURCES[0])
    begin = seed % (len(ids) - 100)
    lengths = LengthLimits(inputs, targets, "encoder_decoder")
    before, after, cutter = cut(small, ids[begin:][:100], lengths=lengths, key=seed)
    assert len(before) < inputs and len(after) < targets
    assert put_back(small, before, after) == written(small, ids[begin:][: cutter.window])


def test_text_that_is_no_code_has_spans_hidden_and_is_counted(caplog):
    text = "it isn't code: 'tis a line\nit isn't code either, and is long\n"
    objective = config.MaskedNames(mean_span=2.0)  # of this test alone, with counts of its own
    inputs, targets, cutter = cut(BYTES, BYTES.encode(text), objective)
    assert put_back(BYTES, inputs, targets) == text.encode()
    hidden = [token for token in targets if token not in BYTES.sentinel_ids]
    assert len(hidden) == round(0.15 * len(text))
    assert (cutter.names.counts.total, cutter.names.counts.other) == (1, 1)
    with caplog.at_level(logging.WARNING):
        cutter.names.report("mine")
    assert "mine: 1 of 1 windows are no Python code: spans are hidden there" in caplog.text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("        return a\n    b = 1\nc = 2\n", ["a", "b", "c"]),  # begins inside a block
        ("\t\tx = 1\n\ty = 2\n", ["x", "y"]),
        ("a tail'\nb = c\n", ["b", "c"]),  # begins inside a string
        ("f(a,\n  b[", ["f", "a", "b"]),
        ("a = 1\nb = '''cut here", ["a", "b"]),
        ("a = $b\n", None),
        ("a\nif b:\n    c\n  d\n", None),
        ("a = b\0c\n", ["a", "b", "c"]),
        ("é = ñ\n", ["é", "ñ"]),
        ("a = 'x' # c\nprint(f'{d}')\n", ["a", "print"]),
        ("match a:\n    case None: pass\n", ["match", "a", "case"]),
        ("", []),
    ],
)
def test_windows_may_begin_and_end_anywhere(text, expected):
    raw = text.encode()
    spans = names.lex_bytes(raw)
    actual = None if spans is None else [raw[begin:end].decode() for begin, end in spans]
    assert actual == expected


def test_a_name_that_shares_a_token_stays(monkeypatch):
    text = TokenText(token_bytes(BYTES)._replace(by_id={1: b"a.", 2: b"b", 3: b" a", 4: b"+"}))
    assert list(text.find_names(np.array([1, 2, 4, 3]))) == ["b"]


@pytest.mark.parametrize("layout", ["encoder_decoder", "encoder_only"])
def test_tags_mark_the_tokens_of_names(layout):
    text = "def add(one):\n    return one\n"
    ids = BYTES.encode(text)
    limits = LengthLimits(200, 200, layout)
    cutter = preprocessor(BYTES, config.NameTags(), limits)
    inputs, targets, weights = cutter(np.array([ids]), randomness.keys(1, np.arange(1)))
    size = len(ids)
    assert inputs.tokens[:size].tolist() == ids
    marked = targets.tokens[:size] == BYTES.sentinel_ids[1]
    assert BYTES.decode(np.array(ids)[marked]) == "addoneone"
    assert set(targets.tokens[:size].tolist()) == set(BYTES.sentinel_ids[:2].tolist())
    if layout == "encoder_only":
        assert weights.tolist() == [1] * size
        broken = np.array([BYTES.encode("isn't it\nisn't")])
        assert not cutter(broken, randomness.keys(1, np.arange(1)))[2].any()


def test_an_encoder_alone_predicts_the_tokens_of_hidden_names():
    ids = np.array([BYTES.encode("def add(one):\n    return one\n")])
    limits = LengthLimits(200, 200, "encoder_only")
    cutter = objectives.make_preprocessor(config.MaskedNames(), limits, BYTES)
    inputs, targets, weights = cutter(ids, randomness.keys(1, np.arange(1)))
    np.testing.assert_array_equal(targets.tokens, ids[0])
    hidden = weights > 0
    np.testing.assert_array_equal(inputs.tokens[~hidden], ids[0][~hidden])
    assert BYTES.decode(ids[0][hidden]) == "addoneone"
    expected = np.repeat(BYTES.sentinel_ids[[0, 1, 1]], 3)
    np.testing.assert_array_equal(inputs.tokens[hidden], expected)


@pytest.mark.parametrize("objective", [config.MaskedNames(), config.NameTags()])
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only", "encoder_only"])
def test_a_run_reads_them_in_every_layout(tmp_path, objective, layout):
    rows = [{"targets": source[:700]} for source in SOURCES]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = config.Files(
        name="code",
        train=str(tmp_path / "code.jsonl"),
        vocabulary=config.Vocabulary("bytes", extra_ids=50),
    )
    lengths = {"inputs": 96, "targets": 96}
    cfg = config.Data(files, lengths, objective, cache_dir=str(tmp_path / "cache"))
    batches = data.open_batches(cfg, layout, 8, seed=1)
    batch = next(iter(batches.evaluation()))
    assert batch.loss_weights.sum() > 0


@pytest.mark.parametrize(
    "objective, extra_ids, message",
    [
        (config.MaskedNames(), 0, "MaskedNames needs 1 of the sentinels"),
        (config.NameTags(), 1, "NameTags needs 2 of the sentinels .* set Vocabulary.extra_ids"),
    ],
)
def test_too_few_sentinels_are_named(objective, extra_ids, message):
    small = vocabularies.ByteVocabulary(extra_ids=extra_ids)
    with pytest.raises(ValueError, match=message):
        objectives.make_preprocessor(objective, WIDE, small)


def test_a_vocabulary_that_spells_nothing_is_refused():
    whole = vocabularies.ByteVocabulary(extra_ids=4)
    whole.__class__ = type("Unspelled", (), dict(vars(vocabularies.ByteVocabulary)))
    with pytest.raises(ValueError, match="does not say what each of its ids writes"):
        objectives.make_preprocessor(config.MaskedNames(), WIDE, whole)


def test_both_directions_of_one_file_are_one_mixture(tmp_path):
    rows = [{"code": f"x = {n}", "text": f"number {n}"} for n in range(40)]
    for name in ("train", "validation"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    bindings = [
        f'config.Files.train = "{tmp_path}/train.jsonl"',
        f'config.Files.validation = "{tmp_path}/validation.jsonl"',
        'config.Vocabulary.kind = "bytes"',
        "config.Vocabulary.size = None",
        f'config.Data.cache_dir = "{tmp_path}/cache"',
    ]
    cfg = gin_file.load_data(["configs/data/dual_pairs.gin"], bindings)
    opened = data.open_dataset(cfg, "train")
    pairs = {opened.inputs_text(i): opened.references(i) for i in range(len(opened))}
    assert len(pairs) == 80
    for row in rows:
        assert pairs[f"summarize: {row['code']}"] == [row["text"]]
        assert pairs[f"generate: {row['text']}"] == [row["code"]]
