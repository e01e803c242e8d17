# SPDX-License-Identifier: Apache-2.0
"""Laws of a session at play: a stream is the text, a step teaches, nothing else moves."""

import contextlib
import dataclasses
import inspect
from typing import Any, get_type_hints

import jax
import numpy as np
import pytest
from conftest import FAMILIES, toy_model

from t5x_lite import config, decoding, interactive, model, sharding
from t5x_lite.config.checked import WrongType, coerce
from t5x_lite.evaluation import extraction, predict, streaming
from t5x_lite.tokenizers import chat, vocabularies
from t5x_lite.training import fit_in_memory

LETTERS = "abcdefghijklmnopqrstuvwxyz é"
MODELS = {
    "t5": toy_model("encoder_decoder", layers=1),
    "decoder": toy_model("decoder_only", layers=1, positions="rotary"),
    "startless": toy_model(
        "decoder_only", add_bos=False, **FAMILIES["gpt2"] | {"max_length": 64, "layers": 1}
    ),
}


def session_of(name, scale=0.3, vocabulary=None):
    cfg, draw = MODELS[name], np.random.default_rng(0)

    def make(shape):
        return (scale * draw.normal(size=shape.shape)).astype(np.float32)

    params = jax.tree.map(make, model.shapes(cfg))
    pair = (vocabulary or vocabularies.SymbolVocabulary(LETTERS),) * 2
    predictor = predict.Predictor(cfg, params, pair)
    return interactive.Session(predictor, config.Decode(max_new_tokens=11))


@pytest.fixture
def one_device():
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, every, options",
    [
        ("t5", 1, {}),
        ("decoder", 3, {"temperature": 1.0, "seed": 3}),
        ("startless", 2, {"decoder": "lookup", "width": 8}),
    ],
)
def test_a_stream_put_together_is_the_text(one_device, name, every, options):
    session = session_of(name)
    pieces = list(session.stream("ab ab ab", every=every, **options))
    plain = {key: value for key, value in options.items() if key not in ("decoder", "width")}
    assert "".join(pieces) == session.generate("ab ab ab", **plain)
    assert len(pieces) >= 2


@pytest.mark.slow
def test_a_stream_has_the_ids_calls_and_drafters_of_generation():
    sharding.use_mesh(config.Mesh(data=2, tensor=4))
    session = session_of("t5", scale=0.1)
    decode = config.Decode(max_new_tokens=20, drafter="lookup", draft_length=8)
    whole = session.predictor.predict(["abab"], decode)[0]
    pieces = list(streaming.stream_text(session.predictor, "abab", decode, every=2))

    def gather(name):
        return [each for piece in pieces for each in getattr(piece, name)]

    assert gather("tokens") == whole.tokens[0]
    assert gather("calls") == whole.calls and gather("drafted_by") == whole.drafted_by
    assert pieces[-1].total < len(whole.calls)


def test_multibyte_characters_and_trailing_spaces_wait_until_they_are_complete():
    spelled = vocabularies.ByteVocabulary()
    text = "é 日 x  "
    ids = [*spelled.encode(text), 1]

    def row(values):
        return np.array(values, np.int32)[None, None]

    def results():
        for count in range(1, len(ids) + 1):
            zeros = row([0] * count)
            length, none = row(count), row(0)
            yield decoding.Result(row(ids[:count]), length, none, none, count, zeros, zeros)

    pieces = list(
        streaming.text_pieces(results(), ("model",), lambda ids, growing=False: spelled.decode(ids))
    )
    assert "".join(piece.text for piece in pieces) == text
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert sum((piece.tokens for piece in pieces), []) == ids


