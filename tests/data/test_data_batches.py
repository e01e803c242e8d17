# SPDX-License-Identifier: Apache-2.0
"""Laws of batches: by step, by host, by epoch, packed and not, mixed, streamed."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from t5x_lite import config, data
from t5x_lite.data import streams

BYTES = config.Vocabulary("bytes", extra_ids=20)
LAYOUTS = ("encoder_decoder", "decoder_only", "encoder_only")


def write_lines(path, count: int, seed: int, longest: int = 9) -> None:
    """Writes count unique examples, of words of up to `longest` characters from a seed, to path."""
    draw = random.Random(seed)
    with open(path, "w") as lines:
        for number in range(count):

            def word():
                return "".join(draw.choices("abcd", k=draw.randint(0, longest)))

            lines.write(json.dumps({"in": f"{number}{word()}", "out": f"{word()}{number}"}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 157), ("validation", 23), ("other", 90)):
        write_lines(folder / f"{name}.jsonl", count, seed=len(name))
    return folder


def pairs(folder, name="toy", train="train.jsonl", **changes) -> config.Data:
    """Data by name of the file train of folder, with inputs; changes are fields of config.Data."""
    files = config.Files(
        name=name,
        train=str(folder / train),
        validation=str(folder / "validation.jsonl"),
        vocabulary=BYTES,
        inputs="in",
        targets="out",
    )
    fields = dict(lengths={"inputs": 24, "targets": 20}, cache_dir=str(folder / "cache"))
    return config.Data(task=files, **(fields | changes))


def text(folder, objective, **changes) -> config.Data:
    """Data of the text of folder, cut by objective; changes are fields of config.Data."""
    files = config.Files(
        name="text", train=str(folder / "train.jsonl"), targets="in", vocabulary=BYTES
    )
    fields = dict(lengths={"inputs": 24, "targets": 20}, cache_dir=str(folder / "cache"))
    return config.Data(task=files, objective=objective, **(fields | changes))


def same(first, second) -> None:
    for name, one, other in zip(first._fields, first, second, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


def rows_of(batches) -> int:
    return sum(part.rows.rows for part in batches.parts)


def examples(batch) -> list[tuple[tuple, tuple]]:
    """(inputs, targets) of every segment of every row, in either layout."""
    result = []
    for row in range(len(batch.targets)):
        for segment in range(1, batch.target_segments[row].max() + 1):
            here = batch.target_segments[row] == segment
            if batch.prefix is not None:
                first, second = here & batch.prefix[row], here & ~batch.prefix[row]
                inputs, targets = batch.targets[row][first], batch.targets[row][second]
            else:
                there = batch.input_segments[row] == segment
                inputs, targets = batch.inputs[row][there], batch.targets[row][here]
            result.append((tuple(inputs.tolist()), tuple(targets.tolist())))
    return result


def truth(cfg, split="train") -> Counter:
    dataset = data.open_dataset(cfg, split)
    ids = (dataset.ids(i) for i in range(len(dataset)))
    return Counter((tuple(a.tolist()), tuple(b.tolist())) for a, b in ids)


@pytest.mark.parametrize("objective", [None, config.SpanCorruption(), config.PrefixLM()])
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_batch_is_decided_by_seed_and_step(folder, objective, layout, stream):
    make = text if objective else pairs
    cfg = make(folder, objective=objective, stream=stream)
    one = data.open_batches(cfg, layout, 4, seed=3)
    forward = [one.at(step) for step in range(12)]
    other = data.open_batches(cfg, layout, 4, seed=3)
    same(other.at(7), forward[7])
    same(other.at(2), forward[2])
    different = data.open_batches(cfg, layout, 4, seed=4).at(2)
    assert (different.targets != forward[2].targets).any()


@pytest.mark.parametrize("stream", [False, True])
def test_hosts_together_read_the_whole_batch(folder, stream):
    cfg = pairs(folder, stream=stream)
    whole = data.open_batches(cfg, "encoder_decoder", 6, seed=1)
    hosts = [
        data.open_batches(cfg, "encoder_decoder", 6, 1, host=host, hosts=3) for host in range(3)
    ]
    for step in (0, 9):
        parts = [host.at(step) for host in hosts]
        for name in ("inputs", "targets", "loss_weights", "target_segments"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole.at(step), name))


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("stream", [False, True])
def test_every_epoch_holds_every_example_once_unbroken(folder, layout, pack, stream):
    cfg = pairs(folder, pack=pack, stream=stream)
    batches = data.open_batches(cfg, layout, 1, seed=5)
    rows = batches.statistics.rows
    for epoch in range(3):
        result = Counter()
        for step in range(epoch * rows, (epoch + 1) * rows):
            result.update(examples(batches.at(step)))
        assert result == truth(cfg)


def test_batches_run_on_over_the_end_of_an_epoch(folder):
    cfg = pairs(folder)
    one, seven = (data.open_batches(cfg, "encoder_decoder", size, seed=2) for size in (1, 7))
    for step in range(6):
        singles = [one.at(row) for row in range(7 * step, 7 * step + 7)]
        joined = np.concatenate([single.targets for single in singles])
        np.testing.assert_array_equal(seven.at(step).targets, joined)


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_packed_rows_hold_the_examples_of_unpacked_ones(folder, layout):
    result = []
    for pack in (True, False):
        batches = data.open_batches(pairs(folder, pack=pack), layout, 8, seed=5)
        result.append(Counter(each for batch in batches.evaluation() for each in examples(batch)))
        assert batches.statistics.examples_per_row > 1 if pack else True
    assert result[0] == result[1]


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_segments_and_positions_count_each_example_and_padding_is_zero(folder, layout):
    batches = data.open_batches(pairs(folder), layout, 16, seed=5)
    batch = batches.at(0)
    sides = [(batch.targets, batch.target_segments, batch.target_positions)]
    if layout == "encoder_decoder":
        sides.append((batch.inputs, batch.input_segments, batch.input_positions))
    for tokens, segments, positions in sides:
        for row in range(16):
            used = int((segments[row] > 0).sum())
            assert (segments[row, used:] == 0).all() and (tokens[row, used:] == 0).all()
            assert (positions[row, used:] == 0).all()
            steps = np.diff(segments[row, :used])
            assert set(steps.tolist()) <= {0, 1} and segments[row, 0] == 1
            begins = np.flatnonzero(np.diff(segments[row, :used], prepend=0))
            expected = np.arange(used) - np.repeat(begins, np.diff([*begins, used]))
            np.testing.assert_array_equal(positions[row, :used], expected)


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_the_loss_is_on_targets_alone(folder, layout):
    batch = data.open_batches(pairs(folder), layout, 16, seed=5).at(0)
    wanted = batch.target_segments > 0
    if layout == "decoder_only":
        wanted &= ~batch.prefix
    np.testing.assert_array_equal(batch.loss_weights, wanted.astype(np.float32))


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_reads_the_split_once_and_pads_the_last_batch(folder, hosts):
    cfg = pairs(folder)
    result, counts = Counter(), []
    for host in range(hosts):
        batches = data.open_batches(cfg, "encoder_decoder", 4, 9, "validation", host, hosts)
        read_batches = list(batches.evaluation())
        counts.append(len(read_batches))
        assert {batch.targets.shape for batch in read_batches} == {(4 // hosts, 20)}
        result.update(each for batch in read_batches for each in examples(batch))
    assert result == truth(cfg, "validation")
    assert len(set(counts)) == 1


def test_evaluation_draws_the_same_noise_whatever_the_seed(folder):
    cfg = text(folder, config.SpanCorruption())
    first, second = (
        data.open_batches(cfg, "encoder_decoder", 8, seed).evaluation() for seed in (1, 2)
    )
    for one, other in zip(first, second, strict=True):
        same(one, other)


def test_truncation_is_counted_and_keeps_the_end(folder):
    cfg = pairs(folder, lengths={"inputs": 8, "targets": 6})
    batches = data.open_batches(cfg, "encoder_decoder", 4, seed=0)
    full = list(truth(cfg).elements())
    cut = [(a[:7] + (1,) if len(a) > 8 else a, b[:5] + (1,) if len(b) > 6 else b) for a, b in full]
    assert batches.statistics.truncated == {
        "inputs": sum(len(a) > 8 for a, _ in full),
        "targets": sum(len(b) > 6 for _, b in full),
    }
    result = Counter(each for batch in batches.evaluation() for each in examples(batch))
    assert result == Counter(cut)
    assert "inputs truncated" in str(batches.statistics)


def test_fill_is_the_share_of_places_that_are_not_padding(folder):
    for layout in ("encoder_decoder", "decoder_only"):
        batches = data.open_batches(pairs(folder), layout, 1, seed=0)
        read_batches = list(batches.evaluation())
        used = np.mean([batch.target_segments > 0 for batch in read_batches])
        name = "row" if layout == "decoder_only" else "targets"
        assert batches.statistics.fill[name] == pytest.approx(used)
        assert batches.statistics.rows == len(read_batches)


@pytest.mark.parametrize("objective", [config.SpanCorruption(), config.PrefixLM()])
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_every_epoch_of_windows_covers_the_text_once(folder, objective, layout):
    cfg = text(folder, objective)
    batches = data.open_batches(cfg, layout, 1, seed=5)
    dataset = data.open_dataset(cfg, "train")
    ids = np.concatenate([dataset.ids(i)[1] for i in range(len(dataset))])
    if isinstance(objective, config.SpanCorruption):
        ids = np.where(ids == 1, ord("\n") + 3, ids)  # a newline in place of each end
    expected = Counter(ids.tolist())
    rows = batches.statistics.rows
    starts = []
    for epoch in range(2):
        result = Counter()
        for step in range(epoch * rows, (epoch + 1) * rows):
            batch = batches.at(step)
            for inputs, targets in examples(batch):
                result.update(inputs + targets)
        for token in [each for each in result if each >= 259]:
            del result[token]
        if isinstance(objective, config.SpanCorruption):
            del result[1]
        # A last window of one token can hide nothing and is left out.
        assert (expected - result).total() <= 1 and not result - expected
        starts.append(batches.at(epoch * rows).targets)
    assert (starts[0] != starts[1]).any()


def test_causal_lm_predicts_the_text_with_its_ends(folder):
    cfg = text(folder, config.CausalLM(), lengths={"targets": 30})
    batches = data.open_batches(cfg, "decoder_only", 4, seed=1)
    dataset = data.open_dataset(cfg, "train")
    ids = np.concatenate([dataset.ids(i)[1] for i in range(len(dataset))])
    read_ids = np.concatenate([b.targets[b.target_segments > 0] for b in batches.evaluation()])
    np.testing.assert_array_equal(read_ids, ids[: len(read_ids)])
    assert len(ids) - len(read_ids) <= 1
    batch = batches.at(0)
    assert batch.loss_weights.all() and not batch.prefix.any()


def test_an_encoder_alone_learns_tags_or_what_was_hidden(folder, tmp_path):
    with open(tmp_path / "tags.jsonl", "w") as lines:
        for word in ("abc", "de", "fghij", "k"):
            lines.write(json.dumps({"in": word, "out": word.upper()}) + "\n")
    files = config.Files("tags", str(tmp_path / "tags.jsonl"), BYTES, inputs="in", targets="out")
    cfg = config.Data(files, {"targets": 12}, cache_dir=str(tmp_path / "cache"))
    batch = next(data.open_batches(cfg, "encoder_only", 4, seed=0).evaluation())
    letters = (batch.inputs > 3) & (batch.inputs < 259)
    np.testing.assert_array_equal(batch.targets[letters], batch.inputs[letters] - 32)
    np.testing.assert_array_equal(batch.input_segments, batch.target_segments)
    masked = data.open_batches(text(folder, config.SpanCorruption()), "encoder_only", 4, seed=0).at(
        0
    )
    changed = masked.inputs != masked.targets
    np.testing.assert_array_equal(changed, masked.loss_weights == 1)


def test_empty_texts_are_examples_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"in": "", "out": ""}\n{"in": "a", "out": "b"}\n')
    files = config.Files("e", str(tmp_path / "a.jsonl"), BYTES, inputs="in", targets="out")
    cfg = config.Data(files, {"inputs": 8, "targets": 8}, cache_dir=str(tmp_path / "cache"))
    batch = next(data.open_batches(cfg, "encoder_decoder", 2, seed=0).evaluation())
    assert Counter(examples(batch)) == truth(cfg)


def test_a_mixture_draws_examples_at_its_rates(folder):
    first = pairs(folder).task
    # Twice as long, so fewer fit a row: rates are of examples all the same.
    write_lines(folder / "long.jsonl", 60, seed=1, longest=18)
    second = pairs(folder, name="long", train="long.jsonl").task
    mixture = config.Mixture((first, second), (3.0, 1.0))
    cfg = pairs(folder, lengths={"inputs": 64, "targets": 64})
    cfg = config.Data(task=mixture, lengths=cfg.lengths, cache_dir=cfg.cache_dir)
    batches = data.open_batches(cfg, "encoder_decoder", 8192, seed=0)
    owners = [
        truth(config.Data(task=each, lengths=cfg.lengths, cache_dir=cfg.cache_dir))
        for each in (first, second)
    ]
    drawn = Counter(examples(batches.at(0)))
    counts = [sum(drawn[each] for each in owner if drawn[each]) for owner in owners]
    assert sum(counts) == drawn.total()
    assert counts[0] / counts[1] == pytest.approx(3.0, rel=0.01)
    # Every example of a task is drawn as often as any other, to one epoch.
    assert max(drawn[each] for each in owners[0]) - min(drawn[each] for each in owners[0]) <= 1


@pytest.mark.parametrize("objective", [None, config.SpanCorruption()])
def test_a_stream_resumes_exactly(folder, objective, monkeypatch):
    monkeypatch.setattr(streams, "SHARD", 40)
    monkeypatch.setattr("t5x_lite.data.task.CHUNK", 20)
    make = text if objective else pairs
    cfg = make(folder, objective=objective, stream=True)
    batches = data.open_batches(cfg, "encoder_decoder", 5, seed=1)
    forward, states = [], []
    for step in range(60):
        states.append(json.loads(json.dumps(batches.state())))
        forward.append(batches.at(step))
    assert batches.parts[0].rows.log[-1].epoch >= 2
    for step in (0, 17, 41):
        again = data.open_batches(cfg, "encoder_decoder", 5, seed=1)
        # Taken some steps later, as when batches are made ahead of the step that is saved.
        again.restore(states[min(step + 4, 59)])
        same(again.at(step), forward[step])
        same(again.at(step + 15), forward[step + 15])


def test_a_stream_holds_every_example_once_an_epoch_whatever_the_shards(folder, monkeypatch):
    monkeypatch.setattr(streams, "SHARD", 50)
    monkeypatch.setattr("t5x_lite.data.task.CHUNK", 10)
    cfg = pairs(folder, stream=True)
    batches = data.open_batches(cfg, "encoder_decoder", 1, seed=1)
    result, step = Counter(), 0
    while batches.at(step) and batches.parts[0].rows.log[-1].epoch == 0:
        result.update(examples(batches.at(step)))
        step += 1
    assert result == truth(cfg)


def test_a_stream_does_not_go_back_past_its_state(folder, monkeypatch):
    monkeypatch.setattr(streams, "SHARD", 20)
    monkeypatch.setattr(streams, "REMEMBERED", 3)
    monkeypatch.setattr("t5x_lite.data.task.CHUNK", 10)
    batches = data.open_batches(pairs(folder, stream=True), "encoder_decoder", 5, seed=1)
    batches.at(40)
    with pytest.raises(ValueError, match="a stream goes forward"):
        batches.at(0)


@pytest.mark.parametrize("stream", [False, True])
def test_other_data_than_the_checkpoint_saw_are_refused(folder, tmp_path, stream):
    write_lines(tmp_path / "train.jsonl", 30, seed=1)
    write_lines(tmp_path / "validation.jsonl", 3, seed=1)
    cfg = pairs(tmp_path, stream=stream)
    state = data.open_batches(cfg, "encoder_decoder", 4, seed=1).state()
    data.open_batches(cfg, "encoder_decoder", 4, seed=1).restore(state)
    write_lines(tmp_path / "train.jsonl", 31, seed=2)
    with pytest.raises(ValueError, match="changed since the checkpoint"):
        data.open_batches(cfg, "encoder_decoder", 4, seed=1).restore(state)
    with pytest.raises(ValueError, match="now other"):
        data.open_batches(pairs(folder, name="other"), "encoder_decoder", 4, seed=1).restore(state)


def test_what_does_not_suit_the_layout_is_refused_with_the_remedy(folder):
    plain = text(folder, None)
    with pytest.raises(ValueError, match="without inputs: set Data.objective"):
        data.open_batches(plain, "encoder_decoder", 4, seed=0)
    with pytest.raises(ValueError, match=r'set Data.lengths\["inputs"\]'):
        data.open_batches(pairs(folder, lengths={"targets": 9}), "decoder_only", 4, seed=0)
    with pytest.raises(ValueError, match="predicts one target for each input"):
        data.open_batches(pairs(folder), "encoder_only", 4, seed=0)
    twice = config.Mixture((pairs(folder).task,) * 2, (1.0, 1.0))
    with pytest.raises(ValueError, match="names a task twice"):
        data.open_batches(
            config.Data(twice, {"inputs": 9, "targets": 9}), "encoder_decoder", 4, seed=0
        )
    with pytest.raises(ValueError, match=r"batch_size \(5\) must be a multiple of the hosts \(2\)"):
        data.open_batches(pairs(folder), "encoder_decoder", 5, seed=0, hosts=2)
    with pytest.raises(ValueError, match="no split 'test'; there are: train, validation"):
        data.open_batches(pairs(folder), "encoder_decoder", 4, seed=0, split="test")
