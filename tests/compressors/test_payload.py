"""The wire format: its layout, its golden bytes, and what it refuses."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedkd_flwr.compressors.ef21 import CODEC_ID as EF21
from fedkd_flwr.compressors.identity import CODEC_ID as IDENTITY
from fedkd_flwr.compressors.identity import IdentityOptions
from fedkd_flwr.compressors.payload import (
    FORMAT_VERSION,
    HEADER_BYTES,
    MAGIC,
    Dense,
    Factored,
    Form,
    Part,
    Parts,
    PayloadError,
    Zero,
    pack,
    to_arrays,
    unpack,
)
from fedkd_flwr.compressors.powersgd import CODEC_ID as POWERSGD
from fedkd_flwr.compressors.quantize import CODEC_ID as QUANTIZE
from fedkd_flwr.compressors.svd import CODEC_ID as SVD
from fedkd_flwr.compressors.svd import SvdOptions
from fedkd_flwr.compressors.top_k import CODEC_ID as TOP_K
from fedkd_flwr.compressors.transform_coding import CODEC_ID as TRANSFORM
from fedkd_flwr.core.arrays import Array, Spec, TensorSpec, spec_digest

GOLDEN = Path(__file__).parent.parent / "golden"

SPEC: Spec = (
    TensorSpec("first", (3, 4)),
    TensorSpec("bias", (3,)),
    TensorSpec("conv", (2, 3, 1, 2)),
    TensorSpec("unused", (5, 5)),
    TensorSpec("scale", ()),
    TensorSpec("bn.running_mean", (2,), "buffer"),
)


def dense(values: object) -> Dense:
    return Dense(np.array(values, np.float32))


def matrix(values: object) -> NDArray[np.float32]:
    return np.array(values, np.float32)


BY_NAME: dict[str, Part] = {
    "first": Factored(matrix([[1.0], [-2.0], [0.5]]), matrix([[4.0, 0.0, -0.25, 8.0]])),
    "bias": dense([1.0, 2.0, 3.0]),
    "conv": Factored(matrix([[1.0, 0.0], [0.0, -1.0]]), matrix([[1, 2, 3, 4, 5, 6], [0.5, 0, -0.5, 0, 0, 1]])),
    "unused": Zero(),
    "scale": dense(-1.5),
    "bn.running_mean": dense([0.0, 0.0625]),
}
PARTS = Parts(BY_NAME)

ARRAYS: dict[str, Array] = {
    "first": matrix([[4, 0, -0.25, 8], [-8, 0, 0.5, -16], [2, 0, -0.125, 4]]),
    "bias": matrix([1, 2, 3]),
    "conv": matrix([[[[1, 2]], [[3, 4]], [[5, 6]]], [[[-0.5, 0]], [[0.5, 0]], [[0, -1]]]]),
    "unused": np.zeros((5, 5), np.float32),
    "scale": matrix(-1.5),
    "bn.running_mean": matrix([0, 0.0625]),
}


def golden(name: str) -> bytes:
    """Bytes of a hex file; white space between them does not count."""
    return bytes.fromhex((GOLDEN / name).read_text())


def header(spec: Spec, codec_id: int = SVD) -> bytes:
    return b"FKD" + bytes([2, codec_id]) + spec_digest(spec)


def assert_same_arrays(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, np.dtype(np.float32))
        assert np.array_equal(found[name], value)


# Golden bytes. A change here breaks every client that is still on the last release: raise FORMAT_VERSION with it.


def test_numbers_of_the_format_have_not_changed() -> None:
    assert (MAGIC, FORMAT_VERSION, HEADER_BYTES) == (b"FKD", 2, 13)
    assert {form.name: form.value for form in Form} == {
        "ZERO": 0,
        "DENSE_FLOAT32": 1,
        "DENSE_FLOAT16": 2,
        "DENSE_INT8": 3,
        "DENSE_INT4": 4,
        "FACTORED_FLOAT32": 5,
        "FACTORED_FLOAT16": 6,
        "FACTORED_INT8": 7,
        "FACTORED_INT4": 8,
        "SPARSE_FLOAT16": 9,
        "CODED_DENSE": 10,
        "CODED_FACTORED": 11,
        "CODED_DENSE_ROWS": 12,
        "CODED_FACTORED_ROWS": 13,
    }
    assert (IDENTITY, SVD, TRANSFORM, QUANTIZE, TOP_K, POWERSGD, EF21) == (0, 1, 2, 3, 4, 5, 6)


def test_identity_writes_and_reads_the_golden_bytes() -> None:
    codec = IdentityOptions().build(SPEC)
    payload, _ = codec.encode(ARRAYS, {}, progress=0.0, seed=0)
    assert payload.hex() == golden("identity.hex").hex()
    assert_same_arrays(dict(codec.decode(golden("identity.hex"), {})[0]), ARRAYS)


def test_svd_parts_are_written_as_the_golden_bytes() -> None:
    # By hand rather than by encode: BLAS builds differ in the signs of singular vectors.
    assert pack(SPEC, PARTS, SVD).hex() == golden("svd.hex").hex()


def test_svd_reads_the_golden_bytes() -> None:
    assert_same_arrays(dict(SvdOptions().build(SPEC).decode(golden("svd.hex"), {})[0]), ARRAYS)
    parts = unpack(golden("svd.hex"), SPEC, SVD).by_name
    for name, expected in BY_NAME.items():
        part = parts[name]
        assert type(part) is type(expected)
        if isinstance(part, Factored) and isinstance(expected, Factored):
            assert np.array_equal(part.left, expected.left)
            assert np.array_equal(part.right, expected.right)


# Layout


def test_numbers_stand_in_the_order_of_the_spec() -> None:
    expected = header(SPEC) + bytes([5, 1, 1, 5, 2, 0, 1, 1])
    for part in BY_NAME.values():
        if isinstance(part, Factored):
            expected += b"".join(struct.pack("<f", v) for v in [*part.left.ravel(), *part.right.ravel()])
        elif isinstance(part, Dense):
            expected += b"".join(struct.pack("<f", v) for v in part.values.ravel())
    assert pack(SPEC, PARTS, SVD) == expected


@pytest.mark.parametrize(
    ("rank", "varint"), [(1, b"\x01"), (127, b"\x7f"), (128, b"\x80\x01"), (130, b"\x82\x01"), (300, b"\xac\x02")]
)
def test_rank_is_a_varint(rank: int, varint: bytes) -> None:
    spec: Spec = (TensorSpec("w", (601, 602)),)
    left = np.arange(601 * rank, dtype=np.float32).reshape(601, rank)
    right = np.arange(rank * 602, dtype=np.float32).reshape(rank, 602)
    payload = pack(spec, Parts({"w": Factored(left, right)}), SVD)
    assert payload[HEADER_BYTES:].startswith(b"\x05" + varint)
    assert len(payload) == HEADER_BYTES + 1 + len(varint) + 4 * rank * 1203
    part = unpack(payload, spec, SVD).by_name["w"]
    assert isinstance(part, Factored)
    assert np.array_equal(part.left, left)
    assert np.array_equal(part.right, right)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=5).map(tuple), seed=st.integers(0, 2**32), codec_id=st.integers(0, 255)
)
def test_dense_values_of_any_shape_come_back_bit_for_bit(shape: tuple[int, ...], seed: int, codec_id: int) -> None:
    spec: Spec = (TensorSpec("w", shape),)
    values = np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)
    part = unpack(pack(spec, Parts({"w": Dense(values)}), codec_id), spec, codec_id).by_name["w"]
    assert isinstance(part, Dense)
    assert (part.values.shape, part.values.astype(np.float32).tobytes()) == (shape, values.tobytes())


def test_byte_order_and_layout_of_the_values_do_not_matter() -> None:
    spec: Spec = (TensorSpec("w", (3, 4)),)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = pack(spec, Parts({"w": Dense(values)}), IDENTITY)
    assert pack(spec, Parts({"w": Dense(np.asfortranarray(values))}), IDENTITY) == expected
    assert pack(spec, Parts({"w": Dense(values.astype(">f4"))}), IDENTITY) == expected


def test_what_is_unpacked_is_writable_and_not_a_view_of_the_payload() -> None:
    payload = pack(SPEC, PARTS, SVD)
    for part in unpack(payload, SPEC, SVD).by_name.values():
        if isinstance(part, Dense):
            part.values[...] = 7
        elif isinstance(part, Factored):
            part.left[...] = 7
            part.right[...] = 7
    assert payload == pack(SPEC, PARTS, SVD)
    assert_same_arrays(to_arrays(SPEC, unpack(payload, SPEC, SVD)), ARRAYS)


# Refusals, one message each


MATRIX: Spec = (TensorSpec("w", (3, 4)),)
VECTOR: Spec = (TensorSpec("w", (7, 1)),)


@pytest.mark.parametrize(
    ("spec", "tail", "message"),
    [
        (MATRIX, b"", "payload ends within its table of forms"),
        (MATRIX, b"\x0e", "tensor 'w': unknown form 14"),
        (MATRIX, b"\xff", "tensor 'w': unknown form 255"),
        (MATRIX, b"\x05", "payload ends within a number of its table"),
        (MATRIX, b"\x05\x80", "payload ends within a number of its table"),
        (MATRIX, b"\x05\x00", r"tensor 'w': rank must be in \[1, 3\], got 0"),
        (MATRIX, b"\x05\x04" + bytes(4 * 4 * 7), r"tensor 'w': rank must be in \[1, 3\], got 4"),
        (MATRIX, b"\x05\xff\xff\xff\xff\x0f", r"tensor 'w': rank must be in \[1, 3\], got 4294967295"),
        (MATRIX, b"\x05\x80\x80\x80\x80\x80\x01", "number in the payload's table is longer than 5 bytes"),
        (MATRIX, b"\x05\x01" + bytes(27), "payload must have 43 bytes for its forms and ranks, got 42"),
        (MATRIX, b"\x05\x01" + bytes(29), "payload must have 43 bytes for its forms and ranks, got 44"),
        (MATRIX, b"\x01" + bytes(44), "payload must have 62 bytes for its forms and ranks, got 58"),
        (MATRIX, b"\x00\x00", "payload must have 14 bytes for its forms and ranks, got 15"),
        (VECTOR, b"\x05\x01" + bytes(32), r"tensor 'w' of shape \(7, 1\) has no factored form"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(spec: Spec, tail: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        unpack(header(spec) + tail, spec, SVD)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["left", "right", "dense"])
def test_a_number_that_is_not_finite_is_refused_by_name(bad: float, where: str) -> None:
    parts = dict(BY_NAME)
    left, right = matrix([[1.0], [1.0], [1.0]]), matrix([[1.0, 1.0, 1.0, 1.0]])
    if where == "dense":
        parts["first"] = dense(np.full((3, 4), bad))
    else:
        (left if where == "left" else right)[0, 0] = bad
        parts["first"] = Factored(left, right)
    with pytest.raises(PayloadError, match="tensor 'first' holds numbers that are not finite"):
        unpack(pack(SPEC, Parts(parts), SVD), SPEC, SVD)


@pytest.mark.filterwarnings("error")
def test_finite_factors_whose_product_overflows_are_refused_by_name() -> None:
    large = Factored(np.full((3, 1), 3e38, np.float32), np.full((1, 4), 3e38, np.float32))
    parts = unpack(pack(MATRIX, Parts({"w": large}), SVD), MATRIX, SVD)
    with pytest.raises(PayloadError, match="tensor 'w': the product of its factors is not finite"):
        to_arrays(MATRIX, parts)


def test_every_single_bit_of_the_header_counts() -> None:
    payload = pack(SPEC, PARTS, SVD)
    for bit in range(8 * HEADER_BYTES):
        changed = bytearray(payload)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadError):
            unpack(bytes(changed), SPEC, SVD)


def test_a_payload_error_is_a_value_error() -> None:
    assert issubclass(PayloadError, ValueError)
