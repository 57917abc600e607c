"""Labelled instances in order, once, block by block: memory does not grow with the length of the stream.

A source is a ``.npz`` file (read piece by piece, compressed or not), a folder of images (in the order of the file
names, whatever the class), standard input, or any other data set of ``load_dataset`` (held in memory).

Standard input is JSON lines, one instance per line, with its label ``y`` (a number, or the name of a class) and one of

- ``"pixels"``: whole numbers 0 to 255, scaled to [0, 1] as images are,
- ``"x"``: numbers that are taken as they are,
- ``"image"``: the path of an image file,

flat or nested in the order channel, row, column: ``{"pixels": [0, 17, 255], "y": 3}``. Empty lines are passed over.

A pipe that is faster than the learner gives full blocks. Of a slower one, what has come is handed on as a smaller block
when nothing came for a second, or for a fifth of one while a checkpoint is due: learned from, shown and saved.

A filter looks at a block together, so its decisions depend on where blocks end. Of a file or a folder that is where
they always end, also when a run is stopped or killed and resumed; a block ends elsewhere where a pipe pauses or is
stopped, in front of a bad instance, and where a file ended that has grown since.

Nobody can give the lines of a pipe again, so a stream that is stopped, or that meets a bad line, ends behind a whole
line, after every line that has been read: who goes on with the same pipe loses none but the bad ones. Lost are

- when the process is killed, all that came since the last checkpoint;
- when a training step fails, its batch and up to 64 KiB that were read ahead;
- a begun line when its writer ends or waits for two seconds before its end: what comes then begins with a part of one.
"""

from __future__ import annotations

import json
import math
import os
import select
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.checks import naming
from edgetrain.data.convert import images_from, labels_from
from edgetrain.data.dataset import Dataset, check_class_names, check_labels
from edgetrain.data.folder import class_folders, image_files, matched_classes, read_image
from edgetrain.data.images import check_images
from edgetrain.data.npz import DAMAGED, opened, read_npz, split_keys, stored_class_names
from edgetrain.data.readers import available_splits, is_image_folder, load_dataset
from edgetrain.errors import DataError, EdgetrainError, UsageError

STANDARD_INPUT = "-"
Block = tuple[NDArray[np.float32], NDArray[np.int64]]
Shape = tuple[int, ...]

# Waiting for standard input is interrupted so often to ask whether to stop, seconds.
_PATIENCE = 0.2
# After so many such turns without anything, what has come is handed on.
_IDLE_TURNS = 5
# The rest of a begun line may stay away so many times as long before a stream that was stopped ends without it.
_TURNS = 10
_CHUNK = 1 << 16
# Of one number on standard input, with its separators and blanks.
_MOST_CHARACTERS = 64


class InstanceSource(ABC):
    """Instances in order.

    Attributes:
        name: for messages.
        input_shape: (C, H, W) of an instance, height 1 for signals; ``None`` when only the stream itself tells.
        class_names: empty when unknown.
        count: number of instances; ``None`` when unknown.
    """

    def __init__(self, name: str, input_shape: Shape | None, class_names: tuple[str, ...], count: int | None) -> None:
        self.name, self.input_shape, self.class_names, self.count = name, input_shape, class_names, count

    @abstractmethod
    def blocks(
        self, size: int, start: int, should_stop: Callable[[], bool], is_due: Callable[[], bool] = lambda: False
    ) -> Iterator[Block]:
        """Yield (x, y) of ``size`` instances, fewer at the end or before a bad one, from instance ``start`` on.

        A live source yields fewer, perhaps none, whenever it waits for the next one.

        Args:
            size: at least 1.
            start: instances to pass over first; a live source cannot go back and begins where it is.
            should_stop: asked while waiting for instances; true ends the stream early, after those that have come.
            is_due: asked likewise; true makes a live source yield what it has at once, for its caller has to save.

        Raises:
            DataError: the source is damaged, or an instance or a label is bad.
        """

    def last_name(self, position: int) -> str:
        """Return the name of the last one of so many instances within the source; empty where they have none."""
        return ""


