"""Integers and flags as bits: what comes back, how many bits it takes, and what is refused."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedkd_flwr.core.entropy_coding import (
    MAX_GROUP,
    MAX_INTEGER,
    MIN_GROUP,
    BitReader,
    BitWriter,
    CodingError,
    Ints,
    group_of,
    read_flags,
    read_integers,
    write_flags,
    write_integers,
)

Groups = NDArray[np.int8]


def coded(values: Ints, groups: Groups) -> bytes:
    writer = BitWriter()
    write_integers(values, groups, writer)
    return writer.to_bytes()


def read(data: bytes, groups: Groups) -> Ints:
    reader = BitReader(data)
    found = read_integers(groups, reader)
    reader.finish()
    return found


def one_group(size: int, group: int) -> Groups:
    return np.full(size, group, np.int8)


def entropy_bytes(values: Ints) -> float:
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum() * values.size / 8)


def drawn(kind: str, spread: float, size: int = 40_000) -> Ints:
    rng = np.random.default_rng(0)
    return np.rint(getattr(rng, kind)(0.0, spread, size)).astype(np.int64)


@st.composite
def grouped_integers(draw: st.DrawFn) -> tuple[Ints, Groups]:
    """Integers of any size, in groups that need not suit them."""
    limit = draw(st.sampled_from([0, 1, 3, 20, 1000, MAX_INTEGER]))
    values = draw(st.lists(st.integers(-limit, limit) | st.integers(-1, 1), max_size=60))
    groups = draw(st.lists(st.integers(MIN_GROUP, MAX_GROUP), min_size=len(values), max_size=len(values)))
    return np.array(values, np.int64), np.array(groups, np.int8)


# Integers


@settings(max_examples=300, deadline=None)
@given(case=grouped_integers())
def test_integers_come_back_whatever_their_groups(case: tuple[Ints, Groups]) -> None:
    values, groups = case
    assert np.array_equal(read(coded(values, groups), groups), values)


@pytest.mark.parametrize("group", [MIN_GROUP, -1, 0, 3, 20, MAX_GROUP])
def test_the_largest_integers_come_back(group: int) -> None:
    values = np.array([MAX_INTEGER, -MAX_INTEGER, 0, 1, -1, MAX_INTEGER - 1], np.int64)
    assert np.array_equal(read(coded(values, one_group(6, group)), one_group(6, group)), values)


def test_no_integers_take_no_bytes() -> None:
    assert coded(np.zeros(0, np.int64), one_group(0, 0)) == b""
    assert read(b"", one_group(0, 0)).size == 0


def test_many_zeros_take_a_few_bytes() -> None:
    assert len(coded(np.zeros(1_000_000, np.int64), one_group(1_000_000, MIN_GROUP))) <= 3


@pytest.mark.parametrize("kind", ["normal", "laplace"])
@pytest.mark.parametrize("spread", [0.1, 0.3, 0.7, 1.5, 4.0, 30.0, 300.0])
def test_size_is_close_to_the_entropy(kind: str, spread: float) -> None:
    values = drawn(kind, spread)
    group = int(np.floor(np.log2(max(np.square(values).mean(), 2.0**MIN_GROUP))))
    num_planes = 17
    data = coded(values, one_group(values.size, group))
    assert len(data) <= 1.04 * entropy_bytes(values) + 3 * num_planes


@pytest.mark.parametrize("error", [-6, -3, 3, 6])
def test_a_wrong_group_costs_bytes_but_no_digits(error: int) -> None:
    values = drawn("normal", 8.0, 5000)
    groups = one_group(values.size, 6 + error)
    assert np.array_equal(read(coded(values, groups), groups), values)


def test_integers_are_apart_by_group() -> None:
    groups = np.array([2, 0, 2, 0, -3], np.int8)
    values = np.array([5, 1, -7, 0, 2], np.int64)
    order = np.argsort(groups, kind="stable")
    assert coded(values, groups) == coded(values[order], groups[order])


@pytest.mark.parametrize(
    ("code", "size", "group"), [(0, 1, 0), (40, 1, 10), (40, 32, 5), (0, 2**12, -10), (255, 1, 40)]
)
def test_group_is_the_octave_of_the_mean_square(code: int, size: int, group: int) -> None:
    assert group_of(code, size) == group


# Flags


@settings(max_examples=200, deadline=None)
@given(size=st.integers(0, 400), density=st.floats(0.0, 1.0), seed=st.integers(0, 2**32))
def test_flags_of_any_density_come_back(size: int, density: float, seed: int) -> None:
    flags = np.random.default_rng(seed).random(size) < density
    writer = BitWriter()
    assert write_flags(flags, writer) == np.count_nonzero(flags)
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(read_flags(size, reader), flags)
    reader.finish()


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.99])
def test_flags_take_close_to_their_entropy(density: float) -> None:
    flags = np.random.default_rng(0).random(60_000) < density
    writer = BitWriter()
    write_flags(flags, writer)
    assert len(writer.to_bytes()) <= 1.04 * entropy_bytes(flags.astype(np.int64)) + 3


# Bits


@pytest.mark.parametrize("width", [0, 1, 7, 8, 31, 40])
def test_numbers_come_back_at_their_width(width: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**width, 20)
    writer = BitWriter()
    writer.numbers(values, width)
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(reader.numbers(20, width), values)
    reader.finish()


def test_bits_stand_in_order_the_highest_first() -> None:
    writer = BitWriter()
    writer.numbers(np.array([5, 1]), 3)
    writer.bits(np.array([1], np.uint8))
    assert writer.to_bytes() == bytes([0b1010_0110])
    assert BitWriter().to_bytes() == b""


def test_reading_beyond_the_end_is_refused() -> None:
    for reader in (BitReader(b""), BitReader(b"\x00\x00")):
        with pytest.raises(CodingError, match="end too early"):
            reader.bits(17)
        with pytest.raises(CodingError, match="end too early"):
            reader.numbers(3, 6)
        with pytest.raises(CodingError, match="end too early"):
            reader.unary(1, 100)


def test_a_unary_number_beyond_its_limit_is_refused() -> None:
    assert BitReader(bytes([0b0001_0000])).unary(1, 3).tolist() == [3]
    assert BitReader(bytes([0b0100_1100])).unary(3, 3).tolist() == [1, 3, 3]
    with pytest.raises(CodingError):
        BitReader(bytes([0b0001_0000])).unary(1, 2)


@pytest.mark.parametrize("rest", [b"\x00", b"\x01", b"\xff\xff"])
def test_only_the_filling_of_a_byte_may_be_left(rest: bytes) -> None:
    with pytest.raises(CodingError, match="bytes after the coded numbers"):
        BitReader(rest).finish()
    reader = BitReader(b"\x80")
    reader.bits(1)
    reader.finish()


# Hostile bits


def integers_or_refused(data: bytes, groups: Groups) -> bool:
    try:
        found = read(data, groups)
    except CodingError:
        return True
    assert (found.dtype, found.shape) == (np.int32, groups.shape)
    return False


def test_every_truncation_is_refused() -> None:
    values, groups = drawn("normal", 3.0, 300), one_group(300, 3)
    data = coded(values, groups)
    assert all(integers_or_refused(data[:length], groups) for length in range(len(data)))


@pytest.mark.filterwarnings("error")
def test_changed_bits_are_refused_or_give_integers() -> None:
    rng = np.random.default_rng(0)
    values, groups = drawn("laplace", 2.0, 200), rng.integers(-2, 6, 200).astype(np.int8)
    data, refused = coded(values, groups), 0
    for _ in range(700):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        refused += integers_or_refused(bytes(changed), groups)
    assert 50 < refused < 700


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), size=st.integers(0, 40), group=st.integers(MIN_GROUP, MAX_GROUP))
def test_arbitrary_bits_are_refused_or_give_integers(data: bytes, size: int, group: int) -> None:
    integers_or_refused(data, one_group(size, group))


def test_a_short_text_that_asks_for_large_numbers_is_refused_without_reading_them() -> None:
    groups = one_group(2_000_000, MAX_GROUP)
    tracemalloc.start()
    try:
        with pytest.raises(CodingError):
            read(bytes(20), groups)  # no flag is set, but 19 low bits of each are missing
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 80 * groups.size
