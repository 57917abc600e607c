"""Which kernel and tile a product uses: one function, ``choose``; a rule first, a stored calibration over it.

A tile is a block of accumulators kept in registers (channels x pixels, or channels x terms). The rules go by
instruction set and by the product's sizes: AVX-512 and NEON have 32 vector registers, where 16 accumulators measured
best of 4x4, 4x6, 6x4, 8x2, 2x8, 8x3 (docs/performance.md); AVX2 has 16, where 16 accumulators would spill. What the
rules get wrong on a machine, ``edgetrain doctor --calibrate`` finds out (``bench_tiles``) and keeps (``calibration``).

No tile changes a bit of any result: every accumulator adds the same numbers in the same order, whatever its
neighbours are (a test compares all candidates). What would change results, direct products or Winograd's, dense
weights or lists of non-zeros, goes by rules alone: results depend on the machine's instruction set, not on a clock.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from edgetrain.calibration import stored_tiles
from edgetrain.devices import DeviceProfile, detect_host
from edgetrain.kernels.codes import CHANNELS, DEPTHWISE, SAMPLES

Tile = tuple[int, int]
_KINDS = {SAMPLES: "samples", CHANNELS: "channels", DEPTHWISE: "depthwise"}


@dataclass(frozen=True)
class Sizes:
    """What a choice depends on.

    Attributes:
        kernel: ``multiply`` or ``correlate``, see ``kernels.dense``.
        kind: what the lanes hold, see ``kernels.codes``.
        lanes: numbers in a vector.
        channels: output channels of a group; those of a map of vectors when the product is depthwise; numbers of a row
            of weights when it is the outer product of a layer of one pixel, whose ``pixels`` are rows then.
        pixels: vectors of output pixels of a block; of all blocks where maps are small.
        terms: numbers that one output pixel (``multiply``) or all of them (``correlate``) are multiplied with.
        groups: groups, or maps of vectors when the product is depthwise.
    """

    kernel: str
    kind: int
    lanes: int
    channels: int
    pixels: int
    terms: int
    groups: int = 1

    @property
    def label(self) -> str:
        """The name of these sizes in a calibration.

        Example:
            >>> Sizes("multiply", SAMPLES, 16, channels=32, pixels=256, terms=144).label
            'multiply samples x16: 32 channels, 256 pixels, 144 terms, groups 1'
        """
        return (
            f"{self.kernel} {_KINDS[self.kind]} x{self.lanes}: {self.channels} channels, {self.pixels} pixels, "
            f"{self.terms} terms, groups {self.groups}"
        )


@dataclass(frozen=True)
class TileChoice:
    """The tile of a product, and why: ``rule``, ``calibration``, or ``trial`` while calibrating."""

    sizes: Sizes
    tile: Tile
    reason: str


@dataclass(frozen=True)
class Target:
    """What kernels are chosen for.

    Attributes:
        lanes: SIMD width in float32, at least 4.
        registers: vector registers.
        l2_kib: a core's share of the second-level cache, 0 if unknown.
    """

    lanes: int
    registers: int
    l2_kib: int = 0


_TARGET: ContextVar[Target | None] = ContextVar("target", default=None)
_TRIAL: ContextVar[Callable[[Sizes], Tile | None] | None] = ContextVar("trial", default=None)


def choose(sizes: Sizes) -> TileChoice:
    """Return the choice for a product: of a trial, else of this machine's calibration, else of the rule."""
    trial = _TRIAL.get()
    if trial is not None:
        tile = trial(sizes)
        return TileChoice(sizes, rule(sizes), "rule") if tile is None else TileChoice(sizes, tile, "trial")
    stored = stored_tiles().get(sizes.label) if target() == _host() else None
    if stored in candidates(sizes)[1:]:  # never what a file edited by hand says: too wide a tile reads beyond its rows
        return TileChoice(sizes, stored, "calibration")
    return TileChoice(sizes, rule(sizes), "rule")


@contextmanager
def trial(tiles: Callable[[Sizes], Tile | None]) -> Iterator[None]:
    """Choose by a function instead of a calibration, in this thread; where it returns ``None`` the rule counts."""
    before = _TRIAL.set(tiles)
    try:
        yield
    finally:
        _TRIAL.reset(before)


@contextmanager
def planning_for(profile: DeviceProfile) -> Iterator[None]:
    """Choose for another device, in this thread: what it would do, to be looked at and not run."""
    before = _TARGET.set(_target(profile, profile.architecture))
    try:
        yield
    finally:
        _TARGET.reset(before)


def target() -> Target:
    """Return what tiles are chosen for: this machine, or another inside ``planning_for``."""
    return _TARGET.get() or _host()