def open_stream(
    source: str, graph_shape: Shape, graph_classes: int, class_names: tuple[str, ...] | None = None,
    image_size: tuple[int, int] | None = None,
) -> InstanceSource:  # fmt: skip
    """Return the instances of a source.

    Args:
        source: "-" for standard input, or what ``load_dataset`` takes.
        graph_shape: of the network's input; images in folders are resized to it. Empty: to the size of the first one.
        graph_classes: number of the network's outputs.
        class_names: of the network, for names as labels on standard input and as those of folders; ``None`` where one
            is still to be built for the classes of the source.
        image_size: (H, W) in pixels to resize to instead; folders of images only.

    Raises:
        DataError: the source is missing or of no known format.
        UsageError: an image size for another kind of source, or standard input is closed.
    """
    path = Path(source)
    if source == STANDARD_INPUT:
        if sys.stdin is None:  # its descriptor would be that of the next file that is opened
            raise UsageError("standard input is closed, expected instances from it; redirect it, or name a file")
        if image_size is not None:
            raise UsageError("standard input: image_size is for folders of images, the network decides; leave it out")
        return _JsonLines(0, graph_shape, graph_classes, class_names or ())
    if image_size is None and path.suffix == ".npz" and "train" in (split_keys(path) if path.is_file() else ()):
        return _Npz(path)
    if path.is_dir() and available_splits(source) and is_image_folder(path):
        folder = path / "train" if _has_classes(path / "train") else path
        return _Folder(folder, graph_shape, image_size, matched_classes(folder, class_names))
    return _Whole(load_dataset(source, image_size=image_size, class_names=class_names))


def _has_classes(folder: Path) -> bool:
    return folder.is_dir() and bool(class_folders(folder))


