"""Entropy-coded integers of many tensors in one block.

All of them are multiples of one step, corrected by a power of 2**(1/8) that has eight significant bits. Integers and
powers together have so few digits that float64 holds products and sums of factors exactly, whatever their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd_flwr.core.entropy_coding import (
    BitReader,
    BitWriter,
    Ints,
    group_of,
    read_flags,
    read_integers,
    write_flags,
    write_integers,
)

NUM_CODES = 256
UNIT_CODE = 8  # of a dense tensor's correction: no correction
MAX_MAGNITUDE = 2**15 - 1
_PER_OCTAVE = 8
_MANTISSAS = np.array([256, 235, 215, 197, 181, 166, 152, 140]) / 256  # 2**(-i/8), eight bits each
_EXACT_BITS = 53

Rows = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CodedDense:
    """Values step * power(correction) * integers, for the rows that are named; 0 elsewhere.

    Attributes:
        integers: in the order of memory, of the named rows only.
        correction: 0 to 15; the values are scaled by 2**((8 - correction) / 8).
        spread: 0 to 15, half the octaves of the integers' variance, plus 3.
        rows: which rows of the matrix are written; None: all.
    """

    integers: Ints
    correction: int
    spread: int
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class CodedFactored:
    """The matrix step * sum_k 2**(-codes[k] / 8) * left[:, k] right[k], for the rows that are named; 0 elsewhere.

    Attributes:
        left: integers, shape [rows named, K].
        right: integers, shape [K, cols].
        codes: shape [K], 0 to 255. They tell the size of the integers too: about 2**(code / 8) is the norm of a column.
        rows: which rows of the matrix are written; None: all.
    """

    left: Ints
    right: Ints
    codes: NDArray[np.uint8]
    rows: Rows | None = None


Coded = CodedDense | CodedFactored


@dataclass(frozen=True, slots=True)
class Shape:
    """What a reader knows of a coded tensor before its bits: matrix shape, rank (0: dense), whether rows are named."""

    rows: int
    cols: int
    rank: int
    names_rows: bool

    @property
    def num_code_bytes(self) -> int:
        """Bytes that stand before the bits."""
        return self.rank or 1


def powers(codes: NDArray[Any]) -> NDArray[np.float64]:
    """2**(-code / 8) with eight significant bits, exactly the same everywhere."""
    wide = np.asarray(codes, np.int64)
    found: NDArray[np.float64] = np.ldexp(_MANTISSAS[wide % _PER_OCTAVE], -(wide // _PER_OCTAVE))
    return found


def code_of(ratio: NDArray[Any]) -> NDArray[np.uint8]:
    """The code whose power is nearest to 1 / ratio, for ratios of at least 1."""
    exact = np.rint(_PER_OCTAVE * np.log2(np.maximum(ratio, 1.0)))
    codes: NDArray[np.uint8] = np.minimum(exact, NUM_CODES - 1).astype(np.uint8)
    return codes


def spread_of(integers: Ints) -> int:
    """The spread that suits the integers' mean square."""
    mean_square = float(np.square(integers, dtype=np.float64).mean()) if integers.size else 0.0
    return int(np.clip((np.floor(np.log2(max(mean_square, 2.0**-6))) + 7) // 2, 0, 15))


def is_exact(part: CodedFactored) -> bool:
    """Whether every sum of the product fits float64, so that its order does not matter."""
    if (max(np.abs(part.left).max(initial=0), np.abs(part.right).max(initial=0))) > MAX_MAGNITUDE:
        return False
    largest = np.abs(part.left).max(axis=0, initial=0).astype(np.int64) * np.abs(part.right).max(axis=1, initial=0)
    scale = powers(part.codes)
    unit = float(np.ldexp(1.0, -(int(part.codes.max(initial=0)) // _PER_OCTAVE) - 8))
    return bool((largest * scale).sum() / unit < 2.0**_EXACT_BITS)


def write_coded(parts: Sequence[Coded]) -> bytes:
    """Codes of all parts, then the named rows, then the integers."""
    codes = bytearray()
    writer = BitWriter()
    for part in parts:
        codes += (
            part.codes.tobytes() if isinstance(part, CodedFactored) else bytes([part.correction | part.spread << 4])
        )
        if part.rows is not None:
            write_flags(part.rows, writer)
    integers = [piece for part in parts for piece in _pieces(part)]
    groups = [_groups_of(part) for part in parts]
    if parts:
        write_integers(np.concatenate(integers), np.concatenate(groups), writer)
    return bytes(codes) + writer.to_bytes()


def read_coded(data: bytes | memoryview, shapes: Sequence[Shape]) -> list[Coded]:
    """Read what `write_coded` wrote for parts of these shapes.

    Raises:
        CodingError: if the bits can't have been written so.
        IndexError: if there are fewer bytes than codes.
    """
    num_codes = sum(shape.num_code_bytes for shape in shapes)
    if len(data) < num_codes:
        raise IndexError("the coded numbers end within their scales")
    reader = BitReader(data[num_codes:])
    codes: list[NDArray[np.uint8]] = []
    masks: list[Rows | None] = []
    offset = 0
    for shape in shapes:
        codes.append(np.frombuffer(data, np.uint8, shape.num_code_bytes, offset))
        masks.append(read_flags(shape.rows, reader) if shape.names_rows else None)
        offset += shape.num_code_bytes
    nums = [s.rows if mask is None else int(np.count_nonzero(mask)) for s, mask in zip(shapes, masks, strict=True)]
    groups = [_groups(num, s.cols, s.rank, code) for num, s, code in zip(nums, shapes, codes, strict=True)]
    if not shapes:
        reader.finish()
        return []
    values = read_integers(np.concatenate(groups), reader)
    reader.finish()
    ends = np.cumsum([group.size for group in groups])
    parts: list[Coded] = []
    for mine, num, shape, code, mask in zip(np.split(values, ends[:-1]), nums, shapes, codes, masks, strict=True):
        if shape.rank:
            left, right = np.split(mine, [num * shape.rank])
            factors = left.reshape(shape.rank, num).T, right.reshape(shape.rank, shape.cols)
            parts.append(CodedFactored(*factors, code, mask))
        else:
            parts.append(CodedDense(mine, int(code[0]) & 0x0F, int(code[0]) >> 4, mask))
    return parts


def to_matrix(part: Coded, step: float, shape: tuple[int, int]) -> NDArray[np.float32]:
    """The values of a part, in its matrix shape: exact in float64, rounded once to float32."""
    if isinstance(part, CodedFactored):
        exact = part.left.astype(np.float64) @ (part.right * powers(part.codes)[:, None])
    else:
        exact = (part.integers * (2 * powers(np.array([part.correction])))).reshape(-1, shape[1])
    values = np.empty(exact.shape, np.float32)
    np.multiply(exact, step, out=values, dtype=np.float64, casting="unsafe")
    if part.rows is None:
        return values
    whole = np.zeros(shape, np.float32)
    whole[part.rows] = values
    return whole


def _pieces(part: Coded) -> list[Ints]:
    if isinstance(part, CodedFactored):
        return [part.left.T.reshape(-1), part.right.reshape(-1)]
    return [part.integers]


def _groups_of(part: Coded) -> NDArray[np.int8]:
    if isinstance(part, CodedDense):
        return np.full(part.integers.size, 2 * part.spread - 6, np.int8)
    return _groups(part.left.shape[0], part.right.shape[1], part.codes.size, part.codes)


def _groups(num_rows: int, cols: int, rank: int, codes: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The group of each integer, in the order of `_pieces`: known from the codes. Rank 0: a dense tensor."""
    if not rank:
        return np.full(num_rows * cols, 2 * (int(codes[0]) >> 4) - 6, np.int8)
    of_left = np.array([group_of(int(code), max(num_rows, 1)) for code in codes], np.int8)
    of_right = np.array([group_of(int(code), max(cols, 1)) for code in codes], np.int8)
    return np.concatenate([np.repeat(of_left, num_rows), np.repeat(of_right, cols)])
