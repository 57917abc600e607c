"""Random changes to training images: flip, pad-and-crop, shift. Vectorised NumPy, one random stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from edgetrain.data.checks import whole_number
from edgetrain.errors import UsageError

_SYNTAX = "'none' or a comma-separated list of 'flip', 'crop:PIXELS', 'shift:PIXELS'"


@dataclass(frozen=True)
class Augmentation:
    """Random changes, drawn anew for every image of a batch, applied in the order of the fields.

    Use it on scaled, not yet standardised images: empty places are filled with 0, which is black there.
    Arrays of shape (N, C, W) or (N, C, 1, W) are signals: they can be shifted in time, but not flipped (time
    has a direction) or cropped (``shift`` is the same thing there).

    Attributes:
        flip: mirror left and right with probability 1/2.
        crop_padding: pad with this many zero pixels on every side and cut out the original size at random.
        shift: move by up to this many pixels (or samples) in each direction, zero fill.

    Raises:
        UsageError: an argument is not what is said above.

    Example:
        >>> augmentation = Augmentation(flip=True, shift=2)
        >>> augmentation(np.ones((8, 3, 32, 32), np.float32), np.random.default_rng(0)).shape
        (8, 3, 32, 32)
    """

    flip: bool = False
    crop_padding: int = 0
    shift: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.flip, bool):
            raise UsageError(f"flip is {self.flip!r}, expected True or False")
        whole_number(self.crop_padding, "crop_padding", 0)
        whole_number(self.shift, "shift", 0)

    def __call__(self, x: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """Return a changed copy of the batch.

        Args:
            x: float32, shape (N, C, H, W) or (N, C, W).
            rng: the only source of randomness; it advances by an amount that depends on N alone.

        Returns:
            A new float32 array of the shape of ``x``.

        Raises:
            UsageError: wrong dtype or shape, flip or crop of a signal, or a move as large as the image.
        """
        self._check(x)
        pictures = x[:, :, None] if x.ndim == 3 else x
        out = pictures.copy()
        if self.flip:
            chosen = rng.random(len(x)) < 0.5
            out[chosen] = pictures[chosen, :, :, ::-1]
        for reach in (self.crop_padding, self.shift):
            if reach:
                out = _moved(out, reach, rng)
        return out.reshape(x.shape)

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """Return the augmentation that a text such as "flip,crop:4,shift:2" describes; "none" or "" is none.

        Raises:
            UsageError: an unknown, repeated or malformed part.

        Example:
            >>> Augmentation.parse("flip,crop:4")
            Augmentation(flip=True, crop_padding=4, shift=0)
        """
        if text.strip() in ("", "none"):
            return cls()
        found: dict[str, int] = {}
        for part in text.split(","):
            key, amount = _parse_part(part.strip(), text)
            if key in found:
                raise UsageError(f"augmentation {text!r} has {key!r} twice, expected {_SYNTAX}")
            found[key] = amount
        return cls("flip" in found, found.get("crop", 0), found.get("shift", 0))

    def describe(self) -> str:
        """Return the text that ``parse`` turns back into this augmentation.

        Example:
            >>> Augmentation(flip=True, shift=2).describe()
            'flip,shift:2'
        """
        parts = ["flip"] if self.flip else []
        parts += [f"crop:{self.crop_padding}"] if self.crop_padding else []
        parts += [f"shift:{self.shift}"] if self.shift else []
        return ",".join(parts) or "none"

    def _check(self, x: NDArray[np.float32]) -> None:
        if x.dtype != np.float32 or x.ndim not in (3, 4):
            raise UsageError(
                f"augmentation got {x.dtype} of shape {x.shape}, expected float32 (N, C, H, W) or (N, C, W)"
            )
        signal = _is_signal(x.shape)
        if signal and (self.flip or self.crop_padding):
            raise UsageError(
                f"augmentation {self.describe()!r} on signals of shape {x.shape}, expected 'shift' alone;"
                " flip and crop are for images"
            )
        smallest = x.shape[-1] if signal else min(x.shape[2:])
        reach = max(self.crop_padding, self.shift)
        if reach >= smallest:
            raise UsageError(
                f"augmentation {self.describe()!r} moves by up to {reach}, expected less than {smallest},"
                f" the smallest side of shape {x.shape}"
            )


def _is_signal(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 or shape[2] == 1


def _moved(x: NDArray[np.float32], reach: int, rng: np.random.Generator) -> NDArray[np.float32]:
    # Cutting the old size out of a zero-padded image is a move with zero fill, so crop and shift share this.
    # The windows are views; only the chosen ones are copied.
    count, _, height, width = x.shape
    rows = 0 if height == 1 else reach
    padded = np.pad(x, ((0, 0), (0, 0), (rows, rows), (reach, reach)))
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))
    top = rng.integers(0, 2 * rows + 1, count)
    left = rng.integers(0, 2 * reach + 1, count)
    moved: NDArray[np.float32] = windows[np.arange(count), :, top, left]
    return moved


def _parse_part(part: str, text: str) -> tuple[str, int]:
    key, colon, amount = part.partition(":")
    if (key == "flip" and not colon) or (key in ("crop", "shift") and amount.isascii() and amount.isdigit()):
        return key, int(amount or 0)
    raise UsageError(f"augmentation {text!r}: cannot read {part!r}, expected {_SYNTAX}")