class _Whole(InstanceSource):
    """A data set in memory."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset.name, dataset.input_shape, dataset.class_names, len(dataset))
        self._dataset = dataset

    def blocks(
        self, size: int, start: int, should_stop: Callable[[], bool], is_due: Callable[[], bool] = lambda: False
    ) -> Iterator[Block]:
        """Take from the data set."""
        for first in range(start, len(self._dataset), size):
            yield self._dataset.take(np.arange(first, min(first + size, len(self._dataset))))


class _Npz(InstanceSource):
    """A .npz file, read from its members piece by piece."""

    def __init__(self, path: Path) -> None:
        self._path, self._keys = path, split_keys(path)["train"]
        with opened(path) as file:
            names = read_npz(path, file, {"class_names"}).get("class_names")
        with _members(path, self._keys) as (images, labels):
            if labels.shape != images.shape[:1]:
                raise DataError(f"{path}: {len(images)} images but labels of shape {labels.shape}, expected one each")
            if not len(images):
                raise DataError(f"{path}: holds images of shape {images.shape}, expected at least one instance")
            with naming(path):
                sample = images_from(np.zeros((1, *images.shape[1:]), images.dtype))
            largest = max(int(self._labels(part).max(initial=0)) for part in labels.pieces(_CHUNK))
            count = len(images)
        channels, *space = sample.shape[1:]
        shape = (channels, *space) if len(space) == 2 else (channels, 1, *space)
        with naming(path):
            class_names = stored_class_names(names, np.array([largest]))
            check_class_names(class_names)
        super().__init__(path.stem, shape, class_names, count)

    def blocks(
        self, size: int, start: int, should_stop: Callable[[], bool], is_due: Callable[[], bool] = lambda: False
    ) -> Iterator[Block]:
        """Read images and labels side by side."""
        with _members(self._path, self._keys) as (images, labels):
            pieces = zip(images.pieces(size, start), labels.pieces(size, start), strict=True)
            for first, (x, y) in zip(range(start, len(images), size), pieces, strict=True):
                try:
                    block = self._block(x, y)
                except DataError:
                    good = self._good(x, y)
                    if good:
                        yield self._block(x[:good], y[:good])
                    self._refuse(x[good:], y[good:], f"instance {first + good} (counted from 0)")
                    raise
                yield block

    def _good(self, x: NDArray[Any], y: NDArray[Any]) -> int:
        """Return how many instances of a bad block there are before its first bad one."""
        good, bad = 0, len(y)  # so many are good, so many are not
        while bad - good > 1:
            tried = (good + bad) // 2
            try:
                self._block(x[good:tried], y[good:tried])
                good = tried
            except DataError:
                bad = tried
        return good

    def _refuse(self, x: NDArray[Any], y: NDArray[Any], name: str) -> None:
        """Tell what is wrong with the first of these instances.

        Raises:
            DataError: always, with its ``name``.
        """
        with naming(self._path):
            with naming(name):
                images = images_from(x[:1])
            check_images(images, lambda _: name)
            check_labels(labels_from(y[:1]), 1, self.class_names, lambda _: name)

    def _block(self, x: NDArray[Any], y: NDArray[Any]) -> Block:
        return _checked(images_from(x), labels_from(y), self.class_names, self.name)

    def _labels(self, y: NDArray[Any]) -> NDArray[np.int64]:
        with naming(self._path):
            return labels_from(y)


class _Member:
    """An array inside an archive, open for reading from its beginning to its end."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, by_column, self.dtype = read(file)
        if self.dtype.hasobject or not self.shape:
            raise ValueError("an array of Python objects, or of one number")
        if by_column:
            raise DataError(
                f"{path}: has an array of shape {self.shape} in Fortran order, not readable instance by instance;"
                " write it again with numpy.savez(..., x=numpy.ascontiguousarray(x)), or train without --stream"
            )

    def __len__(self) -> int:
        return int(self.shape[0])

    def pieces(self, size: int, start: int = 0) -> Iterator[NDArray[Any]]:
        """Yield ``size`` rows at a time, from row ``start`` on."""
        row = self.dtype.itemsize * math.prod(self.shape[1:])
        for first in range(0, start * row, _CHUNK):
            self._read(min(_CHUNK, start * row - first))
        for first in range(start, len(self), size):
            rows = min(size, len(self) - first)
            yield np.frombuffer(self._read(rows * row), self.dtype).reshape(rows, *self.shape[1:])

    def _read(self, nbytes: int) -> bytes:
        content = self._file.read(nbytes)
        if len(content) < nbytes:
            raise DataError(f"{self._path}: ends too early, expected an array of shape {self.shape}; write it again")
        return content


@contextmanager
def _members(path: Path, keys: tuple[str, str]) -> Iterator[tuple[_Member, _Member]]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{keys[0]}.npy") as x, archive.open(f"{keys[1]}.npy") as y:
            yield _Member(path, x), _Member(path, y)
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error}); write it again with numpy.savez") from error


class _Folder(InstanceSource):
    """Class folders, their images in the order of the file names, as a camera numbers them."""

    def __init__(
        self, folder: Path, graph_shape: Shape, image_size: tuple[int, int] | None, class_names: tuple[str, ...]
    ) -> None:
        folders = class_folders(folder)
        self._files = sorted(
            ((file, class_names.index(name)) for name, place in folders.items() for file in image_files(place)),
            key=lambda pair: (pair[0].name, pair[1]),
        )
        if not self._files:
            raise DataError(f"{folder}: no image in its sub-folders, expected one sub-folder of images per class")
        self._size = image_size or ((graph_shape[1], graph_shape[2]) if len(graph_shape) == 3 else None)
        self._channels = graph_shape[0] if graph_shape and graph_shape[0] in (1, 3) else None
        self._folder = folder
        shape = read_image(self._files[0][0], self._size, self._channels).shape
        self._shape, self._size, self._channels = shape, (shape[1], shape[2]), shape[0]
        super().__init__(folder.name, shape, class_names, len(self._files))

    def last_name(self, position: int) -> str:
        """Return the path of the last image within the folder."""
        return str(self._files[position - 1][0].relative_to(self._folder)) if position else ""

    def blocks(
        self, size: int, start: int, should_stop: Callable[[], bool], is_due: Callable[[], bool] = lambda: False
    ) -> Iterator[Block]:
        """Decode as many images as a block has."""
        decoded = ((read_image(file, self._size, self._channels), label) for file, label in self._files[start:])
        for images, labels in _collected(decoded, size, self._shape):
            yield _checked(images, labels, self.class_names, self.name)


