"""The packed payload: one byte string for one update.

Both ends know the names and shapes of the tensors (the spec), so the wire holds neither. Little-endian:

    magic "FKD" | format version u8 | codec id u8 | spec digest, 8 bytes
    for each tensor: form u8, and for a factored one its rank as a varint
    factors of every factored tensor in order (left [rows, K], then right [K, cols])
    values of every dense tensor in order

The exact length follows from the header and is checked before anything is allocated. Bytes from another machine are
only ever read as numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd_flwr.core.arrays import Array, Spec, TensorSpec, spec_digest
from fedkd_flwr.core.low_rank import Matrix, matrix_shape, multiply

MAGIC = b"FKD"
FORMAT_VERSION = 1
HEADER_BYTES = len(MAGIC) + 2 + 8
_FLOAT = np.dtype("<f4")
_MAX_VARINT_BYTES = 5  # ranks fit 32 bits


class PayloadError(ValueError):
    """Bytes that are not a payload of the expected kind. The message says what was expected and what was found."""


class Form(IntEnum):
    """How one tensor is written. Numbers are part of the format and never reused."""

    ZERO = 0
    DENSE_FLOAT32 = 1
    FACTORED_FLOAT32 = 5


@dataclass(frozen=True, slots=True)
class Zero:
    """A tensor of zeros: no bytes beyond its form."""


@dataclass(frozen=True, slots=True)
class Dense:
    """All values of a tensor, float32, in its own shape."""

    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Factored:
    """left @ right, with left [rows, K] and right [K, cols] of the tensor's matrix shape."""

    left: Matrix
    right: Matrix


Part = Zero | Dense | Factored


def pack(spec: Spec, parts: Mapping[str, Part], codec_id: int) -> bytes:
    """Write the parts of one update.

    Args:
        spec: the tensors, in order.
        parts: one for each tensor of the spec.
        codec_id: 0 to 255; `unpack` refuses another.

    Raises:
        ValueError: if dense values have another shape than their tensor.
    """
    table = bytearray()
    factors: list[bytes] = []
    dense: list[bytes] = []
    for tensor in spec:
        part = parts[tensor.name]
        if isinstance(part, Factored):
            table.append(Form.FACTORED_FLOAT32)
            table += _varint(part.left.shape[1])
            factors += [_bytes(part.left), _bytes(part.right)]
        elif isinstance(part, Dense):
            table.append(Form.DENSE_FLOAT32)
            if part.values.shape != tensor.shape:
                raise ValueError(f"tensor {tensor.name!r} has shape {tensor.shape}, got values of {part.values.shape}")
            dense.append(_bytes(part.values))
        else:
            table.append(Form.ZERO)
    header = MAGIC + bytes([FORMAT_VERSION, codec_id]) + spec_digest(spec)
    return b"".join([header, bytes(table), *factors, *dense])


def unpack(payload: bytes, spec: Spec, codec_id: int) -> dict[str, Part]:
    """Read what `pack` wrote.

    Raises:
        PayloadError: for anything else: another magic, version, codec or spec, an unknown form, a rank that the
            tensor can't have, a length other than the header asks for, a number that is not finite.
    """
    _check_header(payload, spec, codec_id)
    forms, offset = _read_table(payload, spec)
    expected = offset + sum(_FLOAT.itemsize * _num_values(tensor, form, rank) for tensor, form, rank in forms)
    if len(payload) != expected:
        raise PayloadError(f"payload must have {expected} bytes for its forms and ranks, got {len(payload)}")
    parts: dict[str, Part] = {}
    for tensor, form, rank in forms:
        if form is Form.FACTORED_FLOAT32:
            rows, cols = _matrix_shape(tensor)
            left, offset = _values(payload, offset, (rows, rank), tensor)
            right, offset = _values(payload, offset, (rank, cols), tensor)
            parts[tensor.name] = Factored(left, right)
    for tensor, form, _ in forms:
        if form is Form.DENSE_FLOAT32:
            values, offset = _values(payload, offset, tensor.shape, tensor)
            parts[tensor.name] = Dense(values)
        elif form is Form.ZERO:
            parts[tensor.name] = Zero()
    return parts


