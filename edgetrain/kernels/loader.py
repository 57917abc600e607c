"""Machine code into memory: links an ELF object of the cache, so that a process with a full cache needs no LLVM.

LLVM's library, which can do the same, takes 40 to 100 MiB of resident memory and a tenth of a second to start; of
LeNet-5's 150 MiB it was 100 (docs/performance.md). Objects are position-independent and small (``compiler``): an x86-64
object has four kinds of relocation, an AArch64 object a dozen. Formats: System V ABI, chapter 4 (ELF) and its
supplements for x86-64 (section 4.4) and for the Arm 64-bit architecture (AAELF64, section 5.7).
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass

from edgetrain.errors import GraphError

_RELA, _NOBITS, _ALLOCATED = 4, 8, 2  # types of sections, and the flag of those that are wanted in memory
_UNWINDING = ".eh_frame"  # kernels raise nothing
_X86_64, _AARCH64 = 62, 183
# Jumps to the address in the 8 bytes behind it; that place also serves as the entry of a table of addresses.
_STUBS = {
    _X86_64: bytes.fromhex("ff2502000000cccc"),  # jmp [rip + 2]; two bytes that are never reached
    _AARCH64: bytes.fromhex("5000005800021fd6"),  # ldr x16, #8; br x16
}
_STUB = 16
_MMAP_ARGUMENTS = (ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)  # behind the address


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    flags: int
    file_offset: int
    size: int
    link: int
    info: int
    alignment: int


@dataclass(frozen=True)
class _Place:
    """What a relocation reads and writes: S + A, P, and where the address of S is kept if it lies outside."""

    image: bytearray
    offset: int
    address: int
    target: int
    slot: int

    @property
    def distance(self) -> int:
        """From the place to the target."""
        return self.target - self.address

    def put(self, number: int, size: int, what: str) -> None:
        """Write a signed or unsigned number of ``size`` bytes."""
        if not -(1 << 8 * size - 1) <= number < 1 << 8 * size:
            raise GraphError(f"compiled code: {what} does not fit {size} bytes")
        self.image[self.offset : self.offset + size] = (number % (1 << 8 * size)).to_bytes(size, "little")

    def insert(self, value: int, low: int, bits: int) -> None:
        """Write ``bits`` bits of ``value`` into the instruction, from bit ``low`` on."""
        mask = ((1 << bits) - 1) << low
        word = int.from_bytes(self.image[self.offset : self.offset + 4], "little")
        self.image[self.offset : self.offset + 4] = (word & ~mask | value << low & mask).to_bytes(4, "little")

    def insert_page(self, target: int) -> None:
        """Write the distance in pages of 4 KiB into an adrp instruction."""
        pages = (target >> 12) - (self.address >> 12)
        self.insert(pages, 29, 2)
        self.insert(pages >> 2, 5, 19)


def _low_bits(shift: int) -> Callable[[_Place], None]:
    """Return a writer of the offset in a page, counted in units of ``1 << shift`` bytes."""
    return lambda p: p.insert((p.target & 0xFFF) >> shift, 10, 12)


_RELOCATIONS: dict[int, dict[int, Callable[[_Place], None]]] = {
    _X86_64: {
        1: lambda p: p.put(p.target, 8, "R_X86_64_64"),
        2: lambda p: p.put(p.distance, 4, "R_X86_64_PC32"),
        4: lambda p: p.put(p.distance, 4, "R_X86_64_PLT32"),
        24: lambda p: p.put(p.distance, 8, "R_X86_64_PC64"),
    },
    _AARCH64: {
        257: lambda p: p.put(p.target, 8, "R_AARCH64_ABS64"),
        260: lambda p: p.put(p.distance, 8, "R_AARCH64_PREL64"),
        261: lambda p: p.put(p.distance, 4, "R_AARCH64_PREL32"),
        275: lambda p: p.insert_page(p.target),  # ADR_PREL_PG_HI21
        277: _low_bits(0),  # ADD_ABS_LO12_NC
        278: _low_bits(0),  # LDST8_ABS_LO12_NC
        282: lambda p: p.insert(p.distance >> 2, 0, 26),  # JUMP26
        283: lambda p: p.insert(p.distance >> 2, 0, 26),  # CALL26
        284: _low_bits(1),  # LDST16_ABS_LO12_NC
        285: _low_bits(2),  # LDST32_ABS_LO12_NC
        286: _low_bits(3),  # LDST64_ABS_LO12_NC
        299: _low_bits(4),  # LDST128_ABS_LO12_NC
        311: lambda p: p.insert_page(p.slot),  # ADR_GOT_PAGE
        312: lambda p: p.insert((p.slot & 0xFFF) >> 3, 10, 12),  # LD64_GOT_LO12_NC
    },
}


_BY_TABLE = (311, 312)  # of AArch64: they read an address from a table, which only symbols outside have a place in


class ElfObject:
    """A relocatable object of a 64-bit machine with low bytes first.

    Raises:
        GraphError: not such an object, or for a machine that kernels are not compiled for.
    """

    def __init__(self, content: bytes) -> None:
        if content[:6] != b"\x7fELF\x02\x01":
            raise GraphError("compiled code: no ELF object of 64 bits with low bytes first")
        self._content = content
        self.machine: int = struct.unpack_from("<H", content, 18)[0]
        if self.machine not in _STUBS:
            raise GraphError(f"compiled code: for machine {self.machine}, expected x86-64 (62) or AArch64 (183)")
        self._sections = self._read_sections()
        self._symbols = self._read_symbols()
        self.offsets, end = self._lay_out()
        outside = sorted({name for name, section, _ in self._symbols if section == 0 and name})
        self._stubs = {name: end + _STUB * number for number, name in enumerate(outside)}
        self.size = end + _STUB * len(outside)

    def link(self, base: int, outside: Callable[[str], int]) -> bytes:
        """Return the image that belongs at address ``base``.

        Args:
            base: a multiple of the page size.
            outside: returns the address of a function that the object needs.

        Raises:
            GraphError: a relocation of a kind that is not known here.
        """
        image = bytearray(self.size)
        for number, offset in self.offsets.items():
            section = self._sections[number]
            if section.kind != _NOBITS:
                image[offset : offset + section.size] = self._bytes(section)
        for name, offset in self._stubs.items():
            image[offset : offset + _STUB] = _STUBS[self.machine] + struct.pack("<Q", outside(name))
        for section in self._sections:
            if section.kind == _RELA and section.info in self.offsets:
                self._relocate(section, image, base)
        return bytes(image)

    def address(self, symbol: str) -> int:
        """Return the offset of a function in the image.

        Raises:
            GraphError: there is none of that name.
        """
        for name, section, value in self._symbols:
            if name == symbol and section in self.offsets:
                return self.offsets[section] + value
        raise GraphError(f"compiled code: no function '{symbol}'")

    def _relocate(self, section: _Section, image: bytearray, base: int) -> None:
        for where, info, addend in struct.iter_unpack("<QQq", self._bytes(section)):
            offset, (name, index, value) = self.offsets[section.info] + where, self._symbols[info >> 32]
            stub = self._stubs.get(name, 0) if index == 0 else 0
            target = stub if index == 0 else self.offsets[index] + value
            kind, known = info & 0xFFFFFFFF, _RELOCATIONS[self.machine]
            if kind not in known or (kind in _BY_TABLE and not stub):
                raise GraphError(f"compiled code: relocation {kind} of machine {self.machine} is not known")
            known[kind](_Place(image, offset, base + offset, base + target + addend, base + stub + _STUB - 8))

    def _bytes(self, section: _Section) -> bytes:
        return self._content[section.file_offset : section.file_offset + section.size]

    def _read_sections(self) -> list[_Section]:
        table: int = struct.unpack_from("<Q", self._content, 40)[0]
        count, names = struct.unpack_from("<HH", self._content, 60)
        heads = [struct.unpack_from("<IIQQQQIIQQ", self._content, table + 64 * number) for number in range(count)]
        return [
            _Section(self._text(heads[names][4] + name), kind, flags, offset, size, link, info, max(1, alignment))
            for name, kind, flags, _, offset, size, link, info, alignment, _ in heads
        ]

    def _read_symbols(self) -> list[tuple[str, int, int]]:
        """Return (name, section, offset in it) of every symbol; section 0 is outside."""
        found = []
        for table in (section for section in self._sections if section.kind == 2):
            strings = self._sections[table.link].file_offset
            for name, _, _, section, value, _ in struct.iter_unpack("<IBBHQQ", self._bytes(table)):
                found.append((self._text(strings + name), section, value))
        return found

    def _text(self, start: int) -> str:
        return self._content[start : self._content.index(b"\0", start)].decode()

    def _lay_out(self) -> tuple[dict[int, int], int]:
        """Return where the sections that are wanted in memory begin, and where stubs may follow."""
        offsets, end = {}, 0
        for number, section in enumerate(self._sections):
            if section.flags & _ALLOCATED and section.name != _UNWINDING:
                offsets[number] = -(-end // section.alignment) * section.alignment
                end = offsets[number] + section.size
        return offsets, -(-end // _STUB) * _STUB


def load(symbol: str, content: bytes) -> int:
    """Put an object into memory for good, and return the address of its function ``symbol``.

    Raises:
        GraphError: the object cannot be linked, or the system refuses memory that may be executed.
    """
    linked, library = ElfObject(content), ctypes.CDLL(None, use_errno=True)
    # Not an object of Python's module mmap: that would be unmapped when the interpreter ends, while waiting threads may
    # still run the code.
    library.mmap.restype, library.mmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, *_MMAP_ARGUMENTS)
    library.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    writable, code = mmap.PROT_READ | mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_EXEC
    base = library.mmap(None, linked.size, writable, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if base == ctypes.c_void_p(-1).value:
        raise GraphError(f"no memory for {linked.size} bytes of code (errno {ctypes.get_errno()})")
    ctypes.memmove(base, linked.link(base, _library_address), linked.size)
    # From now on it is code: the kernel makes the processor's instruction cache agree when pages become executable.
    if library.mprotect(base, linked.size, code):
        raise GraphError(f"the system refuses executable memory (errno {ctypes.get_errno()}); kernels cannot run here")
    return int(base) + linked.address(symbol)


def _library_address(name: str) -> int:
    try:
        address = ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value
    except AttributeError as error:
        raise GraphError(f"compiled code needs '{name}', which this process does not have") from error
    return int(address or 0)
