"""Folders of images, one sub-folder per class. The only file that needs Pillow, and only when called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.checks import paths_in, whole_number
from edgetrain.data.dataset import Dataset
from edgetrain.errors import DataError, UsageError

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pbm", ".pgm", ".ppm", ".webp", ".tif", ".tiff"))
_GREY_MODES = frozenset(("1", "L", "LA", "La"))
_COLOUR_MODES = frozenset(("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"))



@dataclass(frozen=True)
class _Header:
    size: tuple[int, int]  # (H, W)
    grey: bool


def load_folder(
    path: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    class_names: Sequence[str] | None = None,
    allow_missing_classes: bool = False,
) -> Dataset:
    """Read a folder with one sub-folder of images per class, in sorted order.

    Pixels are taken as stored: EXIF orientation is ignored and transparency dropped. Files without an image
    suffix and names that begin with a full stop are passed over.

    Args:
        path: the folder; its sub-folders, sorted, are the classes.
        image_size: (H, W) in pixels to resize to (bilinear, antialiased); default: all images must agree.
        channels: 1 grey or 3 colour; default: 3 if any image has colour, else 1.
        class_names: the classes to expect, in order; default: the sub-folders.
        allow_missing_classes: accept expected classes without a sub-folder.

    Returns:
        A Dataset with uint8 images of shape (N, channels, H, W).

    Raises:
        DataError: no sub-folder, one without images, an unexpected class, a damaged image, mixed sizes.
        UsageError: a bad argument, or Pillow is not installed.
    """
    path, pillow = Path(path), _pillow()
    _check_options(image_size, channels)
    folders = _expected_folders(path, class_names)
    names = tuple(class_names) if class_names is not None else tuple(folders)
    label_of = {name: label for label, name in enumerate(names)}
    files = [(file, label_of[name]) for name, folder in folders.items() for file in image_files(folder)]
    headers = {file: _header(file, pillow) for file, _ in files}
    height, width = image_size or _common_size(headers)
    depth = channels or (1 if all(header.grey for header in headers.values()) else 3)
    images = np.empty((len(files), depth, height, width), np.uint8)
    for index, (file, _) in enumerate(files):
        images[index] = _decoded(file, pillow, (height, width), depth)
    labels = np.array([label for _, label in files], np.int64)
    return Dataset(images, labels, names, path.name, allow_missing_classes)


def class_folders(path: Path) -> dict[str, Path]:
    """Return the visible sub-folders of a folder by name, sorted."""
    visible = (entry for entry in paths_in(path) if entry.is_dir() and not entry.name.startswith("."))
    return {folder.name: folder for folder in sorted(visible)}


def matched_classes(path: Path, known: Sequence[str] | None) -> tuple[str, ...]:
    """Return the classes of a folder: those a network knows, if its sub-folders have such names, else the sub-folders.

    Args:
        path: of class folders.
        known: the network's classes, in the order of its outputs; ``None`` without a network.
    """
    own = tuple(class_folders(path))
    return tuple(known) if known and set(own) <= set(known) else own


def image_files(folder: Path) -> list[Path]:
    """Return the visible files with an image suffix directly in a folder, sorted."""
    return sorted(
        file
        for file in paths_in(folder)
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def common_channels(path: Path) -> int:
    """Return 3 if any image in the class folders has colour, else 1; stops at the first one that has.

    Raises:
        DataError: an image is damaged.
        UsageError: Pillow is not installed.
    """
    pillow = _pillow()
    files = (file for folder in class_folders(path).values() for file in image_files(folder))
    return 1 if all(_header(file, pillow).grey for file in files) else 3


def read_image(file: Path, size: tuple[int, int] | None, channels: int | None) -> NDArray[np.uint8]:
    """Return one image as uint8 ``(channels, H, W)``, resized to ``size`` (H, W) if that is not its own.

    Args:
        file: the image.
        size: (H, W) in pixels; ``None``: its own.
        channels: 1 or 3; ``None``: 1 if it is grey.

    Raises:
        DataError: the image is damaged.
        UsageError: Pillow is not installed.
    """
    pillow = _pillow()
    header = _header(file, pillow)
    return _decoded(file, pillow, size or header.size, channels or (1 if header.grey else 3))


def _pillow() -> ModuleType:
    try:
        import PIL.Image  # here: Pillow is an extra that only this reader needs
    except ImportError:
        raise UsageError(
            "folders of images need Pillow, which is not installed; use pip install edgetrain[images]"
        ) from None
    return PIL.Image


def _check_options(image_size: tuple[int, int] | None, channels: int | None) -> None:
    if channels not in (None, 1, 3):
        raise UsageError(f"channels is {channels!r}, expected 1 (grey) or 3 (colour)")
    if image_size is None:
        return
    if not isinstance(image_size, tuple) or len(image_size) != 2:
        raise UsageError(f"image_size is {image_size!r}, expected a pair (height, width) in pixels")
    for side, what in zip(image_size, ("height", "width"), strict=True):
        whole_number(side, f"{what} in image_size", 1)


def _expected_folders(path: Path, class_names: Sequence[str] | None) -> dict[str, Path]:
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; check the path")
    folders = class_folders(path)
    if not folders:
        raise DataError(f"{path}: no sub-folder, expected one sub-folder of images per class")
    for name, folder in folders.items():
        if class_names is not None and name not in class_names:
            raise DataError(f"{folder}: class {name!r} is none of {', '.join(class_names)}; remove or rename it")
        if not image_files(folder):
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"{folder}: no image, expected files in {suffixes}; fill or remove the folder")
    return folders


def _header(file: Path, pillow: ModuleType) -> _Header:
    # Opening reads the header alone, so sizes are compared before anything is decoded or allocated.
    with _decoding(file), pillow.open(file) as image:
        (width, height), mode = image.size, image.mode
    if mode not in _GREY_MODES | _COLOUR_MODES:
        raise DataError(f"{file}: pixels of mode {mode!r}, expected 8 bits per channel; convert the image")
    return _Header((height, width), mode in _GREY_MODES)


def _common_size(headers: dict[Path, _Header]) -> tuple[int, int]:
    (first, header), *others = headers.items()
    for file, other in others:
        if other.size != header.size:
            raise DataError(
                f"images differ in size (height, width): {first} has {header.size}, {file} has {other.size};"
                " expected one size, pass image_size=(height, width) (--image-size HEIGHTxWIDTH) to resize"
            )
    return header.size


def _decoded(file: Path, pillow: ModuleType, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    height, width = size
    with _decoding(file), pillow.open(file) as image:
        pixels = image.convert("L" if channels == 1 else "RGB")
        if pixels.size != (width, height):
            pixels = pixels.resize((width, height), pillow.Resampling.BILINEAR)
    return np.asarray(pixels, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)


@contextmanager
def _decoding(file: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise anything, TypeError for one
        message = f"{file}: cannot be decoded ({error}), expected a whole image; replace or remove it"
        raise DataError(message) from error