def simd_lanes() -> int:
    """Return the target's SIMD width in float32, at least 4."""
    return target().lanes


def channel_lanes(channels: int, widest: int, narrowest: int = 1) -> int:
    """Return the lanes of vectors that hold so many channels: few channels do not fill the widest vector.

    Example:
        >>> channel_lanes(6, 16), channel_lanes(1, 16), channel_lanes(1, 16, narrowest=4), channel_lanes(20, 16)
        (8, 1, 4, 16)
    """
    return next((lanes for lanes in (1, 4, 8) if max(channels, narrowest) <= lanes < widest), widest)


@functools.cache
def _host() -> Target:
    return _target(detect_host(), platform.machine())


def _target(profile: DeviceProfile, architecture: str) -> Target:
    lanes, share = max(4, profile.simd_float32_lanes), (profile.l2_kib or 0) // (profile.l2_shared_by_cores or 1)
    return Target(lanes, _registers(architecture, lanes), share)


def _registers(architecture: str, lanes: int) -> int:
    return 16 if architecture == "x86_64" and lanes < 16 else 32


# --- rules ---


@dataclass(frozen=True)
class Tiles:
    """Tile sizes by case, where lanes hold samples."""

    many_pixels: Tile
    two_pixels: Tile
    one_pixel: Tile
    one_channel: Tile
    gradient: Tile
    gradient_terms: int  # most terms kept at once when there is one channel
    odd: Tile | None = None  # (channels, pixels) for numbers of channels that the others fill badly, such as 6
    gradient_odd: Tile | None = None

    def multiply(self, sizes: Sizes) -> Tile:
        """Return (channels, pixels) of a gather-multiply's tile."""
        if sizes.channels == 1:
            return self.one_channel
        if sizes.pixels == 1:
            return self.one_pixel
        if sizes.pixels <= self.two_pixels[1]:
            return self.two_pixels
        return fuller(sizes.channels, self.many_pixels, self.odd)

    def correlate(self, sizes: Sizes) -> Tile:
        """Return (channels, terms) of a gather-correlate's tile."""
        if sizes.channels == 1:
            return 1, _even(sizes.terms, self.gradient_terms)
        return fuller(sizes.channels, self.gradient, self.gradient_odd)