class _JsonLines(InstanceSource):
    """Lines of standard input."""

    def __init__(self, descriptor: int, graph_shape: Shape, graph_classes: int, class_names: tuple[str, ...]) -> None:
        names = class_names or tuple(map(str, range(graph_classes)))
        super().__init__("standard input", None, names, None)
        self._descriptor, self._shape = descriptor, graph_shape
        self._longest = _CHUNK + _MOST_CHARACTERS * math.prod(graph_shape)  # the path of an image, or numbers
        self._label_of = {name: label for label, name in enumerate(names)}

    def blocks(
        self, size: int, start: int, should_stop: Callable[[], bool], is_due: Callable[[], bool] = lambda: False
    ) -> Iterator[Block]:
        """Parse lines until the input ends."""
        return _collected(self._parsed(should_stop, is_due), size, self._shape)

    def _parsed(
        self, should_stop: Callable[[], bool], is_due: Callable[[], bool]
    ) -> Iterator[tuple[NDArray[np.float32], int] | None]:
        """Yield instances, and ``None`` while none come; of a bad line tell after those read along with it.

        Raises:
            DataError: the first bad line.
        """
        failures: list[DataError] = []
        taken = number = 0
        for line in self._lines(lambda: bool(failures) or should_stop(), is_due):
            if line is None:
                yield None
                continue
            number += 1
            if not line.strip():
                continue
            where = f"{self.name}, line {number}"
            try:
                if len(line) > self._longest:
                    raise DataError(f"{where}: longer than {self._longest:,} bytes, expected such as {_EXAMPLE}")
                instance = self._parse(line, where)
            except DataError as error:
                failures.append(error)
                continue
            taken += bool(failures)
            yield instance
        if failures:
            told = ((taken, "{} behind it were taken"), (len(failures) - 1, "{} are bad too"))
            others = ", ".join(text.format(number) for number, text in told if number)
            raise DataError(f"{failures[0]}{f'; of the lines read along with it, {others}' if others else ''}")

    def _lines(self, should_stop: Callable[[], bool], is_due: Callable[[], bool]) -> Iterator[bytes | None]:
        """Yield lines, and ``None`` when none has come for a while, or for a moment while something is due.

        Of a line that is longer than any may be, a part is kept that is too long as well.
        """
        rest, turns = bytearray(), 0
        while not should_stop():
            # A read that waits would not notice a signal: Python takes it up again.
            if not self._is_ready():
                turns += 1
                if turns >= _IDLE_TURNS or is_due():
                    turns = 0
                    yield None
                continue
            turns = 0
            content = os.read(self._descriptor, _CHUNK)
            if not content:
                if rest:
                    yield bytes(rest)
                return
            first, *others = content.split(b"\n")
            if len(rest) <= self._longest:
                rest += first
            if others:
                yield bytes(rest)
                yield from others[:-1]
                rest = bytearray(others[-1])
        if rest:
            yield from self._ended(bytes(rest))

    def _is_ready(self) -> bool:
        return bool(select.select([self._descriptor], [], [], _PATIENCE)[0])

    def _ended(self, line: bytes) -> Iterator[bytes]:
        """Yield a begun line with its rest, reading nothing behind it; nothing if its end does not come."""
        while any(self._is_ready() for _ in range(_TURNS)):
            byte = os.read(self._descriptor, 1)
            if byte == b"\n":
                yield line
            if byte in (b"", b"\n"):
                return
            line += byte

    def _parse(self, line: bytes, where: str) -> tuple[NDArray[np.float32], int]:
        try:
            table = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}), expected such as {_EXAMPLE}") from None
        kinds = {"pixels", "x", "image"} & set(table) if isinstance(table, dict) else set()
        if len(kinds) != 1 or "y" not in table or len(table) != 2:
            raise DataError(f"{where}: expected 'y' and one of 'pixels', 'x', 'image', such as {_EXAMPLE}")
        (kind,) = kinds
        return self._image(kind, table[kind], where), self._label(table["y"], where)

    def _label(self, y: Any, where: str) -> int:
        label = self._label_of.get(y) if isinstance(y, str) else y
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(self.class_names):
            known = ", ".join(self.class_names[:20])
            raise DataError(f"{where}: y is {y!r}, expected 0 to {len(self.class_names) - 1} or one of {known}")
        return label

    def _image(self, kind: str, content: Any, where: str) -> NDArray[np.float32]:
        try:
            if kind == "image":
                with naming(where):
                    array = read_image(Path(content), (self._shape[-2], self._shape[-1]), self._shape[0])
            else:
                array = np.asarray(content)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: '{kind}' is not an array of numbers ({error})") from None
        if array.dtype.kind not in "iuf":
            raise DataError(f"{where}: '{kind}' is not an array of numbers, but of type {array.dtype}")
        array = array.astype(np.float64)
        if array.size != math.prod(self._shape):
            raise DataError(f"{where}: '{kind}' has {array.size} numbers, the network expects {self._shape}")
        if kind != "x" and (array.min() < 0 or array.max() > 255 or (array != array.round()).any()):
            raise DataError(f"{where}: 'pixels' are not whole numbers from 0 to 255; use 'x' for other numbers")
        with np.errstate(over="ignore"):  # becomes infinity, which is refused
            scaled = (array / 255 if kind != "x" else array).reshape(self._shape).astype(np.float32)
        if not np.isfinite(scaled).all():
            raise DataError(f"{where}: '{kind}' holds NaN, infinity or a number beyond float32, expected finite ones")
        return scaled


