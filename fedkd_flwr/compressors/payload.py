"""The packed payload: one byte string for one update.

Both ends know the names and shapes of the tensors (the spec), so the wire holds neither. Little-endian:

    magic "FKD" | format version u8 | codec id u8 | spec digest, 8 bytes
    for each tensor: form u8; for a factored one its rank, for a sparse one its count, as a varint
    numbers of a fixed width, of every tensor in order (`numbers.py`)
    if any tensor is coded: the step, float32
    positions of every sparse tensor, then all coded tensors (`coded.py`)

No encoder writes more bytes than all tensors take at float32 (`most_bytes`), so a longer payload is refused before any
of it is read. The length of everything at a fixed width follows from the table and is checked before anything is
allocated; what is coded can't ask for more than twice as many integers as its tensors have elements. Bytes from another
machine are only ever read as numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd_flwr.compressors.coded import Coded, CodedDense, CodedFactored, Shape, read_coded, to_matrix, write_coded
from fedkd_flwr.compressors.numbers import (
    PRECISIONS,
    Floats,
    NumbersError,
    Precision,
    num_bytes,
    num_bytes_of_scaled_columns,
    read_numbers,
    read_scaled_columns,
    write_numbers,
    write_scaled_columns,
)
from fedkd_flwr.core.arrays import FLOAT_BYTES, Array, Spec, TensorSpec, num_elements, spec_digest
from fedkd_flwr.core.entropy_coding import BitReader, BitWriter, CodingError, read_flags, write_flags
from fedkd_flwr.core.low_rank import matrix_shape, multiply

MAGIC = b"FKD"
FORMAT_VERSION = 2
HEADER_BYTES = len(MAGIC) + 2 + 8
_STEP = np.dtype("<f4")
_MAX_VARINT_BYTES = 5  # ranks and counts fit 32 bits


class PayloadError(ValueError):
    """Bytes that are not a payload of the expected kind. The message says what was expected and what was found."""


class Form(IntEnum):
    """How one tensor is written. Numbers are part of the format and never reused."""

    ZERO = 0
    DENSE_FLOAT32 = 1
    DENSE_FLOAT16 = 2
    DENSE_INT8 = 3
    DENSE_INT4 = 4
    FACTORED_FLOAT32 = 5
    FACTORED_FLOAT16 = 6
    FACTORED_INT8 = 7
    FACTORED_INT4 = 8
    SPARSE_FLOAT16 = 9
    CODED_DENSE = 10
    CODED_FACTORED = 11
    CODED_DENSE_ROWS = 12
    CODED_FACTORED_ROWS = 13


@dataclass(frozen=True, slots=True)
class Zero:
    """A tensor of zeros: no bytes beyond its form."""


@dataclass(frozen=True, slots=True)
class Dense:
    """All values of a tensor, in its own shape."""

    values: NDArray[Any]
    precision: Precision = "float32"


@dataclass(frozen=True, slots=True)
class Factored:
    """left @ right, with left [rows, K] and right [K, cols] of the tensor's matrix shape."""

    left: NDArray[Any]
    right: NDArray[Any]
    precision: Precision = "float32"


@dataclass(frozen=True, slots=True)
class Sparse:
    """Some values of a tensor, float16, and where they are: one flag for each element, in the order of memory."""

    values: NDArray[Any]
    chosen: NDArray[np.bool_]


Part = Zero | Dense | Factored | Sparse | CodedDense | CodedFactored

_DENSE = dict(zip(PRECISIONS, (Form.DENSE_FLOAT32, Form.DENSE_FLOAT16, Form.DENSE_INT8, Form.DENSE_INT4), strict=True))
_FACTORED = dict(
    zip(PRECISIONS, (Form.FACTORED_FLOAT32, Form.FACTORED_FLOAT16, Form.FACTORED_INT8, Form.FACTORED_INT4), strict=True)
)
_DENSE_PRECISION = {form: precision for precision, form in _DENSE.items()}
_FACTORED_PRECISION = {form: precision for precision, form in _FACTORED.items()}
_CODED_FACTORED = (Form.CODED_FACTORED, Form.CODED_FACTORED_ROWS)
_CODED = (Form.CODED_DENSE, Form.CODED_DENSE_ROWS, *_CODED_FACTORED)
_WITH_COUNT = (*_FACTORED_PRECISION, Form.SPARSE_FLOAT16, *_CODED_FACTORED)


