# SPDX-License-Identifier: Apache-2.0
"""Laws of batches of several denoisers: rates, hosts, epochs, streams, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from reconstruction import restored

from t5x_lite import config, data
from t5x_lite.config import windows
from t5x_lite.data import objectives, streams
from t5x_lite.tokenizers import extended, vocabularies

MODES = ("[NLU]", "[NLG]", "[S2S]")


def ul2(overflow="cap", rates=(1, 1, 2, 1)) -> config.Denoisers:
    """UL2's mixture of denoisers."""
    return config.Denoisers(
        (
            config.SpanCorruption(0.15, 3.0, "[NLU]", overflow),
            config.SpanCorruption(0.5, 8.0, "[NLG]", overflow),
            config.PrefixLM(0.25, mode="[S2S]"),
            config.FillInTheMiddle(),
        ),
        rates,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoisers")
    draw = np.random.default_rng(0)
    with open(folder / "a.jsonl", "w") as lines:
        for number in range(300):
            words = "".join(draw.choice(list("abcdé "), draw.integers(1, 60)))
            lines.write(json.dumps({"text": f"{number} {words}"}) + "\n")
    return folder


def text(folder, objective=None, **changes) -> config.Data:
    """Data of running text.

    Args:
      folder: of the JSONL file and the cache.
      objective: that cuts the text; None is UL2's mixture.
      **changes: other fields of config.Data.
    """
    vocabulary = config.Vocabulary("bytes", extra_ids=30, names=MODES)
    files = config.Files("toy", str(folder / "a.jsonl"), vocabulary, targets="text")
    fields = dict(lengths={"inputs": 64, "targets": 48}, cache_dir=str(folder / "cache"))
    return config.Data(files, objective=objective or ul2(), **(fields | changes))


def of_rows(batch) -> list[tuple]:
    """Every row of a batch, whole."""
    fields = [each for each in batch if each is not None]
    return [tuple(each[row].tobytes() for each in fields) for row in range(len(batch.targets))]


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_same_bits_on_any_number_of_hosts(folder, layout, stream):
    whole = data.open_batches(text(folder, stream=stream), layout, 8, seed=3)
    for hosts in (2, 4):
        parts = [
            data.open_batches(text(folder, stream=stream), layout, 8, 3, host=host, hosts=hosts)
            for host in range(hosts)
        ]
        for step in (0, 1, 30):
            together = [row for part in parts for row in of_rows(part.at(step))]
            assert together == of_rows(whole.at(step))


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_denoisers_are_drawn_at_their_rates_and_told_by_their_modes(folder, layout):
    batch = data.open_batches(text(folder), layout, 8192, seed=1).at(0)
    first = (batch.inputs if layout == "encoder_decoder" else batch.targets)[:, 0]
    modes = np.array([259, 260, 261])
    counts = [(first == mode).sum() for mode in modes]
    counts.append((~np.isin(first, modes)).sum())
    np.testing.assert_allclose(counts, np.array([1, 1, 2, 1]) * 8192 / 5, atol=1)


def test_every_denoiser_reads_all_of_the_text_once_an_epoch(folder):
    cfg = text(folder)
    batches = data.open_batches(cfg, "encoder_decoder", 1, seed=5)
    dataset = data.open_dataset(cfg, "train")
    ids = [dataset.ids(i)[1].tolist() for i in range(len(dataset))]
    vocabulary = data.open_vocabularies(cfg)[1]
    assert [part.name for part in batches.parts] == [
        "toy/[NLU] spans 0.15 3",
        "toy/[NLG] spans 0.5 8",
        "toy/[S2S] prefix uniform 0.25",
        "toy/middle psm",
    ]
    for part, (_, objective, _) in zip(
        batches.parts, objectives.denoisers(cfg.objective, vocabulary), strict=True
    ):
        preprocessor = objectives.make_preprocessor(
            objective, windows.length_limits(cfg.lengths, "encoder_decoder"), vocabulary
        )
        batch = part.rows.batch(np.arange(part.rows.rows), None)
        back = []
        for row in range(part.rows.rows):
            source = batch.inputs[row][batch.input_segments[row] > 0].tolist()
            target = batch.targets[row][batch.target_segments[row] > 0].tolist()
            back += restored(preprocessor, source, target)
        after = None if preprocessor.keeps_ends else -1
        whole = [t for each in ids for t in (*each[:after], *preprocessor.seam)]
        assert back == whole[: len(back)] and len(whole) - len(back) <= 1


def test_a_stream_of_denoisers_resumes_exactly(folder, monkeypatch):
    monkeypatch.setattr(streams, "SHARD", 60)
    monkeypatch.setattr("t5x_lite.data.task.CHUNK", 30)
    batches = data.open_batches(text(folder, stream=True), "encoder_decoder", 8, seed=1)
    states, forward = [], []
    for step in range(20):
        states.append(json.loads(json.dumps(batches.state())))
        forward.append(batches.at(step))
    again = data.open_batches(text(folder, stream=True), "encoder_decoder", 8, seed=1)
    again.restore(states[11])
    assert of_rows(again.at(11)) == of_rows(forward[11])


def test_the_same_denoiser_twice_draws_other_noise(folder):
    twice = config.Denoisers((config.SpanCorruption(), config.SpanCorruption()), (1, 1))
    batches = data.open_batches(text(folder, twice), "encoder_decoder", 4, seed=0)
    first, second = (part.rows.batch(np.arange(4), part.key) for part in batches.parts)
    assert batches.parts[1].name == "toy/spans 0.15 3 2"
    assert (first.inputs != second.inputs).any()


def test_statistics_count_broken_lines_once(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text((folder / "a.jsonl").read_text() + "not json\n")
    cfg = text(tmp_path)
    cfg = dataclasses.replace(cfg, task=dataclasses.replace(cfg.task, broken="skip"))
    result = data.open_batches(cfg, "encoder_decoder", 4, seed=0).statistics
    assert sum(result.counts.values()) == 1


ERRORS = [
    (
        dict(objective=config.SpanCorruption(0.5, 64.0)),
        r"4 tokens, SpanCorruption needs at least 65",
    ),
    (dict(objective=config.FillInTheMiddle(marks=("<a>", "b", "c"))), r"'<a>' is 3 ids, not one"),
    (dict(objective=config.CausalLM()), "leaves the encoder nothing to read"),
    (
        dict(lengths={"inputs": 3, "targets": 2}),
        r"inputs 3, targets 2.*too short for SpanCorruption",
    ),
    (dict(task="python_stdlb"), r"'python_stdlb' is not registered: did you mean python_stdlib"),
]


@pytest.mark.parametrize("changes, message", ERRORS)
def test_what_cannot_be_cut_says_why(changes, message, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    with pytest.raises(ValueError, match=message):
        data.open_batches(dataclasses.replace(text(tmp_path), **changes), "encoder_decoder", 4, 0)


def test_modes_that_a_vocabulary_cannot_tell_apart_are_refused():
    symbols = vocabularies.SymbolVocabulary(list("abc"), separator=" ", extra_ids=5)
    with pytest.raises(
        ValueError, match=r"'\[NLU\]' is the same ids as '\[NLG\]'.*Vocabulary.names"
    ):
        objectives.denoisers(ul2(), symbols)
    assert len(objectives.denoisers(ul2(), extended.extend_vocabulary(symbols, MODES))) == 4


@pytest.mark.parametrize("rates, message", [((1, 0, 1, 1), "must be positive"), ((1,), "one rate")])
def test_rates_of_denoisers_are_checked(rates, message):
    with pytest.raises(ValueError, match=f"Denoisers.rates.*{message}"):
        ul2(rates=rates)


def test_an_encoder_alone_takes_only_span_corruption_among_denoisers(folder):
    with pytest.raises(ValueError, match="PrefixLM is for a model with a decoder"):
        data.open_batches(text(folder), "encoder_only", 4, 0)
    spans = config.Denoisers(ul2().parts[:2], (1, 1))
    batch = data.open_batches(text(folder, spans), "encoder_only", 4, 0).at(0)
    assert batch.inputs.shape == batch.targets.shape == (4, 48)


def test_inputs_end_as_the_denoisers_do(folder):

    def inputs(objective):
        return data.open_vocabularies(text(folder, objective))[0]

    assert inputs(config.SpanCorruption()).ends and not inputs(config.PrefixLM()).ends
    assert not inputs(ul2()).ends
