"""The index of a product's non-zeros: order, places, empty and full rows, memory that stays where it is."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain import sparse_index
from edgetrain.errors import UsageError
from edgetrain.sparse_index import SparseIndex

SHAPES = {
    "conv": ((5, 3, 3, 2), False),
    "signal": ((4, 2, 3), False),
    "depthwise": ((6, 1, 3, 3), False),
    "outputs-first": ((4, 7), False),
    "inputs-first": ((7, 4), True),
}


def random_mask(shape, density=0.3):
    return np.random.default_rng(3).random(shape) < density


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "master"])
@pytest.mark.parametrize("name", SHAPES)
def test_entries_are_the_mask_row_by_row(name, compact):
    shape, inputs_first = SHAPES[name]
    mask = random_mask(shape)
    index = SparseIndex(shape, inputs_first=inputs_first, compact=compact)
    index.set(mask)
    dense = np.arange(mask.size, dtype=np.float32).reshape(shape)
    rows = (dense.T if inputs_first else dense).reshape(index.rows, -1)
    wanted = [
        int(rows[r, c]) for r in range(index.rows) for c in range(index.row_size) if mask.reshape(-1)[int(rows[r, c])]
    ]
    assert index.positions().tolist() == wanted
    assert index.places[: index.count].tolist() == (list(range(index.count)) if compact else wanted)
    assert index.values_of(dense).tolist() == wanted
    np.testing.assert_array_equal(index.mask(), mask)
    np.testing.assert_array_equal(index.dense(index.values_of(dense)), np.where(mask, dense, 0))
    assert index.density == mask.mean() and index.count == mask.sum()


@pytest.mark.parametrize("inputs_first", [False, True])
def test_empty_and_full_rows(inputs_first):
    mask = np.array([[0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0]], bool)
    index = SparseIndex(mask.T.shape if inputs_first else mask.shape, inputs_first=inputs_first)
    index.set(mask.T if inputs_first else mask)
    assert index.starts.tolist() == [0, 0, 3, 4, 4]
    assert index.columns[:4].tolist() == [0, 1, 2, 1]


def test_a_new_topology_is_written_into_the_same_memory():
    index = SparseIndex((4, 3, 2, 2), capacity=20, compact=False)
    index.set(random_mask(index.shape))
    before = [array.ctypes.data for array in (index.starts, index.columns, index.places)]
    index.set(np.zeros(index.shape, bool))
    assert before == [array.ctypes.data for array in (index.starts, index.columns, index.places)]
    assert index.count == 0 and not index.columns.any() and not index.places.any()


@pytest.mark.parametrize(("shape", "capacity"), [((4,), 2), ((2, 3), 7), ((2, 3), -1)])
def test_sizes_that_make_no_sense(shape, capacity):
    with pytest.raises(UsageError, match="expected"):
        SparseIndex(shape, capacity)


def test_masks_that_do_not_fit():
    index = SparseIndex((2, 3), capacity=2)
    with pytest.raises(UsageError, match="3 weights given, there is room for 2"):
        index.set([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(UsageError, match=r"a mask of shape \(3, 2\), expected \(2, 3\)"):
        index.set(np.zeros((3, 2)))


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "master"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_entries_by_input_channel_are_the_same_ones(groups, compact):
    mask = random_mask((6, 6 // groups, 3, 1), 0.5)
    index = SparseIndex(mask.shape, groups=groups, compact=compact)
    index.set(mask)
    values = {int(p): i for i, p in enumerate(index.places[: index.count])}
    owners, outputs = np.repeat(np.arange(index.rows), np.diff(index.starts)), index.rows // groups
    found = []
    for channel in range(index.input_rows):
        for i in range(index.input_starts[channel], index.input_starts[channel + 1]):
            output, tap = divmod(int(index.input_columns[i]), index.taps)
            entry = values[int(index.input_places[i])]
            group, local = divmod(channel, index.row_size // index.taps)
            assert owners[entry] == group * outputs + output
            assert index.columns[entry] == local * index.taps + tap
            found.append((channel, output, tap))
    assert len(found) == index.count and found == sorted(found)


def test_groups_must_divide_the_output_channels():
    with pytest.raises(UsageError, match="groups=4"):
        SparseIndex((6, 1, 3, 3), groups=4)


@pytest.mark.parametrize("below", [1, 400, 1 << 16, (1 << 16) + 1, 200_000])
def test_numbers_are_sorted_and_equal_ones_stay_in_order(below):
    numbers = np.random.default_rng(0).integers(0, below, 3000)
    numbers[::7] = below - 1
    np.testing.assert_array_equal(sparse_index._order(numbers, below), np.argsort(numbers, kind="stable"))