@dataclass(frozen=True)
class ChannelTiles:
    """Tile sizes in vectors of channels; ``narrow`` when all output channels fit one vector."""

    narrow: Tile
    wide: Tile
    few_pixels: Tile
    four_pixels: Tile
    depthwise: int
    gradient_narrow: Tile
    gradient_wide: Tile
    gradient_terms: int

    def multiply(self, sizes: Sizes) -> Tile:
        """Return (channels, pixels) of a gather-multiply's tile."""
        if sizes.kind == DEPTHWISE:
            return sizes.lanes, self.depthwise
        vectors = -(-sizes.channels // sizes.lanes)
        if sizes.pixels <= self.few_pixels[1]:
            tile = self.few_pixels
        elif vectors > 1 and sizes.pixels <= self.four_pixels[1]:
            tile = self.four_pixels
        else:
            tile = self.narrow if vectors == 1 else self.wide
        return min(tile[0], vectors) * sizes.lanes, tile[1]

    def correlate(self, sizes: Sizes) -> Tile:
        """Return (channels, terms) of a gather-correlate's tile."""
        if sizes.kind == DEPTHWISE:
            return sizes.lanes, _even(sizes.terms, self.gradient_terms)
        tile = self.gradient_narrow if sizes.channels <= sizes.lanes else self.gradient_wide
        return tile[0] * sizes.lanes, tile[1]


# By number of vector registers: lanes hold samples, lanes hold channels.
_RULES = {
    32: (Tiles((4, 4), (8, 2), (16, 1), (1, 8), (4, 4), 13, odd=(6, 4), gradient_odd=(6, 3)),
         ChannelTiles((1, 12), (2, 8), (8, 1), (4, 4), 8, (1, 12), (2, 8), 13)),
    16: (Tiles((4, 3), (6, 2), (12, 1), (1, 8), (4, 3), 12),
         ChannelTiles((1, 8), (2, 5), (8, 1), (2, 4), 6, (1, 9), (2, 5), 9)),
}  # fmt: skip


def rule(sizes: Sizes) -> Tile:
    """Return the tile that the rules give a product, without a look at any calibration."""
    tiles = _RULES[target().registers][0 if sizes.kind == SAMPLES else 1]
    return tiles.multiply(sizes) if sizes.kernel == "multiply" else tiles.correlate(sizes)


# Vectors of tiles that a Winograd kernel works on at once, with its (channels, vectors) in registers.
_WINOGRAD = {32: {4: (4, 4), 2: (8, 2), 1: (16, 1)}, 16: {4: (4, 2), 2: (4, 2), 1: (8, 1)}}


def winograd_tile(tiles: int, blocks: int, threads: int, lanes: int) -> tuple[int, int, Tile]:
    """Return how many of a map's ``tiles`` belong to one chunk of a Winograd kernel, and how it multiplies them.

    That is in vectors of so many lanes, of which (channels, vectors) are in registers: where samples fill only part of
    the widest vector, neighbouring tiles fill the rest.

    The largest chunk that lets all threads finish together: 1.3 times as fast with 4 as with 16 tiles on 16@32x32
    (a chunk's transformed numbers stay in the second-level cache), and equally fast with 2 and 4.
    """
    together = max(1, simd_lanes() // lanes)
    while tiles % together:
        together //= 2
    vectors = tiles // together
    shapes = {size: tile for size, tile in _WINOGRAD[target().registers].items() if vectors % size == 0}
    longest = {size: -(-(blocks * vectors // size) // threads) * size for size in shapes}
    chunk = min(shapes, key=lambda size: (longest[size], -size))
    return chunk * together, together * lanes, shapes[chunk]


def winograd_cuts(chunks: int, tiles: int, threads: int) -> int:
    """Return into how many parts a Winograd kernel cuts the ``tiles`` of its output channels, for all threads to work.

    Each thread transforms the inputs of a chunk that it shares anew. At batch 4 the third stage of ResNet-20 is one
    chunk, and ran on one of two threads: a step took 1.95 ms, and takes 1.85 so (AVX-512; test_winograd.py).
    """
    if chunks >= 4 * threads:
        return 1
    return min(tiles, threads // math.gcd(chunks, threads))


def fuller(channels: int, usual: Tile, odd: Tile | None) -> Tile:
    """Return the tile that computes fewer channels that do not exist, the usual one unless it wastes a tenth more."""
    if odd is None:
        return usual
    computed = [-(-channels // tile[0]) * tile[0] for tile in (usual, odd)]
    return odd if computed[0] > 1.1 * computed[1] else usual


def _even(count: int, most: int) -> int:
    """Cut ``count`` into equal parts of at most ``most``; return a part's size."""
    parts = -(-count // most)
    return -(-count // parts)


# --- candidates of a calibration ---

# In accumulators along the channels and along the pixels or terms; more than 16 along the channels would read
# beyond what lies behind a row of weights or a bias (``arrays.READ_BEHIND``).
_SHAPES = ((1, 4), (1, 6), (1, 8), (1, 12), (1, 16), (2, 4), (2, 6), (2, 8), (3, 4), (4, 3), (4, 4), (4, 6), (6, 2),
           (6, 3), (6, 4), (8, 1), (8, 2), (8, 3), (12, 1), (12, 2), (16, 1))  # fmt: skip
_PARTS = (5, 7, 9, 13, 18, 25)  # most terms at once where a product has one channel or a map of its own per channel
_WASTE = 1.25  # a candidate may compute so many times what exists


def candidates(sizes: Sizes) -> list[Tile]:
    """Return the tiles worth trying for a product: the rule's first, then others that fit registers and sizes.

    Example:
        >>> sizes = Sizes("multiply", SAMPLES, 16, channels=32, pixels=256, terms=144)
        >>> candidates(sizes)[0] == rule(sizes), (5, 3) in candidates(sizes)
        (True, False)
    """
    usual, unit = rule(sizes), 1 if sizes.kind == SAMPLES else sizes.lanes
    wide = sizes.kind != DEPTHWISE and sizes.channels > 1
    if sizes.kernel == "correlate" and not wide:
        found = [(unit, _even(sizes.terms, most)) for most in _PARTS]
    else:
        found = [(rows * unit, width) for rows, width in _SHAPES if (rows > 1) <= wide]
    along = sizes.pixels if sizes.kernel == "multiply" else sizes.terms
    kept = [tile for tile in found if _fits(tile, unit) and _filled(tile, unit, sizes.channels, along)]
    return list(dict.fromkeys([usual, *kept]))


def _fits(tile: Tile, unit: int) -> bool:
    """Whether accumulators, one operand of every row or column and one more number fit the registers, and use them."""
    rows, registers = tile[0] // unit, target().registers
    accumulators = rows * tile[1]
    return accumulators >= (0.2 if rows == 1 else 0.4) * registers and accumulators + min(rows, tile[1]) < registers


def _filled(tile: Tile, unit: int, channels: int, along: int) -> bool:
    vectors = -(-channels // unit)
    computed = [-(-vectors // (tile[0] // unit)) * (tile[0] // unit), -(-along // tile[1]) * tile[1]]
    return computed[0] <= _WASTE * vectors and computed[1] <= _WASTE * along
