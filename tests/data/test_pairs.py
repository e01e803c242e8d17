# SPDX-License-Identifier: Apache-2.0
"""Laws of pairs of texts in rows: both stand together, whatever is packed and shuffled."""

import json

import numpy as np
import pytest

from t5x_lite import config, data
from t5x_lite.data import files

COUNT = 40


@pytest.fixture
def described(tmp_path):
    """Files of pairs whose chosen text is the prompt doubled and whose rejected one is its end."""
    lines = []
    for number in range(COUNT):
        word = chr(97 + number % 26) * (1 + number % 7)
        scores = {"a": -1.0 * number, "b": -1.0 * number - 0.5}
        lines.append({"prompt": word, "chosen": word + word, "rejected": word[-1] + "!"} | scores)
    for split in ("train", "validation"):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{split}.jsonl").write_text(text)
    return config.Files(
        name="pairs",
        train=str(tmp_path / "train.jsonl"),
        validation=str(tmp_path / "validation.jsonl"),
        vocabulary=config.Vocabulary("bytes"),
        inputs="prompt",
        targets="chosen",
        rejected="rejected",
        reference=("a", "b"),
    )


def open_pairs(described, tmp_path, layout, split="train", **fields):
    cfg = config.Data(
        task=described,
        lengths={"inputs": 48, "targets": 64},
        cache_dir=str(tmp_path / "tokens"),
        **fields,
    )
    return data.open_batches(cfg, layout, 4, seed=3, split=split)


def texts_of(batch, row, segment) -> tuple[bytes, bytes]:
    """Input and target of a segment of a row of a batch, as bytes without ends."""
    here = batch.target_segments[row] == segment
    if batch.inputs is None:
        read = batch.targets[row][here & batch.prefix[row]]
    else:
        read = batch.inputs[row][batch.input_segments[row] == segment]
    written = batch.targets[row][here & (batch.loss_weights[row] > 0)]
    return tuple(bytes(int(t) - 3 for t in ids if t >= 3) for ids in (read, written))


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("pack", [True, False])
def test_both_texts_of_a_pair_stand_side_by_side(described, tmp_path, layout, pack):
    batches = open_pairs(described, tmp_path, layout, pack=pack)
    numbers, most = [], 0
    for step in range(20):
        batch = batches.at(step)
        for row in range(4):
            count = int(batch.target_segments[row].max())
            assert count % 2 == 0
            most = max(most, count)
            for pair in range(count // 2):
                (prompt, chosen), (again, rejected) = (
                    texts_of(batch, row, 2 * pair + which) for which in (1, 2)
                )
                assert prompt == again and chosen == prompt + prompt
                assert rejected == prompt[-1:] + b"!"
                scores = batch.teacher_data.scores[row, 2 * pair : 2 * pair + 2]
                assert scores[0] - scores[1] == 0.5
                # The number of the record, which the reference's score is of.
                number = int(-scores[0])
                assert prompt == (chr(97 + number % 26) * (1 + number % 7)).encode()
                numbers.append(number)
    assert most == 2 if not pack else most > 2
    assert set(numbers) == set(range(COUNT))


def test_evaluation_reads_the_chosen_texts_alone(described, tmp_path):
    batches = open_pairs(described, tmp_path, "encoder_decoder", "validation")
    assert batches.statistics.examples == COUNT
    chosen = [
        texts_of(batch, row, segment)
        for batch in batches.evaluation()
        for row in range(4)
        for segment in range(1, int(batch.target_segments[row].max()) + 1)
    ]
    assert len(chosen) == COUNT and all(text == prompt + prompt for prompt, text in chosen)
    assert all(each.teacher_data is None for each in batches.evaluation())


def test_other_scores_of_the_same_texts_are_other_data(described, tmp_path):
    before = open_pairs(described, tmp_path, "encoder_decoder").state()
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text().replace("-0.5", "-0.75"))
    with pytest.raises(ValueError, match="have changed since"):
        open_pairs(described, tmp_path, "encoder_decoder").restore(before)


@pytest.mark.parametrize("value", ["1.5", "null", '"x"', "NaN", "true"])
def test_a_score_that_is_no_log_probability_is_named(described, tmp_path, value):
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text().replace('"b": -0.5', f'"b": {value}'))
    with pytest.raises(ValueError, match="train.jsonl, line 1: field 'b' is .*log-probability"):
        next(files.read_reference(described))


def test_scores_are_in_the_order_of_the_examples(described):
    expected = [[-number, -number - 0.5] for number in range(COUNT)]
    np.testing.assert_array_equal([*files.read_reference(described)], expected)
