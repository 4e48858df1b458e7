"""The largest singular values only: against float64 LAPACK, on small and large matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedkd_flwr.core.low_rank import FIRST_RANK, GRAM_SIDE, Matrix, PartialSvd, factorise, smallest_rank

LARGE = [(300, 400), (600, 300), (280, 1200)]  # beyond GRAM_SIDE on both sides


def with_spectrum(shape: tuple[int, int], spectrum: NDArray[np.float64], seed: int = 0, scale: float = 1.0) -> Matrix:
    rng, side = np.random.default_rng(seed), spectrum.size
    left, right = (np.linalg.qr(rng.standard_normal((axis, side)))[0] for axis in shape)
    matrix: Matrix = (scale * (left * spectrum) @ right.T).astype(np.float32)
    return matrix


def low_rank_and_noise(shape: tuple[int, int], rank: int = 8, noise: float = 0.02, seed: int = 0) -> Matrix:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    return (matrix + noise * np.sqrt(rank) * rng.standard_normal(shape)).astype(np.float32)


def kept_energy(matrix: Matrix, left: Matrix, right: Matrix) -> float:
    exact = matrix.astype(np.float64)
    missed = exact - left.astype(np.float64) @ right.astype(np.float64)
    return 1.0 - float((missed**2).sum() / (exact**2).sum())


def decomposed(matrix: Matrix, seed: int = 0) -> PartialSvd:
    found = PartialSvd(matrix, seed)
    while not found.complete:
        found.grow()
    return found


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("kind", ["low rank", "decaying"])
def test_a_large_matrix_reaches_the_energy_at_nearly_the_smallest_rank(
    shape: tuple[int, int], energy: float, kind: str
) -> None:
    side = min(shape)
    decay = (1.0 + np.arange(side)) ** -0.8
    matrix = low_rank_and_noise(shape) if kind == "low rank" else with_spectrum(shape, decay)
    left, right = factorise(matrix, energy)
    least = smallest_rank(np.linalg.svd(matrix.astype(np.float64), compute_uv=False), energy)
    assert kept_energy(matrix, left, right) >= energy - 1e-6
    assert least <= left.shape[1] <= 1.08 * least + 1


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    decay=st.sampled_from([1.0, 0.9, 0.5]),
    energy=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**32),
)
def test_a_small_matrix_has_the_smallest_rank(rows: int, cols: int, decay: float, energy: float, seed: int) -> None:
    matrix = with_spectrum((rows, cols), decay ** np.arange(min(rows, cols)), seed)
    left, right = factorise(matrix, energy)
    spectrum = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    assert kept_energy(matrix, left, right) >= energy - 1e-6
    assert left.shape[1] <= smallest_rank(spectrum, min(energy + 1e-6, 1.0))


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), *LARGE])
def test_singular_values_found_are_those_of_lapack(shape: tuple[int, int]) -> None:
    matrix = with_spectrum(shape, 0.7 ** np.arange(min(shape)))
    found = PartialSvd(matrix)
    exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(found.singular_values[:10], exact[:10], rtol=0.02)
    assert (np.diff(found.singular_values) <= 0).all()
    assert found.energy == pytest.approx((exact**2).sum(), rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), *LARGE])
def test_basis_is_orthonormal_and_the_image_has_the_singular_values_as_norms(shape: tuple[int, int]) -> None:
    found = PartialSvd(low_rank_and_noise(shape))
    found.grow()
    assert found.basis.shape[0] == min(shape)
    assert found.image.shape[0] == max(shape)
    rank = found.singular_values.size
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(rank), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(found.image, axis=0), found.singular_values, rtol=1e-4, atol=1e-4)


def test_a_small_matrix_is_decomposed_at_once() -> None:
    assert PartialSvd(low_rank_and_noise((GRAM_SIDE, 400))).complete
    assert not PartialSvd(low_rank_and_noise((GRAM_SIDE + 1, 400))).complete


@pytest.mark.parametrize("shape", [(300, 400), (600, 300)])
def test_growing_doubles_the_rank_until_everything_is_found(shape: tuple[int, int]) -> None:
    found = PartialSvd(low_rank_and_noise(shape))
    sizes = [found.singular_values.size]
    while not found.complete:
        found.grow()
        sizes.append(found.singular_values.size)
    assert sizes == [FIRST_RANK, 2 * FIRST_RANK, 4 * FIRST_RANK, min(shape)]
    found.grow()
    assert found.singular_values.size == min(shape)


def test_growing_does_not_lose_energy() -> None:
    found = PartialSvd(with_spectrum((300, 320), (1.0 + np.arange(300)) ** -0.5))
    kept = 0.0
    while not found.complete:
        assert np.square(found.singular_values).sum() >= kept
        kept = np.square(found.singular_values).sum()
        found.grow()
    assert np.square(found.singular_values).sum() == pytest.approx(found.energy, rel=1e-5)


@pytest.mark.parametrize("shape", [(300, 300), (280, 500)])
def test_a_flat_spectrum_falls_over_to_the_gram_matrix(shape: tuple[int, int]) -> None:
    side = min(shape)
    matrix = with_spectrum(shape, np.ones(side))
    left, right = factorise(matrix, 0.9)
    assert kept_energy(matrix, left, right) >= 0.9 - 1e-6
    assert left.shape[1] <= 0.9 * side + 1.5


def test_the_same_seed_gives_the_same_factors() -> None:
    matrix = low_rank_and_noise((300, 400))
    for one, two in zip(factorise(matrix, 0.9, seed=5), factorise(matrix, 0.9, seed=5), strict=True):
        assert one.tobytes() == two.tobytes()
    assert factorise(matrix, 0.9, seed=6)[0].tobytes() != factorise(matrix, 0.9, seed=5)[0].tobytes()


def test_the_global_random_numbers_are_neither_used_nor_moved() -> None:
    matrix = low_rank_and_noise((300, 400))
    torch.manual_seed(1)
    first = factorise(matrix, 0.9)[0].tobytes()
    after = torch.rand(1).item()
    torch.manual_seed(1)
    assert torch.rand(1).item() == after
    assert factorise(matrix, 0.9)[0].tobytes() == first


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-19, 1e19, 1e34])
@pytest.mark.parametrize("shape", [(20, 30), (300, 320)])
def test_scale_does_not_matter(shape: tuple[int, int], scale: float) -> None:
    spectrum = 0.8 ** np.arange(min(shape))
    plain = factorise(with_spectrum(shape, spectrum), 0.9)[0].shape[1]
    matrix = with_spectrum(shape, spectrum, scale=scale)
    left, right = factorise(matrix, 0.9)
    assert abs(left.shape[1] - plain) <= 1
    assert kept_energy(matrix / np.float32(scale), left, right / np.float32(scale)) >= 0.9 - 1e-3


@pytest.mark.parametrize("shape", [(3, 5), (300, 400)])
def test_a_zero_matrix_is_complete_with_nothing_found(shape: tuple[int, int]) -> None:
    found = PartialSvd(np.zeros(shape, np.float32))
    assert found.complete
    assert (found.singular_values.size, found.energy) == (0, 0.0)
    assert factorise(np.zeros(shape, np.float32), 0.9)[0].shape == (shape[0], 0)


def test_a_large_matrix_of_low_rank_is_found_whole() -> None:
    # Beyond its rank a sketch is rounding errors, which must not become directions.
    matrix = with_spectrum((300, 400), np.ones(4))
    left, right = factorise(matrix, 0.999)
    assert left.shape[1] == 4
    assert kept_energy(matrix, left, right) >= 1 - 1e-6
    assert np.isfinite(decomposed(matrix).basis).all()


def fail(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def fails(matrix: torch.Tensor, **options: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    for name in names:
        monkeypatch.setattr(torch.linalg, name, fails)


@pytest.mark.parametrize("shape", [(6, 4), (300, 400)])
def test_where_eigenvectors_do_not_converge_the_svd_takes_over(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = low_rank_and_noise(shape)
    fail(monkeypatch, "eigh")
    left, right = factorise(matrix, 0.9)
    assert kept_energy(matrix, left, right) >= 0.9 - 1e-6


@pytest.mark.parametrize("shape", [(6, 4), (300, 400)])
def test_a_decomposition_that_does_not_converge_is_an_error_of_numpy(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "eigh", "svd")
    with pytest.raises(np.linalg.LinAlgError, match="did not converge"):
        factorise(low_rank_and_noise(shape), 0.9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_large_matrix_that_is_not_finite_is_refused(bad: float) -> None:
    matrix = low_rank_and_noise((300, 300))
    matrix[7, 9] = bad
    with pytest.raises(np.linalg.LinAlgError, match="not finite"):
        PartialSvd(matrix)
