"""Vectors of neighbouring pixels, where samples fill a part of the widest: element-wise kernels and normalisations."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain import lowering_core, reference
from edgetrain.arrays import Layout, aligned
from edgetrain.kernels.codes import RECORD, THRESHOLD
from edgetrain.lowering_core import row_lanes
from tests.engine import assert_all_close, assert_close, learner, poison, wide_host
from tests.op_cases import Net
from tests.test_pruning import run_kernel

TOLERANCE = 1e-5
NORMALISATIONS = {"batch_norm", "batch_norm_gradient", "batch_norm_inference", "residual_norm_gradient"}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decide as on a machine with vectors of 16."""
    monkeypatch.setattr(lowering_core, "simd_lanes", lambda: 16)


@pytest.mark.parametrize(
    ("lanes", "rows", "columns", "words", "wanted"),
    [
        (4, 5, 8, None, 16), (4, 5, 6, None, 8), (4, 5, 7, None, 4), (1, 1, 1, None, 1), (16, 3, 3, None, 16),
        (8, 4, 2, None, 16), (8, 4, 3, None, 8), (4, 32, 32, 32, 16), (4, 14, 14, 7, 4), (4, 8, 8, 2, 8),
        (4, 14, 14, 8, 8),
    ],
)  # fmt: skip
def test_rows_are_whole_numbers_of_vectors_and_bits_have_room(wide, lanes, rows, columns, words, wanted):
    found = row_lanes(Layout(2, lanes, 3, rows, columns), words)
    assert found == wanted
    if words is not None:
        assert -(-rows * columns * lanes // (32 * found)) * found <= words * lanes


@pytest.mark.parametrize(("lanes", "width"), [(1, 1), (1, 4), (4, 4), (4, 8), (4, 16)])
@pytest.mark.parametrize(("parts", "row_chunk"), [(1, 9), (3, 3), (4, 2)])
def test_copies_count_what_they_keep(lanes, width, parts, row_chunk):
    """Planes of 6 rows of 4 pixels, with zeros around them; of 4 samples the last does not exist."""
    rng, rows, columns, planes = np.random.default_rng(0), 6, 4, 3
    top, left, bottom, right = 1, 2, 1 if parts == 4 else 2, 1
    x = aligned(planes * rows * columns * lanes).reshape(planes, rows, columns, lanes)
    x[...] = rng.normal(size=x.shape)
    whole = aligned(planes * (top + rows + bottom) * (left + columns + right) * lanes)
    whole[:] = np.nan
    y = whole.reshape(planes, top + rows + bottom, left + columns + right, lanes)
    mask, record, counts = aligned(lanes), aligned(RECORD), aligned(planes * parts, np.int64)
    mask[:], record[THRESHOLD] = (1, 1, 1, 0)[:lanes], 0.7
    place = {f"y_{part}": size for part, size in zip(("block", "channel", "row"), (0, *y.strides[:2]), strict=True)}
    run_kernel("copy_elements", (lanes, width), planes * parts, x=x, y=y[0, top, left], counts=counts, record=record,
               mask=mask, mask_block=0, mask_channel=0, channels=planes, rows=rows, columns=columns, x_block=0,
               x_channel=x.strides[0], x_row=x.strides[1], **place, top=top, left=left, bottom=bottom, right=right,
               row_chunk=row_chunk, parts=parts)  # fmt: skip
    wanted = np.zeros_like(y)
    wanted[:, top : top + rows, left : left + columns] = np.where(np.abs(x) >= np.float32(0.7), x, 0)
    np.testing.assert_array_equal(y, wanted)
    kept = (np.abs(x[..., :3]) >= np.float32(0.7)).sum((1, 2, 3))
    np.testing.assert_array_equal(counts.reshape(planes, parts).sum(1), kept)


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("size", [(4, 8), (5, 6), (3, 7)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.usefixtures(wide_host.__name__)
def test_normalisations_of_few_samples_agree_with_their_twins(lanes, size, padded):
    net, pads = Net((3, *size)), (1,) * 4 if padded else (0,) * 4
    x = net.conv("input", 5, 3, 3, 3, pads=(1,) * 4, bias=False)
    inner = net.Relu(net.norm(net.conv(net.Relu(net.norm(x)), 5, 5, 3, 3, pads=(1,) * 4, bias=False)))
    joined = net.Relu(net.Add(net.norm(net.conv(inner, 5, 5, 3, 3, pads=(1,) * 4, bias=False)), x))
    y = net.GlobalAveragePool(net.Tanh(net.conv(joined, 4, 5, 3, 3, pads=pads)))
    net.graph.set_outputs([net.Flatten(y)])
    made = learner(net.graph, lanes, 2)
    widest = row_lanes(Layout(1, lanes, 1, *size))
    found = {row.kernel for row in made.plans.plan(True, lanes).rows if row.kernel[0] in NORMALISATIONS}
    assert {key[1][:2] for key in found} == {(lanes, widest)}
    rng = np.random.default_rng(1)
    for count in (lanes, lanes - 1, 2):
        images, labels = rng.normal(size=(count, 3, *size)).astype(np.float32), rng.integers(0, 4, count)
        loss, wanted = reference.gradients(net.graph, images, labels)
        poison(made)
        assert_all_close(made.gradients(images, labels), wanted, TOLERANCE)
        assert_close(np.float64(made.partial_fit(images, labels).loss), loss, TOLERANCE)
        for name, array in made.parameters().items():
            net.graph.arrays[name][...] = array
