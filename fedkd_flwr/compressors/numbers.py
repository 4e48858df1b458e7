"""Numbers at a fixed width: 32 or 16 bit floats, 8 or 4 bit integers with a scale.

Scales of integers are bfloat16, rounded before anything is divided by them. Integer times scale has so few digits that
float64 holds every product and sum of them exactly: all processors decode to the same bytes.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Precision = Literal["float32", "float16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8", "int4")
BLOCK = 64  # integers that share a scale, where they are not the columns of a factor

_FLOAT32, _FLOAT16 = np.dtype("<f4"), np.dtype("<f2")
_BFLOAT16, _EXPONENT = np.dtype("<u2"), np.dtype("<i2")
_WIDTHS = {"float32": 32, "float16": 16, "int8": 8, "int4": 4}
_SMALLEST_SHARE = 2.0**-20  # of a scale in the largest
_FLOAT16_TOP = 15  # values are moved below 2**15 before they become float16, whose largest is 65504
Floats = NDArray[np.float64]


class NumbersError(ValueError):
    """Bytes that are no numbers of the kind."""


def num_bytes(count: int, precision: Precision) -> int:
    """Bytes of `count` numbers with their scales."""
    body = -(-count * _WIDTHS[precision] // 8)
    if precision == "float16":
        return body + _EXPONENT.itemsize
    return body + (-(-count // BLOCK) * _BFLOAT16.itemsize if precision in ("int8", "int4") else 0)


def write_numbers(values: NDArray[Any], precision: Precision) -> bytes:
    """Write numbers in the order of memory; `read_numbers` gives them back up to rounding.

    The largest error is 2**-11 of the largest value for float16, and 1/254 (int8) or 1/14 (int4) of the largest in each
    block of 64, all but 1 %: the scale is rounded too.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    if precision == "float32":
        return flat.astype(_FLOAT32).tobytes()
    if precision == "float16":
        exponent = _exponent_of(flat) - _FLOAT16_TOP
        scaled = np.ldexp(flat.astype(np.float64), -exponent).astype(_FLOAT16)
        return np.array(exponent, _EXPONENT).tobytes() + scaled.tobytes()
    top = _top(precision)
    blocks = _in_blocks(flat.astype(np.float64))
    scales = round_up_to_bfloat16(np.abs(blocks).max(axis=1, initial=0.0) / top)
    integers = np.rint(blocks / np.where(scales > 0, scales, 1.0)[:, None]).reshape(-1)[: flat.size]
    return to_bfloat16_bits(scales).tobytes() + pack_integers(integers.astype(np.int8), precision)


