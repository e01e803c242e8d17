# SPDX-License-Identifier: Apache-2.0
"""Laws of the table's lines: every layout can be read and written, and nothing else is done."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.checkpoints import transforms
from t5x_lite.checkpoints.transforms import Entry

NAMES = ["embed", "heads", "head_dim", "mlp"]


@st.composite
def layouts(draw):
    """Axes of ours, an entry that lies in some other order and grouping, and the sizes."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    sizes = {name: draw(st.integers(1, 4)) for name in names}
    paired = "head_dim" in names and draw(st.booleans())
    if paired:
        sizes["head_dim"] *= 2
    order = draw(st.permutations(names))
    part = draw(st.one_of(st.none(), st.integers(0, 2)))
    if part is not None:
        order.insert(draw(st.integers(0, len(order))), "parts")
        sizes["parts"] = 3
    groups, rest = [], order
    while rest:
        count = draw(st.integers(1, len(rest)))
        group, rest = rest[:count], rest[count:]
        groups.append(f"({' '.join(group)})" if count > 1 else group[0])
    return " ".join(names), Entry("ours", "theirs", " ".join(groups), part, paired), sizes


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_writing_and_reading_give_the_same_bits_and_touch_no_others(layout):
    ours, entry, sizes = layout
    shape = tuple(sizes[name] for name in ours.split())
    values = np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(shape)
    theirs = np.zeros(transforms.grouped_shape(entry.axes, sizes), np.float32)
    transforms.write_weight(theirs, entry, ours, sizes, values)
    np.testing.assert_array_equal(transforms.read_weight(theirs, entry, ours, sizes), values)
    assert sorted(theirs[theirs > 0]) == sorted(values.reshape(-1))
    assert transforms.describe_transform(entry, ours)


def test_a_linear_weight_of_hugging_face_is_transposed_and_split():
    entry = Entry("query", "q_proj.weight", "(heads head_dim) embed")
    sizes = {"heads": 2, "head_dim": 3, "embed": 4}
    theirs = np.arange(24).reshape(6, 4)
    ours = transforms.read_weight(theirs, entry, "embed heads head_dim", sizes)
    np.testing.assert_array_equal(ours, theirs.T.reshape(4, 2, 3))


def test_parts_lie_side_by_side():
    sizes = {"embed": 2, "heads": 1, "head_dim": 3, "parts": 3}
    theirs = np.arange(18).reshape(2, 9)
    for part in range(3):
        entry = Entry("key", "c_attn.weight", "embed (parts heads head_dim)", part)
        ours = transforms.read_weight(theirs, entry, "embed heads head_dim", sizes)
        np.testing.assert_array_equal(ours[:, 0], theirs[:, 3 * part : 3 * part + 3])


def test_paired_halves_are_taken_apart():
    # As llama.cpp's converter puts a head's rows: 0, half, 1, half + 1 ...
    entry = Entry("query", "attn_q.weight", "(heads head_dim) embed", paired=True)
    sizes = {"heads": 1, "head_dim": 6, "embed": 1}
    ours = transforms.read_weight(
        np.array([0, 3, 1, 4, 2, 5]).reshape(6, 1), entry, "embed heads head_dim", sizes
    )
    np.testing.assert_array_equal(ours.reshape(-1), np.arange(6))


@pytest.mark.parametrize("axes", ["(heads head_dim embed", "heads) embed", "embed embed"])
def test_axes_that_make_no_sense_are_refused(axes):
    with pytest.raises(ValueError, match="axes"):
        transforms.axis_groups(axes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(300, 129), (1, 500), (257, 3, 130), (3, 131, 200)])
def test_copying_in_tiles_is_copying(shape, dtype):
    source = (np.arange(math.prod(shape)) % 999).reshape(shape[::-1]).astype(dtype).transpose()
    contiguous = transforms.to_contiguous(source)
    assert contiguous.flags.c_contiguous
    np.testing.assert_array_equal(contiguous, source)
    back = np.zeros(shape[::-1], dtype)
    transforms.copy_array(back.transpose(), contiguous)
    np.testing.assert_array_equal(back.transpose(), source)
    merged = np.zeros((shape[0], math.prod(shape[1:])), dtype)
    transforms.copy_array(merged.T, np.ascontiguousarray(source.reshape(shape[0], -1).T))
    np.testing.assert_array_equal(merged, source.reshape(shape[0], -1))
