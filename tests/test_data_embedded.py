"""The embedded data set: sizes, balance, licence, checksum, and the script that makes it."""

from __future__ import annotations

import importlib.util
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetrain.data import available_splits, embedded, load_dataset, load_embedded
from edgetrain.errors import DataError

SHIPPED = resources.files("edgetrain.data") / "fashion_mnist_subset"


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
@pytest.mark.parametrize("name", ["embedded", "fashion-mnist-subset"])
def test_embedded_set_is_balanced(name: str, split: str, per_class: int) -> None:
    data = load_dataset(name, split=split)
    assert data.input_shape == (1, 28, 28)
    assert data.images.dtype == np.uint8
    assert np.bincount(data.labels).tolist() == [per_class] * 10
    assert (data.class_names[9], data.name) == ("Ankle boot", "fashion-mnist-subset")


def test_embedded_splits_do_not_overlap() -> None:
    train, test = ({image.tobytes() for image in load_embedded(split).images} for split in ("train", "test"))
    assert len(train) > 9900
    assert len(train & test) == 0


def test_embedded_files_are_small_and_licensed() -> None:
    sizes = {file.name: len(file.read_bytes()) for file in SHIPPED.iterdir()}
    assert set(sizes) == {"LICENSE.txt", "about.json", "train.npz", "test.npz"}
    assert sum(sizes.values()) <= 6_000_000
    assert "Zalando SE" in SHIPPED.joinpath("LICENSE.txt").read_text()


def test_embedded_splits() -> None:
    assert available_splits("embedded") == ("train", "test")
    with pytest.raises(DataError, match="embedded: no split 'dev'; splits found here: 'train', 'test'"):
        load_dataset("embedded", split="dev")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ({"train.npz": b"short"}, r"train\.npz: sha256 is .*, expected .*; .*install edgetrain again"),
        ({"about.json": b"{"}, r"about\.json: damaged .*install edgetrain again"),
        ({"train.npz": None}, r"train\.npz: missing or unreadable \(No such file or directory\)"),
    ],
    ids=["data", "description", "absent"],
)
def test_damaged_embedded_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: dict[str, bytes | None], match: str
) -> None:
    target = tmp_path / "fashion_mnist_subset"
    target.mkdir()
    for file in SHIPPED.iterdir():
        content = damage.get(file.name, file.read_bytes())
        if content is not None:
            (target / file.name).write_bytes(content)
    monkeypatch.setattr(embedded.resources, "files", lambda _: tmp_path)
    with pytest.raises(DataError, match=match):
        load_embedded()


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "make_embedded_dataset.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("make_embedded_dataset", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PER_CLASS", {"train": 2, "test": 1})
    return module


def idx_bytes(values: NDArray[np.uint8]) -> bytes:
    header = [0x800 + values.ndim, *values.shape]
    return b"".join(number.to_bytes(4, "big") for number in header) + values.tobytes()


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    """Fifty images of 28 x 28, image i filled with i, class i modulo ten; test and training alike."""
    images = np.broadcast_to(np.arange(50, dtype=np.uint8)[:, None, None], (50, 28, 28))
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx_bytes(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
            idx_bytes(np.arange(50, dtype=np.uint8) % 10)
        )
    return tmp_path


def test_script_takes_the_first_of_every_class(script: Any, originals: Path) -> None:
    x, y = script.chosen(originals, "train")
    assert x[:, 0, 0].tolist() == list(range(20))
    assert y.tolist() == [*range(10)] * 2


def test_script_writes_the_same_bytes_twice(script: Any, originals: Path, tmp_path: Path) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    for target in (once, again):
        target.mkdir()
        script.write(originals, target)
    assert [file.read_bytes() for file in sorted(once.iterdir())] == [
        file.read_bytes() for file in sorted(again.iterdir())
    ]
    assert script.same(originals, once)
    np.savez(once / "test.npz", x=np.zeros((10, 28, 28), np.uint8), y=np.arange(10, dtype=np.uint8))
    assert not script.same(originals, once)
