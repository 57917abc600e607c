"""Which tile a product uses: one table, by instruction set and by the product's sizes.

The tile sizes are accumulators kept in registers (channels x pixels, or channels x
terms). AVX-512 and NEON have 32 vector registers: 16 accumulators measured best of
4x4, 4x6, 6x4, 8x2, 2x8, 8x3 (docs/performance.md). AVX2 has 16 registers.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def multiply(self, channels: int, pixels: int, lanes: int) -> Tile:
        """Return (channels, pixels) of a gather-multiply's tile."""
        if channels == 1:
            return self.one_channel
        if pixels == 1:
            return self.one_pixel
        return self.two_pixels if pixels <= self.two_pixels[1] else self.many_pixels

    def correlate(self, channels: int, terms: int, lanes: int) -> Tile:
        """Return (channels, terms) of a gather-correlate's tile."""
        if channels == 1:
            parts = -(-terms // self.gradient_terms)
            return 1, -(-terms // parts)
        return self.gradient


TILES = Tiles((4, 4), (8, 2), (16, 1), (1, 8), (4, 4), 13)
