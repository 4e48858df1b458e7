from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_flwr.core.low_rank import Matrix, factorise, matrix_shape, multiply, smallest_rank

ENERGIES = st.floats(0.01, 1.0)


def gaussian(*shape: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def squared_error(matrix: Matrix, left: Matrix, right: Matrix) -> float:
    """Relative to the squared norm, in float64."""
    exact = matrix.astype(np.float64)
    missed = exact - left.astype(np.float64) @ right.astype(np.float64)
    return float((missed**2).sum() / (exact**2).sum())


@st.composite
def matrices(draw: st.DrawFn) -> Matrix:
    """Matrices of any rank, with slowly or fast decaying spectra."""
    rows, cols = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    decay = draw(st.sampled_from([1.0, 0.7, 0.1]))
    rank = draw(st.integers(1, min(rows, cols)))
    scale = draw(st.sampled_from([1e-20, 1.0, 1e10]))
    left, right = rng.standard_normal((rows, rank)), rng.standard_normal((rank, cols))
    matrix: Matrix = (scale * (left * decay ** np.arange(rank)) @ right).astype(np.float32)
    return matrix


# smallest_rank


@settings(max_examples=300, deadline=None)
@given(
    exponents=st.lists(st.integers(-6, 0), min_size=1, max_size=10),
    num_zeros=st.integers(0, 3),
    energy=st.integers(1, 64),
    shift=st.integers(-30, 30),
)
def test_rank_is_the_smallest_that_exceeds_the_energy(
    exponents: list[int], num_zeros: int, energy: int, shift: int
) -> None:
    # Powers of two: every sum is exact in float64, so strictness can be told from a tie.
    values = [2.0 ** (e + shift) for e in sorted(exponents, reverse=True)] + [0.0] * num_zeros
    squares = [Fraction(v) ** 2 for v in values]
    exceeding = [k for k in range(1, len(values) + 1) if sum(squares[:k]) > Fraction(energy, 64) * sum(squares)]
    assert smallest_rank(np.array(values), energy / 64) == (exceeding[0] if exceeding else len(values))


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(0.0, 1e6, allow_subnormal=False), min_size=1, max_size=20).filter(any),
    energy=st.floats(1e-6, 1.0),
)
def test_rank_exceeds_the_energy_or_is_full_and_one_less_does_not(values: list[float], energy: float) -> None:
    spectrum = np.sort(np.array(values))[::-1]
    rank = smallest_rank(spectrum, energy)
    shares = [Fraction(0)]
    for value in spectrum:
        shares.append(shares[-1] + Fraction(float(value)) ** 2)
    slack = Fraction(1, 10**12)
    assert 1 <= rank <= len(values)
    assert rank == len(values) or shares[rank] / shares[-1] > Fraction(energy) - slack
    assert shares[rank - 1] / shares[-1] <= Fraction(energy) + slack


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), low=ENERGIES, high=ENERGIES)
def test_rank_does_not_fall_when_the_energy_rises(values: list[float], low: float, high: float) -> None:
    spectrum = np.sort(np.array(values))[::-1]
    low, high = sorted((low, high))
    assert smallest_rank(spectrum, low) <= smallest_rank(spectrum, high)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 32])
def test_flat_spectrum_at_high_energy_needs_the_full_rank(size: int) -> None:
    # The published loop never tests k = n and leaves rank 0 here.
    assert smallest_rank(np.ones(size), 0.98) == size


def test_energy_that_is_met_but_not_exceeded_needs_one_more() -> None:
    assert smallest_rank(np.ones(4), 0.5) == 3
    assert smallest_rank(np.ones(4), 0.75) == 4
    assert smallest_rank(np.ones(4), 0.7499) == 3


@pytest.mark.parametrize("energy", [0.01, 0.95, 1.0])
def test_a_single_singular_value_has_rank_one(energy: float) -> None:
    assert smallest_rank(np.array([3.0]), energy) == 1