def read_numbers(data: bytes, offset: int, count: int, precision: Precision) -> Floats:
    """Numbers that start at an offset, as float64.

    Raises:
        NumbersError: if one is not finite, or a scale is not a number of at least 0.
    """
    if precision == "float32":
        return _finite(np.frombuffer(data, _FLOAT32, count, offset))
    if precision == "float16":
        exponent = int(np.frombuffer(data, _EXPONENT, 1, offset)[0])
        halves = np.frombuffer(data, _FLOAT16, count, offset + _EXPONENT.itemsize)
        scaled: Floats = np.ldexp(_finite(halves), min(max(exponent, -1000), 500))
        return scaled
    num_blocks = -(-count // BLOCK)
    scales = read_scales(data, offset, num_blocks)
    integers = unpack_integers(data, offset + num_blocks * _BFLOAT16.itemsize, count, precision)
    values: Floats = integers * np.repeat(scales, BLOCK)[:count]
    return values


def write_scaled_columns(left: NDArray[Any], right: NDArray[Any], precision: Precision) -> bytes:
    """Write the factors left [rows, K] and right [K, cols] as integers with one scale for each rank."""
    top = _top(precision)
    left_step = np.abs(left).max(axis=0, initial=0.0).astype(np.float64) / top
    left_step[left_step == 0] = 1.0
    scales = round_up_to_bfloat16(left_step * np.abs(right).max(axis=1, initial=0.0) / top)
    # Too small to show beside the largest; without it no sum has more digits than float64.
    scales[scales < scales.max(initial=0.0) * _SMALLEST_SHARE] = 0.0
    right_step = np.where(scales > 0, scales / left_step, np.inf)
    of_left, of_right = np.rint(left / left_step), np.rint(right / right_step[:, None])
    integers = np.concatenate([of_left.reshape(-1), of_right.reshape(-1)]).astype(np.int8)
    return to_bfloat16_bits(scales).tobytes() + pack_integers(integers, precision)


def read_scaled_columns(
    data: bytes, offset: int, shape: tuple[int, int], rank: int, precision: Precision
) -> tuple[Floats, Floats]:
    """Factors of a matrix of this shape; the scales are folded into the right one.

    Raises:
        NumbersError: if a scale is not a number of at least 0.
    """
    rows, cols = shape
    scales = read_scales(data, offset, rank)
    integers = unpack_integers(data, offset + rank * _BFLOAT16.itemsize, rank * (rows + cols), precision)
    left, right = integers[: rank * rows].reshape(rows, rank), integers[rank * rows :].reshape(rank, cols)
    return left, right * scales[:, None]


def num_bytes_of_scaled_columns(shape: tuple[int, int], rank: int, precision: Precision) -> int:
    """Bytes of factors with one scale for each rank."""
    return rank * _BFLOAT16.itemsize + -(-rank * sum(shape) * _WIDTHS[precision] // 8)


def round_up_to_bfloat16(values: Floats) -> Floats:
    """The next bfloat16 (8 significant bits, the exponents of float32) that is not smaller; values at least 0."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    low = values > bits.astype(np.uint32).view(np.float32)  # float32 may have rounded down
    rounded = (bits + low + 0xFFFF) & 0xFFFF0000
    found: Floats = np.minimum(rounded, 0x7F7F0000).astype(np.uint32).view(np.float32).astype(np.float64)
    return found


def to_bfloat16_bits(values: Floats) -> NDArray[np.uint16]:
    """The bits of numbers that are bfloat16 already."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(_BFLOAT16)


def read_scales(data: bytes, offset: int, count: int) -> Floats:
    """Numbers of at least 0, stored as bfloat16.

    Raises:
        NumbersError: for anything else.
    """
    bits = np.frombuffer(data, _BFLOAT16, count, offset).astype(np.uint32) << 16
    scales = _finite(bits.view(np.float32))
    if (scales < 0).any():
        raise NumbersError("a scale is below 0")
    return scales


def pack_integers(values: NDArray[np.int8], precision: Precision) -> bytes:
    """One byte each, or two in a byte."""
    if precision == "int8":
        return values.tobytes()
    nibbles = np.zeros(values.size + values.size % 2, np.uint8)
    nibbles[: values.size] = values & 0x0F
    return (nibbles[0::2] | nibbles[1::2] << 4).tobytes()


def unpack_integers(data: bytes, offset: int, count: int, precision: Precision) -> Floats:
    """What `pack_integers` wrote."""
    if precision == "int8":
        return np.frombuffer(data, np.int8, count, offset).astype(np.float64)
    packed = np.frombuffer(data, np.uint8, -(-count // 2), offset)
    nibbles = np.stack([packed & 0x0F, packed >> 4], axis=1).reshape(-1)[:count].astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float64)


def _top(precision: Precision) -> int:
    return 127 if precision == "int8" else 7


def _exponent_of(values: NDArray[Any]) -> int:
    return int(np.frexp(np.abs(values).max(initial=0.0))[1])


def _in_blocks(values: Floats) -> Floats:
    return np.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)


def _finite(values: NDArray[Any]) -> Floats:
    # Before the cast, which warns of some NaNs.
    if not np.isfinite(values).all():
        raise NumbersError("holds numbers that are not finite")
    return values.astype(np.float64)
