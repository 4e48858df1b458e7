"""Entropy-coded parts: they come back, their products are exact, and hostile bits are refused."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_flwr.compressors.coded import (
    MAX_MAGNITUDE,
    NUM_CODES,
    UNIT_CODE,
    Coded,
    CodedDense,
    CodedFactored,
    Shape,
    code_of,
    is_exact,
    powers,
    read_coded,
    spread_of,
    to_matrix,
    write_coded,
)
from fedkd_flwr.core.entropy_coding import CodingError, Ints


def integers(rng: np.random.Generator, *shape: int, spread: float = 5.0) -> Ints:
    return np.rint(rng.standard_normal(shape) * spread).astype(np.int64)


def factored(rows: int, cols: int, rank: int, seed: int = 0, named: int | None = None) -> CodedFactored:
    rng = np.random.default_rng(seed)
    codes = np.sort(rng.integers(0, 60, rank)).astype(np.uint8)
    flags = None if named is None else np.isin(np.arange(rows), rng.choice(rows, named, replace=False))
    return CodedFactored(integers(rng, named or rows, rank), integers(rng, rank, cols), codes, flags)


def dense(rows: int, cols: int, seed: int = 0, named: int | None = None) -> CodedDense:
    rng = np.random.default_rng(seed)
    flags = None if named is None else np.isin(np.arange(rows), rng.choice(rows, named, replace=False))
    values = integers(rng, (rows if named is None else named) * cols)
    return CodedDense(values, int(rng.integers(16)), spread_of(values), flags)


def assert_same(found: Coded, part: Coded) -> None:
    assert type(found) is type(part)
    if isinstance(found, CodedFactored) and isinstance(part, CodedFactored):
        assert np.array_equal(found.left, part.left)
        assert np.array_equal(found.right, part.right)
        assert np.array_equal(found.codes, part.codes)
    elif isinstance(found, CodedDense) and isinstance(part, CodedDense):
        assert np.array_equal(found.integers, part.integers)
        assert (found.correction, found.spread) == (part.correction, part.spread)
    assert (found.rows is None) == (part.rows is None)
    assert found.rows is None or np.array_equal(found.rows, part.rows)


@st.composite
def parts(draw: st.DrawFn) -> tuple[list[Coded], list[Shape]]:
    """Up to four coded parts, with and without named rows, and their shapes."""
    found: list[Coded] = []
    shapes: list[Shape] = []
    for seed in range(draw(st.integers(0, 4))):
        rows, cols = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        named = draw(st.none() | st.integers(1, rows))
        rank = draw(st.integers(0, min(rows, cols)))
        found.append(factored(rows, cols, rank, seed, named) if rank else dense(rows, cols, seed, named))
        shapes.append(Shape(rows, cols, rank, named is not None))
    return found, shapes


@settings(max_examples=150, deadline=None)
@given(case=parts())
def test_parts_come_back(case: tuple[list[Coded], list[Shape]]) -> None:
    given_parts, shapes = case
    for found, part in zip(read_coded(write_coded(given_parts), shapes), given_parts, strict=True):
        assert_same(found, part)


def test_only_named_rows_are_other_than_zero() -> None:
    rows = np.array([False, True, False, True])
    part = CodedDense(np.array([1, 2, -3, 4]), UNIT_CODE, 4, rows)
    expected = [[0, 0], [0.5, 1], [0, 0], [-1.5, 2]]
    assert to_matrix(part, 0.5, (4, 2)).tolist() == expected
    left, right = np.array([[1], [2]]), np.array([[3, -4]])
    whole = to_matrix(CodedFactored(left, right, np.array([8], np.uint8), rows), 2.0, (4, 2))
    assert whole.tolist() == [[0, 0], [3, -4], [0, 0], [6, -8]]


# Powers


def test_powers_are_eighths_of_an_octave_with_eight_bits() -> None:
    found = powers(np.arange(NUM_CODES))
    np.testing.assert_allclose(found, 2.0 ** (-np.arange(NUM_CODES) / 8), rtol=3e-3)
    mantissas = np.frexp(found)[0] * 256
    assert np.array_equal(mantissas, np.rint(mantissas))
    assert powers(np.array([0, 8, 16])).tolist() == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(("ratio", "code"), [(0.0, 0), (0.3, 0), (1.0, 0), (2.0, 8), (2.0**0.125, 1), (1e30, 255)])
def test_code_of_a_ratio(ratio: float, code: int) -> None:
    assert code_of(np.array([ratio])).tolist() == [code]


@pytest.mark.parametrize(("size", "spread"), [(0, 0), (1, 3), (2, 4), (4, 5), (2**12, 15), (2**20, 15)])
def test_spread_is_half_the_octaves_of_the_variance(size: int, spread: int) -> None:
    assert spread_of(np.full(10, size)) == spread


# Exact products


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    rank=st.integers(1, 8),
    spread=st.sampled_from([1.0, 100.0, 9000.0]),
    most_code=st.sampled_from([0, 40, 100, 255]),
    seed=st.integers(0, 2**32),
)
def test_a_product_called_exact_has_the_same_bytes_in_every_order(
    rows: int, cols: int, rank: int, spread: float, most_code: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, most_code + 1, rank).astype(np.uint8)
    part = CodedFactored(integers(rng, rows, rank, spread=spread), integers(rng, rank, cols, spread=spread), codes)
    if not is_exact(part):
        return
    step = float(np.float32(rng.uniform(1e-6, 1e3)))
    found = to_matrix(part, step, (rows, cols)).astype(np.float32)
    for _ in range(3):
        order = rng.permutation(rank)
        turned = CodedFactored(part.left[:, order], part.right[order], codes[order])
        assert to_matrix(turned, step, (rows, cols)).astype(np.float32).tobytes() == found.tobytes()
    factors = [Fraction(float(power)) for power in powers(codes)]
    for row in range(rows):
        for col in range(cols):
            terms = [int(a) * f * int(b) for a, f, b in zip(part.left[row], factors, part.right[:, col], strict=True)]
            exact = sum(terms, Fraction(0))
            assert Fraction(float(exact)) == exact
            assert np.float32(float(exact) * step) == found[row, col]


def test_a_product_with_too_many_digits_is_not_called_exact() -> None:
    one = np.ones((1, 1), np.int64)
    assert is_exact(CodedFactored(one * MAX_MAGNITUDE, one * MAX_MAGNITUDE, np.array([0], np.uint8)))
    assert not is_exact(CodedFactored(one * (MAX_MAGNITUDE + 1), one, np.array([0], np.uint8)))
    assert not is_exact(CodedFactored(one, one * -(MAX_MAGNITUDE + 1), np.array([0], np.uint8)))
    pair = np.full((1, 2), MAX_MAGNITUDE)
    assert not is_exact(CodedFactored(pair, pair.T, np.array([0, 255], np.uint8)))


# Hostile bits


def read_or_refused(data: bytes, shapes: list[Shape]) -> bool:
    try:
        found = read_coded(data, shapes)
    except (CodingError, IndexError):
        return True
    for part, shape in zip(found, shapes, strict=True):
        assert np.isfinite(to_matrix(part, 1.0, (shape.rows, shape.cols))).all()
        assert to_matrix(part, 1.0, (shape.rows, shape.cols)).shape == (shape.rows, shape.cols)
    return False


SAMPLE: list[Coded] = [factored(20, 12, 3), dense(1, 15), dense(30, 4, named=5), factored(25, 9, 2, named=11)]
SHAPES = [Shape(20, 12, 3, False), Shape(1, 15, 0, False), Shape(30, 4, 0, True), Shape(25, 9, 2, True)]


def test_every_truncation_is_refused() -> None:
    data = write_coded(SAMPLE)
    assert all(read_or_refused(data[:length], SHAPES) for length in range(len(data)))
    assert read_or_refused(data + b"\0", SHAPES)


@pytest.mark.filterwarnings("error")
def test_changed_bits_are_refused_or_give_finite_matrices() -> None:
    rng, data = np.random.default_rng(0), write_coded(SAMPLE)
    refused = 0
    for _ in range(800):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        refused += read_or_refused(bytes(changed), SHAPES)
    assert 100 < refused < 800


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=80))
def test_arbitrary_bits_are_refused_or_give_finite_matrices(data: bytes) -> None:
    read_or_refused(data, SHAPES)
