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
_INT32_BITS = 31
_PIECE = 1 << 16  # numbers that are read at a time
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

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = np.frombuffer(data, np.uint8)  # a bit takes a byte once it is unpacked, so few are at a time
        self._at = 0

    def bits(self, count: int) -> Bits:
        """The next `count` bits."""
        self._require(count)
        found = self._window(count)
        self._at += count
        return found

    def numbers(self, count: int, width: int) -> Ints:
        """The next `count` numbers of `width` bits each."""
        self._require(count * width)
        read: Ints = np.zeros(count, np.int32 if width <= _INT32_BITS else np.int64)
        for start in range(0, count if width else 0, _PIECE):
            piece = read[start : start + _PIECE]
            for column in self.bits(piece.size * width).reshape(piece.size, width).T:
                piece <<= 1
                piece |= column
        return read

    def unary(self, count: int, most: int) -> Ints:
        """Running totals of the next `count` unary numbers (so many 0 and a 1), which sum to at most `most`."""
        self._require(count)  # each has a bit of its own
        totals: Ints = np.flatnonzero(self._window(count + most))[:count].astype(_index_type(count + most))
        if totals.size < count:
            raise CodingError("the coded numbers end too early")
        if count:
            self._at += int(totals[-1]) + 1
        totals -= _places(count)
        return totals

    def finish(self) -> None:
        """Refuse anything but the filling of the last byte."""
        if 8 * self._data.size - self._at >= 8 or self._window(8).any():
            raise CodingError("there are bytes after the coded numbers")

    def _window(self, most: int) -> Bits:
        """The next bits without moving on; fewer than `most` where the data ends."""
        first, skipped = divmod(self._at, 8)
        return np.unpackbits(self._data[first : -(-(self._at + most) // 8)])[skipped : skipped + most]

    def _require(self, count: int) -> None:
        if count > 8 * self._data.size - self._at:
            raise CodingError("the coded numbers end too early")


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


def most_bits_of_flags(size: int) -> int:
    """Bits that `write_flags` takes for `size` flags at most.

    Where one flag in m is of the rarer kind, that is 1 bit a flag while the width is 0, at most 1.08 at a width of 1
    (m = 2.58, where it begins), and less at greater ones; and the number of flags that are set.
    """
    return size.bit_length() + size + size // 8 + 1


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
    positions = reader.unary(num_positions, size >> width)
    positions <<= width
    positions += np.cumsum(reader.numbers(num_positions, width), dtype=positions.dtype)
    positions += _places(num_positions)
    if positions.size and positions[-1] >= size:
        raise CodingError("a flag lies outside its plane")
    flags = np.zeros(size, np.bool_)
    flags[positions] = True
    return ~flags if inverted else flags


def _places(count: int) -> Ints:
    """0 to `count` - 1, in as few bytes as hold them."""
    return np.arange(count, dtype=_index_type(count))


def _index_type(count: int) -> type[np.signedinteger[Any]]:
    """The integer type for this many places. Sums of damaged distances must fit in it, too."""
    return np.int32 if count <= MAX_INTEGER // 4 else np.int64


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
    high = np.zeros(count, np.uint8)  # planes passed, at most `_MAX_PLANES`
    alive = _places(count)
    excess: Ints = np.zeros(0, np.int64)
    for _ in range(_MAX_PLANES):
        alive = alive[read_flags(alive.size, reader)]
        if not alive.size:
            break
        high[alive] += 1
    else:
        width = int(reader.numbers(1, _WIDTH_BITS)[0])
        if width > MAX_INTEGER.bit_length():
            raise CodingError(f"a coded number has {width} bits, at most {MAX_INTEGER.bit_length()} are allowed")
        excess = reader.numbers(alive.size, width).astype(np.int64) + _MAX_PLANES
        if excess.max(initial=0) > MAX_INTEGER >> num_low_bits:
            raise CodingError(f"a coded number is above {MAX_INTEGER}")
    sizes = high.astype(np.int32)
    sizes[alive] = excess
    sizes <<= num_low_bits
    sizes += reader.numbers(count, num_low_bits)
    negative = np.zeros(count, np.bool_)
    negative[sizes > 0] = reader.bits(int(np.count_nonzero(sizes))).astype(np.bool_)
    np.negative(sizes, out=sizes, where=negative)
    return sizes