def test_what_cannot_be_streamed_is_refused_before_anything_is_written(one_device):
    session = session_of("t5")
    with pytest.raises(ValueError, match="to stream, leave out beams"):
        session.stream("a", beams=2)
    with pytest.raises(ValueError, match="every must be at least 1; got 0"):
        session.stream("a", every=0)
    with pytest.raises(ValueError, match="did you mean max_new_tokens"):
        session.stream("a", lenght=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_steps_teach_the_pairs_and_the_first_loss_is_that_of_scoring(one_device, name):
    session = session_of(name)
    before = jax.tree.map(np.asarray, session.predictor.params)
    inputs, targets = ["ab", "hello"], ["xyz", "no"]
    scores = session.score(inputs, targets)
    tokens = sum(len(row) for row in session.predictor.encode_targets(targets))
    first = session.train_step(inputs, targets, learning_rate=2e-2)
    assert first == pytest.approx(-sum(scores) / tokens, abs=1e-4)
    for _ in range(100):
        last = session.train_step(inputs, targets, learning_rate=2e-2)
    assert last < 0.05 and [*session.generate(inputs)] == targets
    fresh = session_of(name).predictor.params
    for ours, theirs in zip(jax.tree.leaves(before), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_gradient_is_that_of_small_differences_and_fillers_count_for_nothing():
    sharding.use_mesh(config.Mesh())
    session = session_of("t5")
    predictor = session.predictor
    ids = predictor.encode_inputs(["ab"]), predictor.encode_targets(["xyz"])
    learner = fit_in_memory.Learner(predictor.cfg, predictor.params)
    loss = learner.step(*ids, learning_rate=1e-4)
    score = session.score("ab", "xyz")
    assert loss == pytest.approx(-score / 4, abs=1e-5)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), learner.master, predictor.params)
    # Adam's first step moves a weight by its rate, whatever its slope is.
    assert max(jax.tree.leaves(moved)) == pytest.approx(1e-4, rel=0.02)
    example = fit_in_memory.make_training_examples(predictor.cfg, *ids)
    assert example.weights.shape[0] == 8 and float(example.weights.sum()) == 4


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing(one_device):
    session = session_of("t5")
    session.train_step("ab", "x", learning_rate=1e-3)
    good = session.predictor.params
    session.learner.master = jax.tree.map(lambda x: x * np.inf, session.learner.master)
    with pytest.raises(ValueError, match="no weight was changed"):
        session.train_step("ab", "x")
    assert session.predictor.params is good
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        session.train_step("ab", "x", learning_rate=0)
    with pytest.raises(ValueError, match="two texts, or two lists"):
        session.train_step("ab", ["x"])
    with pytest.raises(ValueError, match="2 inputs but 1 targets"):
        session.train_step(["a", "b"], ["x"])


def test_explaining_is_a_method_of_the_session(one_device):
    session = session_of("t5")
    explanation = session.explain("ab", top=3, max_new_tokens=4)
    assert explanation.written == session.generate("ab", max_new_tokens=4)
    assert explanation.alternatives.predictions.ids.shape[1] == 3
    assert session.explain("ab", "xyz").written == "xyz"
    with pytest.raises(ValueError, match="did you mean top_k"):
        session.explain("ab", topk=3)
    assert dataclasses.is_dataclass(explanation.lens)


METHODS = ("generate", "predict", "stream", "chat", "explain")
NAMES = [field.name for field in dataclasses.fields(config.Decode)]


@pytest.mark.parametrize("name", METHODS)
def test_help_names_types_and_describes_every_option(name):
    method = getattr(interactive.Session, name)
    parameters = inspect.signature(method).parameters
    hints = get_type_hints(config.Decode)
    for option in NAMES:
        assert parameters[option].annotation == hints[option] | None
        assert parameters[option].default is None
        assert f"\n  {option}: " in method.__doc__
    assert not any(each.kind == each.VAR_KEYWORD for each in parameters.values())
    assert method.__doc__.count("Raises:") == 1


def test_a_session_prints_what_was_loaded(one_device):
    session = session_of("t5")
    session.step, session.source = 1200, "runs/letters"
    shown = str(session)
    assert shown.startswith("<Session of runs/letters: t5, encoder-decoder, encoder 1 x 16")
    count = sum(leaf.size for leaf in jax.tree.leaves(session.predictor.params))
    assert f"{count / 1e6:,.1f}M parameters, float32, step 1,200>" in shown
    # With an odd toy no family of another library is named.
    assert str(session_of("startless")).startswith("<Session of a model: decoder-only, decoder 1 x")


