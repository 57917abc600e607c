"""The Dataset: checked images or signals with labels, kept in the dtype they came in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgetrain.arrays import scaled
from edgetrain.data.checks import whole_number
from edgetrain.data.convert import ImageLayout, Images, class_names_for, images_from, labels_from
from edgetrain.data.images import channel_statistics, check_images, checked_indices, sizes_of
from edgetrain.errors import DataError, UsageError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images or 1-D signals with one class label each, checked on construction.

    Pixels stay uint8 when they came as uint8: a quarter of the memory of float32. The arrays are neither
    copied nor modified.

    Attributes:
        images: uint8 or float32, shape (N, C, H, W), or (N, C, W) for signals; N >= 1, floats finite.
        labels: int64, shape (N,), values 0 to num_classes - 1.
        class_names: one distinct name per class.
        name: what the set is called in messages and reports.
        allow_missing_classes: accept classes without an example, as in a test or validation split.

    Raises:
        DataError: an array, a label or a class breaks the rules above.

    Example:
        >>> data = Dataset.from_arrays(np.zeros((4, 1, 8, 8), np.uint8), [0, 1, 0, 1])
        >>> len(data), data.num_classes, data.input_shape
        (4, 2, (1, 8, 8))
    """

    images: Images
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    name: str
    allow_missing_classes: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Check everything once, here, so that no later floor has to."""
        try:
            check_images(self.images)
            check_class_names(self.class_names)
            check_labels(self.labels, len(self.images), self.class_names)
            if not self.allow_missing_classes:
                _check_no_empty_class(self.labels, self.class_names)
        except DataError as error:
            raise DataError(f"data set {self.name!r}: {error}") from error

    @classmethod
    def from_arrays(
        cls,
        x: ArrayLike,
        y: ArrayLike,
        class_names: Sequence[str] | None = None,
        name: str = "arrays",
        *,
        layout: ImageLayout = "auto",
        allow_missing_classes: bool = False,
    ) -> Dataset:
        """Make a Dataset from arrays of any reasonable dtype; the inputs are never modified.

        Args:
            x: (N, C, H, W), (N, H, W) or (N, C, W). uint8 and float32 are kept without a copy, other floats
                become float32 unscaled, other integers must lie in 0..255 and become uint8.
            y: integers, shape (N,).
            class_names: one per class; default "0", "1", ... up to the largest label.
            name: what the set is called in messages.
            layout: what a 3-D ``x`` is: "image" (N, H, W) with one channel, "signal" (N, C, W), or "auto":
                an image if H equals W, else a signal.
            allow_missing_classes: accept classes without an example.

        Raises:
            DataError: dtype, shape, length, label or value is wrong.
            UsageError: unknown ``layout``.

        Example:
            >>> Dataset.from_arrays(np.ones((2, 28, 28)), [0, 1], ["cat", "dog"]).input_shape
            (1, 28, 28)
        """
        try:
            images, labels = images_from(x, layout), labels_from(y)
            names = class_names_for(labels) if class_names is None else tuple(class_names)
        except DataError as error:
            raise DataError(f"data set {name!r}: {error}") from error
        return cls(images, labels, names, name, allow_missing_classes)

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """The number of classes, those without an example included."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The (C, H, W) that a model builder needs; a signal (C, W) counts as height 1."""
        return sizes_of(self.images)

    def take(self, indices: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the chosen images, ready to train on, and their labels; new arrays.

        Args:
            indices: integers 0 to N - 1, shape (n,); repeats are allowed.

        Returns:
            x float32 of shape (n, C, H, W) or (n, C, W);
            uint8 pixels scaled to [0, 1]; y int64 of shape (n,).

        Raises:
            UsageError: an index is out of range or not an integer.
        """
        chosen = self._checked(indices)
        return scaled(self.images[chosen]), self.labels[chosen]

    def subset(self, indices: ArrayLike) -> Dataset:
        """Return a Dataset of the chosen images with the same classes; classes may be left empty.

        Args:
            indices: integers 0 to N - 1, shape (n,), n >= 1.

        Raises:
            UsageError: an index is out of range or not an integer.
            DataError: no index at all.
        """
        return self._part(self._checked(indices), allow_missing_classes=True)

    def split(self, fraction: float, seed: SupportsIndex) -> tuple[Dataset, Dataset]:
        """Cut the set in two at random, class by class: ``fraction`` of every class, and the rest.

        Every class with two examples or more is in both parts; a single example goes to the first. Both parts
        keep the order of the images.

        Args:
            fraction: share of the first part, between 0 and 1 exclusive.
            seed: whole number >= 0; the same seed gives the same cut.

        Raises:
            UsageError: ``fraction`` or ``seed`` is out of range.
            DataError: no class has two examples, so the second part would be empty.

        Example:
            >>> data = Dataset.from_arrays(np.zeros((10, 1, 2, 2), np.uint8), [0, 1] * 5)
            >>> [len(part) for part in data.split(0.8, seed=0)]
            [8, 2]
        """
        if not 0 < fraction < 1:
            raise UsageError(f"fraction is {fraction!r}, expected more than 0 and less than 1")
        rng = np.random.default_rng(whole_number(seed, "seed", 0))
        in_first = np.zeros(len(self), dtype=bool)
        for label in range(self.num_classes):
            members = np.flatnonzero(self.labels == label)
            in_first[rng.permutation(members)[: _share(fraction, len(members))]] = True
        if in_first.all():
            raise DataError(f"data set {self.name!r}: cannot be split, no class has two examples or more")
        return (
            self._part(np.flatnonzero(in_first), self.allow_missing_classes),
            self._part(np.flatnonzero(~in_first), allow_missing_classes=True),
        )

    def statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return mean and standard deviation of every channel over the whole set, each float32 of shape (C,).

        Taken over the values that ``take`` returns, summed in float64, in chunks: the set is never copied. The
        deviation of a constant channel is given as 1, as ``deviation_to_divide_by`` does.
        """
        return channel_statistics(self.images)

    def _part(self, chosen: NDArray[np.intp], allow_missing_classes: bool) -> Dataset:
        return Dataset(self.images[chosen], self.labels[chosen], self.class_names, self.name, allow_missing_classes)

    def _checked(self, indices: ArrayLike) -> NDArray[np.intp]:
        return checked_indices(indices, len(self), self.name)


def _share(fraction: float, count: int) -> int:
    return min(max(round(fraction * count), 1), max(count - 1, 1))


def check_class_names(names: tuple[str, ...]) -> None:
    """Refuse names that are no distinct strings.

    Raises:
        DataError: they are not.
    """
    if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"class_names is {names!r}, expected a tuple of at least one string")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"class name {twice!r} appears twice, expected distinct names")


