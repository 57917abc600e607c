"""Make the embedded Fashion-MNIST subset from the original files.

Takes the first 1,000 training and the first 200 test images of every class, in file order: the originals
are already shuffled, and unlike a random choice this one cannot change with the version of NumPy. The same
zlib gives the same bytes; another one may pack differently, so ``--check`` compares the arrays.

    apt-get install dataset-fashion-mnist
    python benchmarks/make_embedded_dataset.py            # writes into edgetrain/data/fashion_mnist_subset
    python benchmarks/make_embedded_dataset.py --check    # compares with what is there
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from edgetrain.data import load_idx  # noqa: E402  (runs from a checkout that is not installed)

TARGET = ROOT / "edgetrain" / "data" / "fashion_mnist_subset"
PACKAGE = "dataset-fashion-mnist"
PER_CLASS = {"train": 1000, "test": 200}
PREFIX = {"train": "train", "test": "t10k"}
CLASS_NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def packaged_folder() -> Path:
    """Return the folder with the original files, as the Debian package manager tells it."""
    listing = subprocess.run(["dpkg", "-L", PACKAGE], capture_output=True, text=True, check=True).stdout
    return next(Path(line).parent for line in listing.splitlines() if "train-images-idx3" in line)


def chosen(source: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images (N, 28, 28) and labels (N,) of one split, both uint8, in the order of the source."""
    names = (f"{PREFIX[split]}-images-idx3-ubyte.gz", f"{PREFIX[split]}-labels-idx1-ubyte.gz")
    full = load_idx(source / names[0], source / names[1], class_names=CLASS_NAMES)
    firsts = [np.flatnonzero(full.labels == label)[: PER_CLASS[split]] for label in range(len(CLASS_NAMES))]
    indices = np.sort(np.concatenate(firsts))
    return full.images[indices, 0].astype(np.uint8), full.labels[indices].astype(np.uint8)


def write(source: Path, target: Path) -> None:
    """Write train.npz, test.npz and about.json into ``target``."""
    digests = {}
    for split in PER_CLASS:
        x, y = chosen(source, split)
        file = target / f"{split}.npz"
        np.savez_compressed(file, x=x, y=y)
        digests[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        print(f"{file.name}: {len(x)} images, {file.stat().st_size} bytes")
    about = {
        "name": "fashion-mnist-subset",
        "source": "https://github.com/zalandoresearch/fashion-mnist",
        "selection": "the first 1,000 training and the first 200 test images of every class, in file order",
        "license": "MIT, see LICENSE.txt",
        "class_names": CLASS_NAMES,
        "sha256": digests,
    }
    (target / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def same(source: Path, target: Path) -> bool:
    """Return whether the files in ``target`` hold the arrays that ``source`` gives."""
    for split in PER_CLASS:
        with np.load(target / f"{split}.npz", allow_pickle=False) as stored:
            pairs = zip(chosen(source, split), (stored["x"], stored["y"]), strict=True)
            if not all(np.array_equal(fresh, old) for fresh, old in pairs):
                return False
    return True


def main() -> int:
    """Write or check the data set; exit status 1 when a check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--source", type=Path, help=f"folder with the originals (default: package {PACKAGE})")
    parser.add_argument("--target", type=Path, default=TARGET, help="folder to write to")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    source = arguments.source or packaged_folder()
    if not arguments.check:
        arguments.target.mkdir(parents=True, exist_ok=True)
        write(source, arguments.target)
        return 0
    agrees = same(source, arguments.target)
    print("the arrays agree" if agrees else "the arrays differ")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