@pytest.mark.parametrize("spectrum", [[2.0, 1.0, 0.5], [1.0, 1.0, 1.0], [1.0, 1e-3, 1e-6]])
def test_energy_one_keeps_all_singular_values(spectrum: list[float]) -> None:
    assert smallest_rank(np.array(spectrum), 1.0) == 3


@pytest.mark.parametrize("size", [0, 1, 5])
def test_rank_is_zero_for_a_spectrum_of_zeros(size: int) -> None:
    assert smallest_rank(np.zeros(size), 0.95) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e-45, 1e30])
def test_rank_does_not_depend_on_the_scale_in_float32(scale: float) -> None:
    assert smallest_rank(np.array([1.0, 1.0], dtype=np.float32) * np.float32(scale), 0.95) == 2
    assert smallest_rank(np.array([1.0, 0.0], dtype=np.float32) * np.float32(scale), 0.95) == 1


@pytest.mark.parametrize("smallest", [1e-30, 1e-200, 5e-324])
def test_rank_of_values_whose_squares_underflow_is_not_zero(smallest: float) -> None:
    assert smallest_rank(np.array([smallest, smallest, 0.0]), 0.95) == 2


def test_rank_of_values_whose_squares_overflow_is_finite() -> None:
    assert smallest_rank(np.array([1e300, 1e300, 1.0]), 0.95) == 2


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.0000001, 95.0, float("nan"), float("inf")])
def test_energy_outside_its_range_is_refused(energy: float) -> None:
    with pytest.raises(ValueError, match=r"energy must be in \(0, 1\], got"):
        smallest_rank(np.ones(3), energy)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 1])
def test_singular_values_that_are_not_finite_are_refused(bad: float, position: int) -> None:
    values = np.ones(2)
    values[position] = bad
    with pytest.raises(ValueError, match="singular values must be finite"):
        smallest_rank(values, 0.95)


def test_smallest_rank_leaves_its_input_as_it_was() -> None:
    values = np.array([4.0, 2.0, 1.0])
    smallest_rank(values, 0.9)
    assert values.tolist() == [4.0, 2.0, 1.0]


# matrix_shape


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((10, 512), (10, 512)),
        ((512, 10), (512, 10)),
        ((64, 32, 5, 5), (64, 800)),
        ((64, 32, 1, 1), (64, 32)),
        ((64, 1, 3, 3), (64, 9)),
        ((1, 17, 64), (17, 64)),
        ((2, 3, 4, 5, 6), (2, 360)),
    ],
)
def test_matrix_shape_drops_axes_of_one_and_joins_all_but_the_first(
    shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    assert matrix_shape(shape) == expected


@pytest.mark.parametrize(
    "shape", [(), (1,), (3,), (1, 1), (1, 7), (7, 1), (1, 7, 1, 1), (0,), (0, 3), (3, 0), (4, 0, 2)]
)
def test_vectors_scalars_and_empty_tensors_have_no_matrix_shape(shape: tuple[int, ...]) -> None:
    assert matrix_shape(shape) is None


@settings(max_examples=100, deadline=None)
@given(shape=st.lists(st.integers(1, 9), max_size=5).map(tuple))
def test_matrix_shape_keeps_the_number_of_elements_and_has_no_side_of_one(shape: tuple[int, ...]) -> None:
    found = matrix_shape(shape)
    if found is not None:
        assert found[0] * found[1] == np.prod(shape, dtype=np.int64)
        assert min(found) > 1


# factorise


@settings(max_examples=150, deadline=None)
@given(matrix=matrices(), energy=ENERGIES)
def test_squared_error_of_factors_is_at_most_one_minus_energy(matrix: Matrix, energy: float) -> None:
    left, right = factorise(matrix, energy)
    assert squared_error(matrix, left, right) <= (1 - energy) + 1e-6


@settings(max_examples=150, deadline=None)
@given(matrix=matrices(), energy=ENERGIES)
def test_no_matrix_of_lower_rank_would_reach_the_energy(matrix: Matrix, energy: float) -> None:
    rank = factorise(matrix, energy)[0].shape[1]
    spectrum = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    # Eckart and Young: the best error at rank K - 1 is the energy of the dropped singular values.
    assert (spectrum[rank - 1 :] ** 2).sum() / (spectrum**2).sum() >= (1 - energy) - 1e-6


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (5, 3), (3, 5)])
@pytest.mark.parametrize("energy", [0.5, 0.95, 1.0])
def test_factors_have_the_shapes_of_a_product(shape: tuple[int, int], energy: float) -> None:
    left, right = factorise(gaussian(*shape), energy)
    assert left.shape[0] == shape[0]
    assert right.shape[1] == shape[1]
    assert 1 <= left.shape[1] == right.shape[0] <= min(shape)
    assert left.dtype == right.dtype == np.float32


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (5, 3), (8, 8)])
def test_energy_one_gives_the_matrix_back(shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape)
    np.testing.assert_allclose(multiply(*factorise(matrix, 1.0)), matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 64), (64, 1)])