_EXAMPLE = '{"pixels": [0, 17, 255], "y": 3}'


def _checked(images: Any, labels: NDArray[Any], names: tuple[str, ...], name: str) -> Block:
    """Return a block as float32 images and int64 labels after the checks of a data set."""
    block = Dataset(images, labels.astype(np.int64), names, name, allow_missing_classes=True)
    return block.take(np.arange(len(block)))


def _collected(
    instances: Iterator[tuple[NDArray[Any], int] | None], size: int, shape: Shape
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yield blocks of ``size`` instances; those before a bad one come before its error, for they can be learned from.

    Args:
        instances: ``None`` among them: the next one is long in coming, so the block ends here.
        size: at least 1.
        shape: of an instance, for a block without any.

    Raises:
        EdgetrainError: as ``instances``.
    """
    images: list[NDArray[Any]] = []
    labels: list[int] = []
    failure: EdgetrainError | None = None
    try:
        for instance in instances:
            if instance is not None:
                images.append(instance[0])
                labels.append(instance[1])
            if instance is None or len(labels) == size:
                block = _stacked(images, labels, shape)
                images, labels = [], []  # not held while somebody learns from the block
                yield block
    except EdgetrainError as error:
        failure = error
    if labels:
        yield _stacked(images, labels, shape)
    if failure is not None:
        raise failure


def _stacked(images: list[NDArray[Any]], labels: list[int], shape: Shape) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.stack(images) if images else np.zeros((0, *shape), np.float32), np.array(labels, np.int64)