def check_labels(
    labels: NDArray[np.int64], count: int, names: tuple[str, ...], named: Callable[[int], str] = "image {}".format
) -> None:
    """Refuse what is not int64 of shape (count,) with values from 0 to below ``len(names)``.

    Args:
        labels: to check.
        count: of the images.
        names: of the classes.
        named: returns what a message calls an image, by its index.

    Raises:
        DataError: another type or shape, or a label out of range.
    """
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.ndim != 1:
        found = getattr(labels, "dtype", type(labels).__name__)
        raise DataError(f"labels are {found}, expected an int64 array (N,); see Dataset.from_arrays")
    if len(labels) != count:
        raise DataError(f"{count} images but {len(labels)} labels, expected one label per image")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if wrong.size:
        raise DataError(
            f"label {labels[wrong[0]]} of {named(wrong[0])} is out of range, expected 0 to {len(names) - 1}"
            f" for {len(names)} classes"
        )


def _check_no_empty_class(labels: NDArray[np.int64], names: tuple[str, ...]) -> None:
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if empty.size:
        raise DataError(
            f"class {empty[0]} ({names[empty[0]]!r}) has no example, expected at least one per class;"
            " add images, or number the labels anew without gaps (Dataset.from_arrays of a test split:"
            " allow_missing_classes=True)"
        )