def test_a_matrix_with_a_side_of_one_is_kept_whole_at_any_energy(shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape)
    left, right = factorise(matrix, 0.5)
    assert left.shape[1] == 1
    np.testing.assert_allclose(multiply(left, right), matrix, rtol=1e-5, atol=1e-6)


def test_rank_one_matrix_needs_one_pair_of_vectors() -> None:
    matrix = np.outer(gaussian(20), gaussian(30, seed=1))
    left, right = factorise(matrix, 0.999)
    assert (left.shape, right.shape) == ((20, 1), (1, 30))
    np.testing.assert_allclose(multiply(left, right), matrix, rtol=0, atol=1e-5)


def test_rank_zero_factors_of_a_zero_matrix_multiply_to_zeros() -> None:
    left, right = factorise(np.zeros((4, 3), np.float32), 0.95)
    assert (left.shape, right.shape) == ((4, 0), (0, 3))
    assert np.array_equal(multiply(left, right), np.zeros((4, 3), np.float32))


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e-42])
def test_tiny_matrices_are_not_lost(scale: float) -> None:
    matrix = np.outer(np.ones(6), np.ones(5)).astype(np.float32) * np.float32(scale)
    left, right = factorise(matrix, 0.95)
    assert left.shape[1] == 1
    np.testing.assert_allclose(multiply(left, right) / np.float32(scale), matrix / np.float32(scale), rtol=1e-2)


def test_factorise_leaves_its_input_as_it_was() -> None:
    matrix = gaussian(6, 4)
    before = matrix.copy()
    left, right = factorise(matrix, 0.9)
    left += 1
    right += 1
    assert np.array_equal(matrix, before)


@pytest.mark.parametrize("view", [gaussian(6, 4).T, gaussian(6, 4)[::-1], gaussian(6, 8)[:, ::2]])
def test_a_view_is_factored_like_its_copy(view: Matrix) -> None:
    for from_view, from_copy in zip(factorise(view, 0.9), factorise(view.copy(), 0.9), strict=True):
        assert np.array_equal(from_view, from_copy)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_is_refused(bad: float) -> None:
    matrix = gaussian(4, 4)
    matrix[1, 2] = bad
    with pytest.raises(ValueError):  # also the base of numpy's LinAlgError
        factorise(matrix, 0.95)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), inner=st.integers(30, 200))
def test_multiply_sums_in_float64_and_rounds_once(seed: int, inner: int) -> None:
    # Cancels to about a millionth of its terms, where a float32 sum has no correct digit left.
    left = gaussian(3, inner, seed=seed)
    left = np.concatenate([left, -left * np.float32(1 - 2**-20)], axis=1)
    right = gaussian(inner, 4, seed=seed + 1)
    right = np.concatenate([right, right])
    product = multiply(left, right)
    exact = np.array(
        [
            [
                float(sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(row, col, strict=True)))
                for col in right.T
            ]
            for row in left
        ]
    )
    assert product.dtype == np.float32
    np.testing.assert_allclose(product, exact, rtol=1e-4, atol=1e-11)
