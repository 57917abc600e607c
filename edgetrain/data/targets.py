"""Images or signals with float targets, for training with the squared error: what ``fit`` makes of a pair (x, y)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgetrain.arrays import scaled, targets_of
from edgetrain.data.convert import ImageLayout, Images, images_from
from edgetrain.data.images import channel_statistics, check_images, checked_indices, sizes_of
from edgetrain.errors import DataError


@dataclass(frozen=True, eq=False)
class TargetSet:
    """Images or 1-D signals with one array of targets each, made by ``from_arrays``.

    Attributes:
        images: uint8 or float32, shape (N, C, H, W), or (N, C, W) for signals.
        targets: float32, shape (N, ...).
        name: what the set is called in messages.
    """

    images: Images
    targets: NDArray[np.float32]
    name: str

    @classmethod
    def from_arrays(
        cls, x: ArrayLike, y: ArrayLike, target_shape: tuple[int, ...], name: str, layout: ImageLayout = "auto"
    ) -> TargetSet:
        """Check arrays; the inputs are never modified.

        Args:
            x: as for ``Dataset.from_arrays``.
            y: numbers of shape (N, *target_shape).
            target_shape: shape of one sample's targets.
            name: what the set is called in messages.
            layout: what a 3-D ``x`` is, as for ``Dataset.from_arrays``.

        Raises:
            DataError: dtype, shape, length or value is wrong.

        Example:
            >>> data = TargetSet.from_arrays(np.zeros((3, 1, 8, 8)), np.ones((3, 2)), (2,), "pairs")
            >>> [array.shape for array in data.take([0, 2])]
            [(2, 1, 8, 8), (2, 2)]
        """
        try:
            images = images_from(x, layout)
            check_images(images)
            return cls(images, targets_of(y, len(images), target_shape), name)
        except DataError as error:
            raise DataError(f"data set {name!r}: {error}") from error

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.images)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The (C, H, W) of an image; a signal (C, W) counts as height 1."""
        return sizes_of(self.images)

    def take(self, indices: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the chosen images as ``Dataset.take`` does, and their targets float32 (n, ...); new arrays.

        Raises:
            UsageError: an index is out of range or not an integer.
        """
        chosen = checked_indices(indices, len(self), self.name)
        return scaled(self.images[chosen]), self.targets[chosen]

    def statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return mean and standard deviation of every channel, each float32 (C,), as ``Dataset.statistics``."""
        return channel_statistics(self.images)
