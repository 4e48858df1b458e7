"""Fixed-width numbers: what comes back, how exactly, and in how many bytes."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedkd_flwr.compressors.numbers import (
    BLOCK,
    PRECISIONS,
    NumbersError,
    Precision,
    num_bytes,
    num_bytes_of_scaled_columns,
    pack_integers,
    read_numbers,
    read_scaled_columns,
    read_scales,
    round_up_to_bfloat16,
    to_bfloat16_bits,
    unpack_integers,
    write_numbers,
    write_scaled_columns,
)

INTEGERS: tuple[Precision, ...] = ("int8", "int4")
TOPS = {"int8": 127, "int4": 7}
SMALLEST_SCALE = 2.0**-133  # the smallest bfloat16
FINITE = st.floats(-(2.0**123), 2.0**123, width=32)


@st.composite
def numbers(draw: st.DrawFn) -> NDArray[np.float32]:
    """Gaussian, constant, denormal or arbitrary values, perhaps one of them huge, in 0 to 5 dimensions."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=5)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["gaussian", "constant", "denormal", "sparse"]))
    values = {
        "gaussian": rng.standard_normal(shape),
        "constant": np.full(shape, draw(FINITE)),
        "denormal": rng.standard_normal(shape) * 1e-41,
        "sparse": rng.standard_normal(shape) * (rng.random(shape) < 0.1),
    }[kind]
    found = np.asarray(values, np.float32)
    if found.size and draw(st.booleans()):
        found = found.copy()
        found.flat[int(rng.integers(found.size))] = draw(FINITE)
    from_model = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    if from_model == "float16":
        found = np.clip(found, -60000, 60000).astype(np.float16).astype(np.float32)
    elif from_model == "bfloat16":
        found = (found.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).reshape(shape)
    return found


def back(values: NDArray[np.float32], precision: Precision) -> NDArray[np.float64]:
    data = write_numbers(values, precision)
    assert len(data) == num_bytes(values.size, precision)
    return read_numbers(b"xy" + data + b"z", 2, values.size, precision)


def largest(values: NDArray[np.float32]) -> float:
    return float(np.abs(values).max(initial=0))


@settings(max_examples=150, deadline=None)
@given(values=numbers())
def test_float32_comes_back_bit_for_bit(values: NDArray[np.float32]) -> None:
    assert back(values, "float32").astype(np.float32).tobytes() == values.tobytes()


@settings(max_examples=150, deadline=None)
@given(values=numbers())
def test_float16_misses_at_most_two_to_the_minus_11_of_the_largest(values: NDArray[np.float32]) -> None:
    missed = np.abs(back(values, "float16") - values.reshape(-1).astype(np.float64))
    assert missed.max(initial=0) <= 2.0**-11 * largest(values)


@settings(max_examples=150, deadline=None)
@given(values=numbers(), precision=st.sampled_from(INTEGERS))
def test_integers_miss_at_most_half_a_step_of_their_block(values: NDArray[np.float32], precision: Precision) -> None:
    found, flat = back(values, precision), values.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        block = slice(start, start + BLOCK)
        missed = np.abs(found[block] - flat[block].astype(np.float64)).max()
        assert missed <= 1.01 * largest(flat[block]) / (2 * TOPS[precision]) + SMALLEST_SCALE


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_stay_zeros_and_nothing_is_nothing(precision: Precision) -> None:
    assert not back(np.zeros(130, np.float32), precision).any()
    assert back(np.zeros((0, 3), np.float32), precision).shape == (0,)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_order_is_that_of_memory_whatever_the_layout(precision: Precision) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert write_numbers(np.asfortranarray(values), precision) == write_numbers(values, precision)
    assert write_numbers(values.astype(np.float64), precision) == write_numbers(values, precision)


def test_one_outlier_spoils_no_other_block() -> None:
    values = np.ones(3 * BLOCK, np.float32)
    values[70] = 1e6
    found = back(values, "int8")
    assert np.abs(np.delete(found, np.s_[BLOCK : 2 * BLOCK]) - 1).max() < 0.01


# Scales


@settings(max_examples=300, deadline=None)
@given(values=st.lists(st.floats(0, 3.3e38), min_size=1, max_size=20))
def test_a_scale_is_rounded_up_to_eight_bits(values: list[float]) -> None:
    given_values = np.array(values)
    found = round_up_to_bfloat16(given_values)
    assert (found >= given_values).all()
    assert (found <= given_values * (1 + 2.0**-7) + SMALLEST_SCALE).all()
    assert not (found.astype(np.float32).view(np.uint32) & 0xFFFF).any()
    assert np.array_equal(read_scales(to_bfloat16_bits(found).tobytes(), 0, found.size), found)


def test_a_bfloat16_is_its_own_scale() -> None:
    exact = np.array([0.0, 1.0, 1.5, 2.0**-133, 2.0**-126, 1.9921875 * 2.0**126])
    assert np.array_equal(round_up_to_bfloat16(exact), exact)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFC1])
