"""Which tile a product uses: one table, by instruction set and by the product's sizes.

The tile sizes are accumulators kept in registers (channels x pixels, or channels x
terms). AVX-512 and NEON have 32 vector registers: 16 accumulators measured best of
4x4, 4x6, 6x4, 8x2, 2x8, 8x3 (docs/performance.md); AVX2 has 16, where 16 accumulators would spill.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

from edgetrain.devices import detect_host

Tile = tuple[int, int]


@dataclass(frozen=True)
class Tiles:
    """Tile sizes by case."""

    many_pixels: Tile
    two_pixels: Tile
    one_pixel: Tile
    one_channel: Tile
    gradient: Tile
    gradient_terms: int  # most terms kept at once when there is one channel
    odd: Tile | None = None  # (channels, pixels) for numbers of channels that the others fill badly, such as 6
    gradient_odd: Tile | None = None

    def multiply(self, channels: int, pixels: int) -> Tile:
        """Return (channels, pixels) of a gather-multiply's tile."""
        if channels == 1:
            return self.one_channel
        if pixels == 1:
            return self.one_pixel
        if pixels <= self.two_pixels[1]:
            return self.two_pixels
        return _fuller(channels, self.many_pixels, self.odd)

    def correlate(self, channels: int, terms: int) -> Tile:
        """Return (channels, terms) of a gather-correlate's tile."""
        if channels == 1:
            return 1, _even(terms, self.gradient_terms)
        return _fuller(channels, self.gradient, self.gradient_odd)


def _fuller(channels: int, usual: Tile, odd: Tile | None) -> Tile:
    """Return the tile that computes fewer channels that do not exist, the usual one unless it wastes a tenth more."""
    if odd is None:
        return usual
    computed = [-(-channels // tile[0]) * tile[0] for tile in (usual, odd)]
    return odd if computed[0] > 1.1 * computed[1] else usual


@dataclass(frozen=True)
class ChannelTiles:
    """Tile sizes in vectors of channels; ``narrow`` when all output channels fit one vector."""

    narrow: Tile
    wide: Tile
    few_pixels: Tile
    depthwise: int
    gradient_narrow: Tile
    gradient_wide: Tile
    gradient_terms: int

    def multiply(self, channels: int, pixels: int, lanes: int) -> Tile:
        """Return (channels, pixels) of a gather-multiply's tile."""
        vectors = -(-channels // lanes)
        tile = self.few_pixels if pixels <= self.few_pixels[1] else self.narrow if vectors == 1 else self.wide
        return min(tile[0], vectors) * lanes, tile[1]

    def correlate(self, channels: int, terms: int, lanes: int) -> Tile:
        """Return (channels, terms) of a gather-correlate's tile."""
        tile = self.gradient_narrow if channels <= lanes else self.gradient_wide
        return tile[0] * lanes, tile[1]

    def depthwise_terms(self, terms: int) -> int:
        """Return how many terms a depthwise weight gradient keeps at once."""
        return _even(terms, self.gradient_terms)


def _even(count: int, most: int) -> int:
    """Cut ``count`` into equal parts of at most ``most``; return a part's size."""
    parts = -(-count // most)
    return -(-count // parts)


def _registers() -> int:
    """Return the number of vector registers: 32 with AVX-512 and NEON, 16 with AVX2."""
    return 16 if platform.machine() == "x86_64" and simd_lanes() < 16 else 32


@functools.cache
def simd_lanes() -> int:
    """Return this machine's SIMD width in float32, at least 4."""
    return max(4, detect_host().simd_float32_lanes)


if _registers() == 32:
    TILES = Tiles((4, 4), (8, 2), (16, 1), (1, 8), (4, 4), 13, odd=(6, 4), gradient_odd=(6, 3))
    CHANNEL_TILES = ChannelTiles((1, 12), (2, 8), (8, 1), 8, (1, 12), (2, 8), 13)
else:
    TILES = Tiles((4, 3), (6, 2), (12, 1), (1, 8), (4, 3), 12)
    CHANNEL_TILES = ChannelTiles((1, 8), (2, 5), (8, 1), 6, (1, 9), (2, 5), 9)
