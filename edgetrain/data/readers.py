"""The one door to all data: a name or a path in, a Dataset out. The table of formats is at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetrain.data.checks import missing_split
from edgetrain.data.cifar import cifar_splits, load_cifar
from edgetrain.data.dataset import Dataset
from edgetrain.data.embedded import EMBEDDED_NAMES, EMBEDDED_SPLITS, load_embedded
from edgetrain.data.folder import class_folders, common_channels, load_folder, matched_classes
from edgetrain.data.idx import idx_pairs, load_idx_folder
from edgetrain.data.npz import load_npz, npz_splits
from edgetrain.errors import DataError, UsageError


@dataclass(frozen=True)
class _Options:
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def known(self) -> bool:
        """Whether a network knows the classes, so that data may lack some."""
        return self.class_names is not None


@dataclass(frozen=True)
class _Format:
    description: str
    splits: Callable[[Path], tuple[str, ...]]  # empty: not this format
    load: Callable[[Path, str, _Options], Dataset]
    has_image_options: bool = False


NO_SOURCE = "expected 'embedded', a folder or a file; the current folder is '.'"


def load_dataset(
    source: str | Path,
    *,
    split: str = "train",
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Read one split of a data set, whatever its format.

    Args:
        source: "embedded" (or "fashion-mnist-subset"), or a path: a folder with MNIST's IDX files, a folder
            or file of the binary CIFAR version, a .npz file, a folder with sub-folders ``train``, ``test`` and
            ``validation`` (one or more) of classes, or a folder with one sub-folder of images per class.
        split: one of ``available_splits(source)``.
        image_size: (H, W) in pixels to resize to; folders of images only.
        channels: 1 or 3; folders of images only.
        class_names: of a network that the data are for. They may lack some of its classes then, and sub-folders that
            are named after them have their labels.

    Raises:
        DataError: unknown format or split, or bad content.
        UsageError: a bad option, an option that the format does not have, or Pillow is not installed.

    Example:
        >>> load_dataset("embedded", split="test").input_shape
        (1, 28, 28)
    """
    options = _Options(image_size, channels, None if class_names is None else tuple(class_names))
    if source in EMBEDDED_NAMES:
        _refuse_options(str(source), options)
        return load_embedded(split)
    path = _path_of(source)
    found, splits = _recognised(path)
    if not found.has_image_options:
        _refuse_options(str(path), options)
    if split not in splits:
        raise _only_train(path, split) if splits == ("train",) else missing_split(path, split, splits)
    return found.load(path, split, options)


def available_splits(source: str | Path) -> tuple[str, ...]:
    """Return the names that ``load_dataset`` accepts as ``split`` for this source.

    Raises:
        DataError: the source is missing or of no known format.
        UsageError: it is empty.

    Example:
        >>> available_splits("embedded")
        ('train', 'test')
    """
    return EMBEDDED_SPLITS if source in EMBEDDED_NAMES else _recognised(_path_of(source))[1]


def is_image_folder(path: Path) -> bool:
    """Return whether a source is a folder of image files, by class and perhaps by split.

    Raises:
        DataError: the source is missing or of no known format.
    """
    return _recognised(path)[0].has_image_options


def _path_of(source: str | Path) -> Path:
    if not str(source):  # as of a variable of the shell that is not set: the current folder would be taken
        raise UsageError(f"the data source is ''; {NO_SOURCE}")
    return Path(source)


def _recognised(path: Path) -> tuple[_Format, tuple[str, ...]]:
    for candidate in _FORMATS:
        splits = candidate.splits(path)
        if splits:
            return candidate, splits
    what = "no data set in a known format" if path.exists() else "no such file or folder"
    known = "; ".join(candidate.description for candidate in _FORMATS)
    raise DataError(f"{path}: {what}, expected one of: 'embedded'; {known}")


def _refuse_options(source: str, options: _Options) -> None:
    if (options.image_size, options.channels) != (None, None):
        raise UsageError(f"{source}: image_size and channels are for folders of images; leave them out")


def _only_train(path: Path, split: str) -> DataError:
    return DataError(
        f"{path}: no split {split!r}, this source has only 'train'; cut off a part with"
        " load_dataset(...).split(0.9, seed=0), or add a test split to the source"
    )


def _idx_splits(path: Path) -> tuple[str, ...]:
    return tuple(idx_pairs(path)) if path.is_dir() else ()


def _cifar_splits(path: Path) -> tuple[str, ...]:
    if path.is_file():
        return (("test",) if path.stem.startswith("test") else ("train",)) if path.suffix == ".bin" else ()
    return cifar_splits(path)


def _load_cifar(path: Path, split: str, options: _Options) -> Dataset:
    return load_cifar(path, train=split == "train", allow_missing_classes=options.known)


def _npz_splits(path: Path) -> tuple[str, ...]:
    return npz_splits(path) if path.suffix == ".npz" and path.is_file() else ()


def _split_folder_splits(path: Path) -> tuple[str, ...]:
    # A class may be called "train", so the name counts only when it holds sub-folders itself.
    if not path.is_dir():
        return ()
    found = [split for split in ("train", "validation", "test") if (path / split).is_dir()]
    return tuple(split for split in found if class_folders(path / split))


def _load_split_folder(path: Path, split: str, options: _Options) -> Dataset:
    if split == "train" or "train" not in _split_folder_splits(path):
        return _load_class_folder(path / split, split, options)
    # The training split decides on classes and channels: a test split may lack a class, or all colour.
    return load_folder(
        path / split,
        image_size=options.image_size,
        channels=options.channels or common_channels(path / "train"),
        class_names=matched_classes(path / "train", options.class_names),
        allow_missing_classes=True,
    )


def _class_folder_splits(path: Path) -> tuple[str, ...]:
    return ("train",) if path.is_dir() and class_folders(path) else ()


def _load_class_folder(path: Path, _: str, options: _Options) -> Dataset:
    return load_folder(
        path, image_size=options.image_size, channels=options.channels,
        class_names=matched_classes(path, options.class_names), allow_missing_classes=options.known,
    )  # fmt: skip


# Tried in this order: any folder with sub-folders would pass for a class folder, so that comes last.
_FORMATS = (
    _Format(
        "a folder with IDX files such as train-images-idx3-ubyte.gz",
        _idx_splits,
        lambda path, split, options: load_idx_folder(path, split, options.known),
    ),
    _Format("a folder or .bin file of the binary CIFAR version", _cifar_splits, _load_cifar),
    _Format(
        "a .npz file with arrays x and y",
        _npz_splits,
        lambda path, split, options: load_npz(path, split, allow_missing_classes=options.known),
    ),
    _Format(
        "a folder with sub-folders train and test, each with one sub-folder per class",
        _split_folder_splits,
        _load_split_folder,
        has_image_options=True,
    ),
    _Format(
        "a folder with one sub-folder of images per class",
        _class_folder_splits,
        _load_class_folder,
        has_image_options=True,
    ),
)