@pytest.mark.parametrize(
    "name, here",
    [
        ("num_beams", "beams"),
        ("num_return_sequences", "n_best"),
        ("max_length", "max_new_tokens"),
        ("max_tokens", "max_new_tokens"),
        ("do_sample", "temperature"),
        ("num_assistant_tokens", "draft_length"),
    ],
)
def test_an_option_of_another_library_is_named_as_it_is_called_here(one_device, name, here):
    session = session_of("t5")
    for method in (session.generate, session.predict, session.stream, session.explain):
        with pytest.raises(ValueError, match=f"Unknown option {name}: it is called {here}"):
            method("ab", **{name: 4})


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, words",
    [
        (None, "Expected a text or a list of texts; got None"),
        (5, "got 5"),
        (b"cat", "got b'cat'"),
        ({"text": "cat"}, "got {'text': 'cat'}"),
        (["cat", 5], "Text 1 of the list must be a text; got 5"),
        ([["cat"]], r"Text 0 of the list must be a text; got \['cat'\]"),
        (["cat", None], "Text 1"),
    ],
)
def test_what_is_not_a_text_is_refused_in_one_sentence_by_every_method(one_device, wrong, words):
    session = session_of("t5")
    calls = [
        session.generate,
        session.predict,
        session.embed,
        lambda texts: session.score(texts, "x"),
        lambda texts: session.score("x", texts),
        lambda texts: session.train_step(texts, texts),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call(wrong)
    for call in (session.stream, session.explain, lambda text: session.explain("ab", text or 5)):
        with pytest.raises(ValueError, match="Expected a text; got"):
            call(wrong)
    session.template = chat.ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(ValueError, match="Expected a question, or a list such as"):
        session.chat(wrong)
    assert session.generate(np.array(["ab", "b"])) == session.generate(("ab", "b"))


WRONG = [None, "4", "x", "", 3.5, -1, 2**31, 10**400, True, [1], {}, b"x", {"a"}, float("inf")]
TEXTS = {"texts", "text", "inputs", "targets", "input", "target", "messages"}


def wrong_arguments():
    """(owner, method, parameter, value) for every parameter and value that its annotation bars."""
    methods = [(interactive.Session, name) for name in (*METHODS, "score", "embed", "train_step")]
    for owner, name in (*methods, (interactive, "load")):
        for parameter in inspect.signature(getattr(owner, name)).parameters.values():
            hint = parameter.annotation
            named = parameter.name in TEXTS or hint is Any  # a callback
            for value in WRONG if parameter.name != "self" else ():
                # A text may be "x", and an on_progress None.
                if named and (isinstance(value, str) or value is None):
                    continue
                with contextlib.suppress(ValueError, WrongType):
                    if not named:
                        coerce(value, hint)
                        continue
                yield owner, name, parameter.name, value


def test_every_argument_of_another_type_or_range_is_refused_by_its_name(one_device, tmp_path):
    session = session_of("t5")
    session.template = chat.ChatTemplate("{{ messages[0].content }}", {})
    needed = {"texts", "text", "inputs", "targets", "input", "messages"}
    count = 0
    for owner, name, parameter, value in wrong_arguments():
        call = interactive.load if owner is interactive else getattr(session, name)
        others = {each: "ab" for each in needed & set(inspect.signature(call).parameters)}
        others |= {"path": tmp_path} if owner is interactive else {}
        with pytest.raises(ValueError) as raised:
            call(**others | {parameter: value})
        message = str(raised.value)
        words = ("ext", "takes", "question") if parameter in TEXTS else (parameter,)
        assert any(word in message for word in words) and "\n" not in message, (name, parameter)
        assert "--" not in message
        count += 1
    assert count > 500


def test_train_step_needs_a_pair_and_options_are_a_dict(one_device):
    session = session_of("t5")
    with pytest.raises(ValueError, match="train_step needs at least one pair"):
        session.train_step([], [])
    with pytest.raises(ValueError, match="options must be a dict"):
        session.settings(None)


def test_greedy_texts_of_a_session_that_samples_need_no_filter_reset(one_device):
    session = session_of("t5")
    session.decode = config.Decode(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=4)
    assert session.settings({"temperature": 0}) == config.Decode(max_new_tokens=4)
    assert session.settings({}).top_k == 5
    with pytest.raises(ValueError, match="Decode.top_k narrows what is sampled"):
        session.settings({"temperature": 0, "top_k": 3})


@pytest.mark.parametrize("name", ["eos_token_id", "use_cache", "stopping_criteria", "pad_token_id"])
def test_an_option_without_a_counterpart_is_explained(one_device, name):
    with pytest.raises(ValueError, match=f"Unknown option {name}: ") as raised:
        session_of("t5").generate("ab", **{name: 1})
    assert "did you mean" not in str(raised.value)


@pytest.mark.parametrize(
    "path, words",
    [
        ("run.gin", "is a config, not a checkpoint: name the folder of the trained run"),
        ("none.gin", "a checkpoint is the folder of a run, not its config"),
        ("data.jsonl", "is not a checkpoint: name a run folder, a Hugging Face folder"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named_for_what_it_is(tmp_path, path, words):
    for name in ("run.gin", "data.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=words):
        interactive.load(tmp_path / path)


@pytest.mark.slow
def test_several_samples_are_those_of_their_seeds_and_the_first_is_the_only_one(one_device):
    session = session_of("t5")
    drawn = {"temperature": 1.0, "seed": 5}
    four = session.predict("abab", n_best=4, **drawn)
    assert len(four.texts) == len(four.scores) == len(four.tokens) == 4
    assert four.texts[0] == session.generate("abab", **drawn)
    assert len(set(four.texts)) == 4
    assert session.generate(["abab", "b"], n_best=4, **drawn)[0] == four.texts
    later = session.predict("abab", n_best=4, temperature=1.0, seed=6)
    assert not set(four.texts) & set(later.texts)
    with pytest.raises(ValueError, match="n_best 4 needs as many Decode.beams .now 1., or samples"):
        session.predict("abab", n_best=4)
    with pytest.raises(ValueError, match="A stream is one text: leave out n_best"):
        session.stream("abab", n_best=4, **drawn)


def test_a_batch_is_cut_where_more_than_half_of_it_would_be_padding(one_device):
    predictor = session_of("decoder").predictor
    short, long = [[5] * 10] * 6, [[5] * 300] * 2

    def lengths(ids):
        return [[len(ids[place]) for place in batch] for batch in predictor.batches(ids)]

    assert lengths([*long, *short]) == [[10] * 6, [300] * 2]
    assert lengths(short) == [[10] * 6]
    draw = np.random.default_rng(0)
    for most in (20, 200, 2000):
        ids = [[1] * int(draw.integers(1, most)) for _ in range(200)]
        places = []
        for batch in predictor.batches(ids):
            padded = [decoding.bucket_length(len(ids[place])) for place in batch]
            assert len(batch) * max(padded) <= 2 * sum(padded)
            assert len(batch) <= predictor.batch_size
            places += batch
        assert sorted(places) == list(range(200))
    assert list(predictor.batches([])) == []


def test_extraction_scores_every_span_as_a_whole_output(one_device):
    session = session_of("t5")
    text, longest = "abcab", 3
    spans = extraction.score_spans(session.predictor, "ab", text, longest)
    places = [(i, j) for i in range(5) for j in range(i + 1, min(i + longest, 5) + 1)]
    assert sorted((span.start, span.text) for span in spans) == sorted(
        (i, text[i:j]) for i, j in places
    )
    scores = session.score(["ab"] * len(spans), [span.text for span in spans])
    np.testing.assert_allclose([span.log_probability for span in spans], scores, atol=1e-4)
    assert scores == sorted(scores, reverse=True)
    assert session.extract("ab", text, longest) == spans
    with pytest.raises(ValueError, match="longest must be at least 1; got 0"):
        session.extract("ab", text, 0)
    with pytest.raises(ValueError, match="no spans of up to 0 tokens"):
        extraction.score_spans(session.predictor, "ab", text, 0)
    with pytest.raises(ValueError, match="no spans"):
        extraction.score_spans(session.predictor, "ab", "", 3)