def to_arrays(spec: Spec, parts: Mapping[str, Part]) -> dict[str, Array]:
    """The update that the parts stand for: float32 arrays in the shapes of the spec.

    Both ends use this one function, so what an encoder believes is what a decoder gets.

    Raises:
        PayloadError: if a product of finite factors overflows float32.
    """
    arrays: dict[str, Array] = {}
    for tensor in spec:
        part = parts[tensor.name]
        if isinstance(part, Dense):
            arrays[tensor.name] = part.values
        elif isinstance(part, Factored):
            with np.errstate(over="ignore"):
                product = multiply(part.left, part.right)
            if not np.isfinite(product).all():
                raise PayloadError(f"tensor {tensor.name!r}: the product of its factors is not finite")
            arrays[tensor.name] = product.reshape(tensor.shape)
        else:
            arrays[tensor.name] = np.zeros(tensor.shape, np.float32)
    return arrays


def _check_header(payload: bytes, spec: Spec, codec_id: int) -> None:
    if len(payload) < HEADER_BYTES or not payload.startswith(MAGIC):
        raise PayloadError(f"a payload starts with {MAGIC!r} and has at least {HEADER_BYTES} bytes")
    version, codec = payload[3], payload[4]
    if version != FORMAT_VERSION:
        raise PayloadError(f"payload format must be {FORMAT_VERSION}, got {version}; run the same release on both ends")
    if codec != codec_id:
        raise PayloadError(f"codec id must be {codec_id}, got {codec}; both ends need the same compressor")
    if payload[5:HEADER_BYTES] != spec_digest(spec):
        raise PayloadError("payload is of a model with other tensors; both ends need the same experiment")


def _read_table(payload: bytes, spec: Spec) -> tuple[list[tuple[TensorSpec, Form, int]], int]:
    table: list[tuple[TensorSpec, Form, int]] = []
    offset = HEADER_BYTES
    for tensor in spec:
        if offset >= len(payload):
            raise PayloadError("payload ends within its table of forms")
        try:
            form = Form(payload[offset])
        except ValueError:
            raise PayloadError(f"tensor {tensor.name!r}: unknown form {payload[offset]}") from None
        offset += 1
        rank = 0
        if form is Form.FACTORED_FLOAT32:
            rank, offset = _read_varint(payload, offset)
            limit = min(_matrix_shape(tensor))
            if not 1 <= rank <= limit:
                raise PayloadError(f"tensor {tensor.name!r}: rank must be in [1, {limit}], got {rank}")
        table.append((tensor, form, rank))
    return table, offset


def _matrix_shape(tensor: TensorSpec) -> tuple[int, int]:
    shape = matrix_shape(tensor.shape)
    if shape is None:
        raise PayloadError(f"tensor {tensor.name!r} of shape {tensor.shape} has no factored form")
    return shape


def _num_values(tensor: TensorSpec, form: Form, rank: int) -> int:
    if form is Form.FACTORED_FLOAT32:
        return rank * sum(_matrix_shape(tensor))
    return tensor.size if form is Form.DENSE_FLOAT32 else 0


def _values(payload: bytes, offset: int, shape: tuple[int, ...], tensor: TensorSpec) -> tuple[NDArray[np.float32], int]:
    count = int(np.prod(shape, dtype=np.int64))
    values = np.frombuffer(payload, _FLOAT, count, offset).astype(np.float32).reshape(shape)
    if not np.isfinite(values).all():
        raise PayloadError(f"tensor {tensor.name!r} holds numbers that are not finite")
    return values, offset + count * _FLOAT.itemsize


def _bytes(values: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values, _FLOAT).tobytes()


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(payload: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if offset + index >= len(payload):
            raise PayloadError("payload ends within a number of its table")
        byte = payload[offset + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, offset + index + 1
    raise PayloadError(f"a number in the payload's table is longer than {_MAX_VARINT_BYTES} bytes")