@dataclass(frozen=True, slots=True)
class Parts:
    """One update, part by part.

    Attributes:
        by_name: one part for each tensor.
        step: of all coded parts.
    """

    by_name: Mapping[str, Part]
    step: float = 1.0


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of the table."""

    tensor: TensorSpec
    form: Form
    count: int = 0  # rank, or number of values of a sparse tensor


def most_bytes(spec: Spec) -> int:
    """Length of the longest payload that an encoder writes: every tensor at float32, a form for each, the header.

    Each form has a bound of its own below that. Dense numbers take at most four bytes each, their scales included. An
    encoder factors a matrix only where the factors hold fewer numbers than the matrix. It falls back to float32 where
    sparse or coded tensors would take more.

    Args:
        spec: the tensors, in order.
    """
    return HEADER_BYTES + len(spec) + FLOAT_BYTES * num_elements(spec)


def pack(spec: Spec, parts: Parts, codec_id: int) -> bytes:
    """Write the parts of one update.

    Args:
        spec: the tensors, in order.
        parts: one for each tensor of the spec.
        codec_id: 0 to 255; `unpack` refuses another.

    Raises:
        ValueError: if dense values have another shape than their tensor.
    """
    table, fixed = bytearray(), []
    sparse = BitWriter()
    coded: list[Coded] = []
    for tensor in spec:
        part = parts.by_name[tensor.name]
        if isinstance(part, Dense) and part.values.shape != tensor.shape:
            raise ValueError(f"tensor {tensor.name!r} has shape {tensor.shape}, got values of {part.values.shape}")
        form, count = _form_of(part)
        table.append(form)
        if form in _WITH_COUNT:
            table += _varint(count)
        if isinstance(part, Sparse):
            fixed.append(write_numbers(part.values, "float16"))
            write_flags(part.chosen, sparse)
        elif isinstance(part, Dense):
            fixed.append(write_numbers(part.values, part.precision))
        elif isinstance(part, Factored):
            fixed.append(_write_factors(part))
        elif isinstance(part, CodedDense | CodedFactored):
            coded.append(part)
    header = MAGIC + bytes([FORMAT_VERSION, codec_id]) + spec_digest(spec)
    step = np.array(parts.step, _STEP).tobytes() if coded else b""
    positions = sparse.to_bytes()
    if coded and positions:
        raise ValueError("one payload holds sparse or coded tensors, not both")
    return b"".join([header, bytes(table), *fixed, step, positions, write_coded(coded)])


def unpack(payload: bytes, spec: Spec, codec_id: int) -> Parts:
    """Read what `pack` wrote.

    Raises:
        PayloadError: for anything else: another magic, version, codec or spec, an unknown form, a rank that the
            tensor can't have, a length other than the header asks for, more bytes than `most_bytes`, a number that is
            not finite, bits that stand for nothing.
    """
    _check_header(payload, spec, codec_id)
    entries, offset = _read_table(payload, spec)
    sizes = [_fixed_bytes(entry) for entry in entries]
    open_ended = any(entry.form in _CODED or entry.form is Form.SPARSE_FLOAT16 for entry in entries)
    expected = offset + sum(sizes)
    if len(payload) < expected or (len(payload) > expected and not open_ended):
        raise PayloadError(f"payload must have {expected} bytes for its forms and ranks, got {len(payload)}")
    if len(payload) > (most := most_bytes(spec)):
        raise PayloadError(f"payload must have at most {most} bytes for these tensors, got {len(payload)}")
    found: dict[str, Part] = {}
    for entry, size in zip(entries, sizes, strict=True):
        try:
            found[entry.tensor.name] = _read_fixed(payload, offset, entry)
        except NumbersError as error:
            raise PayloadError(f"tensor {entry.tensor.name!r} {error}") from None
        offset += size
    try:
        step = _read_open_ended(memoryview(payload)[offset:], entries, found)
    except (CodingError, IndexError) as error:
        raise PayloadError(f"payload can't be read: {error}") from None
    return Parts(found, step)


def to_arrays(spec: Spec, parts: Parts) -> dict[str, Array]:
    """The update that the parts stand for: float32 arrays in the shapes of the spec.

    Both ends use this one function, so what an encoder believes is what a decoder gets.

    Raises:
        PayloadError: if a product of finite factors overflows float32.
    """
    arrays: dict[str, Array] = {}
    for tensor in spec:
        with np.errstate(over="ignore", invalid="ignore"):
            value = _to_array(tensor, parts.by_name[tensor.name], parts.step)
        if not np.isfinite(value).all():
            raise PayloadError(f"tensor {tensor.name!r}: the product of its factors is not finite")
        arrays[tensor.name] = value
    return arrays


def coded_shape(tensor: TensorSpec) -> tuple[int, int]:
    """Rows and columns of a tensor for the coded forms, which know vectors too: one row."""
    return matrix_shape(tensor.shape) or (1, tensor.size)


def _to_array(tensor: TensorSpec, part: Part, step: float) -> Array:
    if isinstance(part, Dense):
        return part.values.astype(np.float32).reshape(tensor.shape)
    if isinstance(part, Factored):
        return multiply(part.left, part.right).reshape(tensor.shape)
    if isinstance(part, CodedDense | CodedFactored):
        return to_matrix(part, step, coded_shape(tensor)).reshape(tensor.shape)
    values = np.zeros(tensor.size, np.float32)
    if isinstance(part, Sparse):
        values[part.chosen] = part.values
    return values.reshape(tensor.shape)


def _form_of(part: Part) -> tuple[Form, int]:
    if isinstance(part, Dense):
        return _DENSE[part.precision], 0
    if isinstance(part, Factored):
        return _FACTORED[part.precision], part.left.shape[1]
    if isinstance(part, Sparse):
        return Form.SPARSE_FLOAT16, part.values.size
    if isinstance(part, CodedFactored):
        return Form.CODED_FACTORED if part.rows is None else Form.CODED_FACTORED_ROWS, part.codes.size
    if isinstance(part, CodedDense):
        return Form.CODED_DENSE if part.rows is None else Form.CODED_DENSE_ROWS, 0
    return Form.ZERO, 0


def _write_factors(part: Factored) -> bytes:
    if part.precision in ("int8", "int4"):
        return write_scaled_columns(part.left, part.right, part.precision)
    return write_numbers(part.left, part.precision) + write_numbers(part.right, part.precision)


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


def _read_table(payload: bytes, spec: Spec) -> tuple[list[_Entry], int]:
    entries: list[_Entry] = []
    offset = HEADER_BYTES
    for tensor in spec:
        if offset >= len(payload):
            raise PayloadError("payload ends within its table of forms")
        try:
            form = Form(payload[offset])
        except ValueError:
            raise PayloadError(f"tensor {tensor.name!r}: unknown form {payload[offset]}") from None
        offset += 1
        count = 0
        if form in _CODED and tensor.size == 0:
            raise PayloadError(f"tensor {tensor.name!r} has no elements to code")
        if form in _WITH_COUNT:
            count, offset = _read_varint(payload, offset)
            kind, limit = ("count", tensor.size) if form is Form.SPARSE_FLOAT16 else ("rank", _max_rank(tensor))
            if not 1 <= count <= limit:
                raise PayloadError(f"tensor {tensor.name!r}: {kind} must be in [1, {limit}], got {count}")
        entries.append(_Entry(tensor, form, count))
    return entries, offset


def _max_rank(tensor: TensorSpec) -> int:
    return min(_matrix_shape(tensor))


def _matrix_shape(tensor: TensorSpec) -> tuple[int, int]:
    shape = matrix_shape(tensor.shape)
    if shape is None:
        raise PayloadError(f"tensor {tensor.name!r} of shape {tensor.shape} has no factored form")
    return shape


def _fixed_bytes(entry: _Entry) -> int:
    if precision := _DENSE_PRECISION.get(entry.form):
        return num_bytes(entry.tensor.size, precision)
    if precision := _FACTORED_PRECISION.get(entry.form):
        shape = _matrix_shape(entry.tensor)
        if precision in ("int8", "int4"):
            return num_bytes_of_scaled_columns(shape, entry.count, precision)
        return sum(num_bytes(side * entry.count, precision) for side in shape)
    return num_bytes(entry.count, "float16") if entry.form is Form.SPARSE_FLOAT16 else 0


def _read_fixed(payload: bytes, offset: int, entry: _Entry) -> Part:
    tensor, rank = entry.tensor, entry.count
    if precision := _DENSE_PRECISION.get(entry.form):
        return Dense(read_numbers(payload, offset, tensor.size, precision).reshape(tensor.shape), precision)
    if precision := _FACTORED_PRECISION.get(entry.form):
        rows, cols = shape = _matrix_shape(tensor)
        if precision in ("int8", "int4"):
            return Factored(*read_scaled_columns(payload, offset, shape, rank, precision), precision)
        left = read_numbers(payload, offset, rows * rank, precision).reshape(rows, rank)
        offset += num_bytes(rows * rank, precision)
        right = read_numbers(payload, offset, rank * cols, precision).reshape(rank, cols)
        return Factored(left, right, precision)
    if entry.form is Form.SPARSE_FLOAT16:
        values: Floats = read_numbers(payload, offset, rank, "float16")
        return Sparse(values, np.zeros(0, np.bool_))
    return Zero()


def _read_open_ended(data: memoryview, entries: list[_Entry], found: dict[str, Part]) -> float:
    """Fill in what has no fixed length; the step."""
    sparse = [entry.tensor for entry in entries if entry.form is Form.SPARSE_FLOAT16]
    coded = [entry for entry in entries if entry.form in _CODED]
    if sparse and coded:
        raise CodingError("it holds both sparse and coded tensors")
    if sparse:
        reader = BitReader(data)
        for tensor in sparse:
            part, chosen = found[tensor.name], read_flags(tensor.size, reader)
            if not isinstance(part, Sparse) or np.count_nonzero(chosen) != part.values.size:
                raise CodingError(f"tensor {tensor.name!r} names another number of positions than it has values")
            found[tensor.name] = Sparse(part.values, chosen)
        reader.finish()
        return 1.0
    if not coded:
        return 1.0
    if len(data) < _STEP.itemsize:
        raise CodingError("it ends before the step of its coded tensors")
    step = float(np.frombuffer(data, _STEP, 1)[0])
    if not (np.isfinite(step) and step > 0):
        raise CodingError(f"the step must be a positive number, got {step}")
    shapes = [
        Shape(*coded_shape(e.tensor), e.count, e.form in (Form.CODED_DENSE_ROWS, Form.CODED_FACTORED_ROWS))
        for e in coded
    ]
    for entry, part in zip(coded, read_coded(data[_STEP.itemsize :], shapes), strict=True):
        found[entry.tensor.name] = part
    return step


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