def test_a_scale_that_is_not_finite_is_refused(bits: int) -> None:
    with pytest.raises(NumbersError, match="not finite"):
        read_scales(bits.to_bytes(2, "little"), 0, 1)


@pytest.mark.parametrize("bits", [0xBF80, 0x8001])
def test_a_scale_below_zero_is_refused(bits: int) -> None:
    with pytest.raises(NumbersError, match="a scale is below 0"):
        read_scales(bits.to_bytes(2, "little"), 0, 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("precision", "data"),
    [
        ("float32", b"\x01\x00\x80\x7f"),
        ("float32", b"\x00\x00\xc0\xff"),
        ("float32", b"\x00\x00\x80\x7f"),
        ("float16", b"\x00\x00\x01\x7c"),
        ("float16", b"\x00\x00\x00\x7e"),
        ("float16", b"\x00\x00\x00\xfc"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_without_a_warning(precision: Precision, data: bytes) -> None:
    with pytest.raises(NumbersError, match="not finite"):
        read_numbers(data, 0, 1, precision)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("exponent", [-32768, 32767])
def test_a_hostile_exponent_gives_a_finite_number(exponent: int) -> None:
    data = exponent.to_bytes(2, "little", signed=True) + np.array([-65504], "<f2").tobytes()
    assert np.isfinite(read_numbers(data, 0, 1, "float16")).all()


# Packed integers


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(-8, 7), max_size=30), precision=st.sampled_from(INTEGERS))
def test_packed_integers_come_back(values: list[int], precision: Precision) -> None:
    data = pack_integers(np.array(values, np.int8), precision)
    assert len(data) == (len(values) if precision == "int8" else (len(values) + 1) // 2)
    assert unpack_integers(data, 0, len(values), precision).tolist() == values


def test_the_first_of_two_nibbles_is_the_lower() -> None:
    assert pack_integers(np.array([1, -1, 7], np.int8), "int4") == b"\xf1\x07"


# Columns with a scale


def factors(rows: int, cols: int, rank: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    sizes = 0.5 ** np.arange(rank)
    return rng.standard_normal((rows, rank)) * sizes, rng.standard_normal((rank, cols))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    rank=st.integers(1, 6),
    precision=st.sampled_from(INTEGERS),
    scale=st.sampled_from([1e-15, 1.0, 1e15]),
    seed=st.integers(0, 2**32),
)
def test_each_factor_misses_at_most_half_a_step_of_its_column(
    shape: tuple[int, int], rank: int, precision: Precision, scale: float, seed: int
) -> None:
    left, right = (scale * factor for factor in factors(*shape, rank, seed))
    data = write_scaled_columns(left, right, precision)
    assert len(data) == num_bytes_of_scaled_columns(shape, rank, precision)
    of_left, scaled_right = read_scaled_columns(data, 0, shape, rank, precision)
    step = np.abs(left).max(axis=0) / TOPS[precision]
    assert (np.abs(of_left * step - left) <= 0.5001 * step).all()
    of_right = scaled_right / step[:, None]
    assert (np.abs(of_right - right) <= 0.51 * np.abs(right).max(axis=1, keepdims=True) / TOPS[precision]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision", INTEGERS)
def test_a_component_without_one_of_its_vectors_is_zero(precision: Precision) -> None:
    left, right = factors(4, 5, 3)
    left[:, 0], right[1] = 0, 0
    left[:, 1], right[0] = 1e6, 1e6
    data = write_scaled_columns(left, right, precision)
    of_left, of_right = read_scaled_columns(data, 0, (4, 5), 3, precision)
    assert not (of_left[:, :2] @ of_right[:2]).any()


@pytest.mark.parametrize("precision", INTEGERS)
@pytest.mark.parametrize("decay", [1.0, 0.3, 0.05, 1e-3])
def test_the_product_is_the_same_in_any_order_of_summation(precision: Precision, decay: float) -> None:
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((6, 12)) * decay ** np.arange(12), rng.standard_normal((12, 7))
    of_left, of_right = read_scaled_columns(write_scaled_columns(left, right, precision), 0, (6, 7), 12, precision)
    product = of_left @ of_right
    for _ in range(5):
        order = rng.permutation(12)
        summed = np.zeros((6, 7))
        for k in order:
            summed += np.outer(of_left[:, k], of_right[k])
        assert summed.tobytes() == product.tobytes()
        assert (of_left[:, order] @ of_right[order]).tobytes() == product.tobytes()
    for row in range(6):
        for col in range(7):
            pairs = zip(of_left[row], of_right[:, col], strict=True)
            terms = [Fraction(float(a)) * Fraction(float(b)) for a, b in pairs]
            assert sum(terms) == Fraction(float(product[row, col]))
            assert math.fsum(float(term) for term in terms) == product[row, col]
