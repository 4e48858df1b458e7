"""Integers in about as few bits as their entropy, without a loop over them.

Small integers around zero are written as planes of flags: which are not 0, which of those are beyond 1, beyond 2, and
so on. In each plane the rarer flag is found by its distances, and those are Golomb-Rice codes (Golomb 1966; Rice and
Plaut 1971), optimal for independent flags up to a few per cent. The Rice parameter follows from the number of flags,
which is written; quotients and remainders lie apart, so both ends work on whole arrays. Only integers are computed:
every machine reads the same numbers.

Integers are coded in groups of about equal spread, because flags are then about equally likely. The group of each is
known at both ends.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]  # of any width
Bits = NDArray[np.uint8]

MIN_GROUP, MAX_GROUP = -10, 40  # floor(log2(variance)) of the integers in a group
MAX_INTEGER = 2**31 - 1
_MAX_PLANES = 16  # what is larger than this many units is written out
_WIDTH_BITS = 6
# The Rice parameter is best near log2(ln(golden ratio) * mean distance): Kiely, IPN Progress Report 42-159, 2004.
_GOLDEN = (4812, 10_000)


class CodingError(ValueError):
    """Bits that no encoder wrote."""


@dataclass
class BitWriter:
    """Bits one after the other; whole bytes in the end."""

    _parts: list[Bits] = field(default_factory=list)

    def bits(self, bits: Bits) -> None:
        """Append bits, each a 0 or 1."""
        self._parts.append(bits)

    def number(self, value: int, width: int) -> None:
        """Append one number of `width` bits, the highest bit first."""
        self.bits(np.array([value >> bit & 1 for bit in range(width - 1, -1, -1)], np.uint8))

    def numbers(self, values: Ints, width: int) -> None:
        """Append the lowest `width` bits of each number, the highest of them first."""
        if width and values.size:
            bits = np.empty((values.size, width), np.uint8)
            for column in range(width):  # one at a time: all together would be 64 times as large as what is written
                bits[:, column] = values >> (width - 1 - column) & 1
            self.bits(bits.reshape(-1))

    def to_bytes(self) -> bytes:
        """Everything, filled with zeros to a whole byte."""
        return np.packbits(np.concatenate(self._parts)).tobytes() if self._parts else b""


class BitReader:
    """Reads what `BitWriter` wrote.

    Raises:
        CodingError: from every method, where the bits end too early.
    """

    def __init__(self, data: bytes) -> None:
        self._bits = np.unpackbits(np.frombuffer(data, np.uint8))
        self._at = 0

    def bits(self, count: int) -> Bits:
        """The next `count` bits."""
        found = self._bits[self._at : self._at + count]
        if found.size < count:
            raise CodingError("the coded numbers end too early")
        self._at += count
        return found

    def numbers(self, count: int, width: int) -> Ints:
        """The next `count` numbers of `width` bits each."""
        read: Ints = np.zeros(count, np.int64)
        for column in self.bits(count * width).reshape(count, width).T:
            read <<= 1
            read |= column
        return read

    def unary(self, count: int, most: int) -> Ints:
        """The next `count` unary numbers (so many 0 and a 1), whose sum may be at most `most`."""
        window = self._bits[self._at : self._at + count + most]
        ends = np.flatnonzero(window)[:count]
        if ends.size < count:
            raise CodingError("the coded numbers end too early")
        if count:
            self._at += int(ends[-1]) + 1
        return np.diff(ends, prepend=-1) - 1

    def finish(self) -> None:
        """Refuse anything but the filling of the last byte."""
        rest = self._bits[self._at :]
        if rest.size >= 8 or rest.any():
            raise CodingError("there are bytes after the coded numbers")


def group_of(variance_code: int, num_values: int) -> int:
    """Group of integers whose mean square is about 2**(variance_code / 4) / num_values.

    Args:
        variance_code: any integer.
        num_values: at least 1.
    """
    quarter_octaves = (num_values**4).bit_length() - 1
    return min(max((variance_code - quarter_octaves) // 4, MIN_GROUP), MAX_GROUP)


def write_integers(values: Ints, groups: NDArray[np.int8], writer: BitWriter) -> None:
    """Write integers, group by group.

    Args:
        values: shape [N], magnitudes at most `MAX_INTEGER`.
        groups: shape [N], the group of each.
        writer: takes the bits.
    """
    for group in np.unique(groups):
        _write_group(values[groups == group], _num_low_bits(int(group)), writer)


def read_integers(groups: NDArray[np.int8], reader: BitReader) -> Ints:
    """Read the integers that `write_integers` wrote for the same groups, as int32.

    Raises:
        CodingError: if the bits can't have been written so.
    """
    values = np.zeros(groups.size, np.int32)
    for group in np.unique(groups):
        members = groups == group
        values[members] = _read_group(int(np.count_nonzero(members)), _num_low_bits(int(group)), reader)
    return values


def write_flags(flags: NDArray[np.bool_], writer: BitWriter) -> int:
    """Write which flags are set; return how many are."""
    count, size = int(np.count_nonzero(flags)), flags.size
    writer.number(count, size.bit_length())
    inverted = 2 * count > size
    num_positions = size - count if inverted else count
    if num_positions:
        positions = (~flags if inverted else flags).nonzero()[0]
        gaps = positions.copy()
        gaps[1:] -= positions[:-1] + 1
        width = _rice_width(size, num_positions)
        ends = (gaps >> width).cumsum()
        ends += np.arange(num_positions)
        unary = np.zeros(int(ends[-1]) + 1, np.uint8)
        unary[ends] = 1
        writer.bits(unary)
        writer.numbers(gaps, width)
    return count


def read_flags(size: int, reader: BitReader) -> NDArray[np.bool_]:
    """Read what `write_flags` wrote for `size` flags.

    Raises:
        CodingError: if the bits can't have been written so.
    """
    count = int(reader.numbers(1, size.bit_length())[0])
    if count > size:
        raise CodingError("more flags are set than there are")
    inverted = 2 * count > size
    num_positions = size - count if inverted else count
    width = _rice_width(size, num_positions)
    quotients = reader.unary(num_positions, size >> width)
    positions = np.cumsum((quotients << width) + reader.numbers(num_positions, width) + 1) - 1
    if positions.size and positions[-1] >= size:
        raise CodingError("a flag lies outside its plane")
    flags = np.zeros(size, np.bool_)
    flags[positions] = True
    return ~flags if inverted else flags


def _rice_width(size: int, count: int) -> int:
    if count == 0:
        return 0
    return ((2 * size - count) * _GOLDEN[0] // (2 * count * _GOLDEN[1])).bit_length()


def _num_low_bits(group: int) -> int:
    """Lowest bits that are as good as random in a group of this variance, and written as they are."""
    return max(0, group // 2 - 1)


def _write_group(values: Ints, num_low_bits: int, writer: BitWriter) -> None:
    sizes = np.abs(values)
    high = sizes >> num_low_bits
    alive = high
    for plane in range(_MAX_PLANES):
        beyond = alive > plane
        if not write_flags(beyond, writer):
            break
        alive = alive[beyond]
    else:
        excess = alive - _MAX_PLANES
        width = int(excess.max()).bit_length() if excess.size else 0
        writer.number(width, _WIDTH_BITS)
        writer.numbers(excess, width)
    writer.numbers(sizes, num_low_bits)
    writer.bits((values[sizes > 0] < 0).astype(np.uint8))


def _read_group(count: int, num_low_bits: int, reader: BitReader) -> Ints:
    high = np.zeros(count, np.int64)
    alive = np.arange(count)
    for _ in range(_MAX_PLANES):
        beyond = read_flags(alive.size, reader)
        alive = alive[beyond]
        if not alive.size:
            break
        high[alive] += 1
    else:
        width = int(reader.numbers(1, _WIDTH_BITS)[0])
        if width > MAX_INTEGER.bit_length():
            raise CodingError(f"a coded number has {width} bits, at most {MAX_INTEGER.bit_length()} are allowed")
        high[alive] += reader.numbers(alive.size, width)
    sizes = (high << num_low_bits) + reader.numbers(count, num_low_bits)
    if sizes.max(initial=0) > MAX_INTEGER:
        raise CodingError(f"a coded number is above {MAX_INTEGER}")
    negative = np.zeros(count, np.bool_)
    negative[sizes > 0] = reader.bits(int(np.count_nonzero(sizes))).astype(np.bool_)
    return np.where(negative, -sizes, sizes)
