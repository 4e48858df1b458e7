"""Low-rank form of a matrix, without computing more of its spectrum than is needed.

Equation 8 of Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature Communications
13:2032 (2022), asks for the smallest K with sum(s[:K]**2) / sum(s**2) > T. The denominator is the squared norm of the
matrix, so the largest singular values alone tell when K is reached.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd_flwr.core.arrays import squared_norm

Matrix = NDArray[np.float32]

_NotConverged: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

GRAM_SIDE = 256  # up to here the eigenvectors of the Gram matrix cost less than finding a range
FIRST_RANK = 16
_SAFE_ENERGY = (1e-20, 1e30)  # squared norms within which float32 loses no square that matters
MAX_RANK_SHARE = 4  # past 1/4 of the smaller side the Gram matrix costs less again


def smallest_rank(singular_values: NDArray[Any], energy: float, total: float | None = None) -> int:
    """Smallest K whose energy sum(s[:K]**2) exceeds `energy` * sum(s**2).

    All singular values where no smaller K exceeds it (`energy` 1, a flat spectrum); 0 only for a zero matrix.

    Args:
        singular_values: non-increasing, shape [min(rows, cols)], or only the largest of them.
        energy: the share T of the squared Frobenius norm to exceed, in (0, 1].
        total: that squared norm, where not all singular values are given.

    Raises:
        ValueError: if energy is outside (0, 1] or a singular value is not finite.
    """
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    values = np.asarray(singular_values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("singular values must be finite")
    if values.size == 0 or values[0] == 0.0:
        return 0
    # Scaled by the largest, so that squares of tiny values do not underflow.
    retained = np.cumsum((values / values[0]) ** 2)
    whole = retained[-1] if total is None else max(total / values[0] / values[0], retained[-1])
    return min(int(np.searchsorted(retained, energy * whole, side="right")) + 1, values.size)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns in which a tensor is factored, or None where it is a vector or a scalar.

    Axes of size 1 are dropped; what is left with more than two axes becomes (first, product of the rest), so a
    convolution kernel [out, in, height, width] is one matrix [out, in * height * width].
    """
    axes = [axis for axis in shape if axis != 1]
    if len(axes) < 2 or 0 in axes:
        return None
    return axes[0], int(np.prod(axes[1:], dtype=np.int64))


class PartialSvd:
    """The largest singular values of a matrix and their vectors, found in growing portions.

    The matrix is basis @ image.T, or its transpose where `transposed`, up to the energy that is not found yet. The
    basis is orthonormal, on the smaller side; column k of the image has the norm s_k, so nothing is ever divided by a
    small singular value. Small matrices are decomposed at once, by the eigenvectors of their Gram matrix. For large
    ones a range is found by random projection and one power step (Halko, Martinsson and Tropp,
    https://arxiv.org/abs/0909.4061) and doubled by `grow`, until the Gram matrix is the cheaper way.

    Args:
        matrix: float32, shape [rows, cols], finite.
        seed: of the random projections.
        energy: the squared norm of the matrix, where it is known already.

    Raises:
        numpy.linalg.LinAlgError: if the decomposition does not converge, or the matrix is not finite.
    """

    def __init__(self, matrix: Matrix, seed: int = 0, energy: float | None = None) -> None:
        self.transposed = matrix.shape[0] > matrix.shape[1]
        self.energy = squared_norm(matrix) if energy is None else energy
        if not np.isfinite(self.energy):
            raise np.linalg.LinAlgError("a matrix that is not finite has no singular values")
        scaled = torch.from_numpy(np.ascontiguousarray(matrix))
        self._scale = 1.0 if self.energy > 0.0 else 0.0
        if not _SAFE_ENERGY[0] < self.energy < _SAFE_ENERGY[1]:
            # So that no square underflows or overflows float32.
            self._scale = largest_of(matrix)
            scaled = scaled / (self._scale or 1.0)
        self._wide = scaled.T if self.transposed else scaled  # [side, other], side <= other
        self._side = self._wide.shape[0]
        self._random = torch.Generator().manual_seed(seed % 2**63)
        self._basis = torch.zeros(self._side, 0)
        self._image = torch.zeros(self._wide.shape[1], 0)
        self.singular_values = np.zeros(0)
        self.grow()

    @property
    def complete(self) -> bool:
        """Whether everything is found."""
        return self.singular_values.size == self._side or self._scale == 0.0

    @property
    def basis(self) -> Matrix:
        """Orthonormal columns, shape [min(rows, cols), K]."""
        found: Matrix = self._basis.numpy()
        return found

    @property
    def image(self) -> Matrix:
        """Shape [max(rows, cols), K]; column norms are the singular values."""
        found: Matrix = (self._image if self._scale == 1.0 else self._image * self._scale).numpy()
        return found

    def grow(self) -> None:
        """Find about twice as many singular values."""
        if self.complete:
            return
        rank = max(FIRST_RANK, 2 * self.singular_values.size)
        gram = self._side <= GRAM_SIDE or rank * MAX_RANK_SHARE > self._side
        methods = [self._by_gram, self._by_svd] if gram else [self._extend, self._by_gram, self._by_svd]
        for method in methods:  # each is slower than the one before, and fails less often
            try:
                method()
                return
            except _NotConverged as error:
                reason = str(error)
        raise np.linalg.LinAlgError(reason)

    def _by_gram(self) -> None:
        vectors = torch.linalg.eigh(self._wide @ self._wide.T).eigenvectors.flip(1)
        self._take(vectors, self._wide.T @ vectors)

    def _by_svd(self) -> None:
        vectors = torch.linalg.svd(self._wide, full_matrices=False).U
        self._take(vectors, self._wide.T @ vectors)

    def _extend(self) -> None:
        num_columns = max(FIRST_RANK, self.singular_values.size)
        drawn = torch.randn(self._wide.shape[1], num_columns, generator=self._random)
        sketch = self._outside(self._wide @ drawn)
        sketch = self._outside(self._wide @ (self._wide.T @ sketch))
        basis = torch.cat([self._basis, sketch], dim=1)
        image = torch.cat([self._image, self._wide.T @ sketch], dim=1)
        rotation = torch.linalg.eigh(image.T @ image).eigenvectors.flip(1)
        self._take(basis @ rotation, image @ rotation)

    def _outside(self, sketch: Tensor) -> Tensor:
        """Orthonormal columns for the part of a sketch that the basis does not span."""
        for _ in range(2):  # twice is enough: the second pass takes away what rounding left
            sketch = torch.linalg.qr(sketch - self._basis @ (self._basis.T @ sketch)).Q
        return sketch

    def _take(self, basis: Tensor, image: Tensor) -> None:
        norms = image.double().square().sum(0).sqrt()
        order = torch.argsort(norms, descending=True, stable=True)  # rounding can swap equal ones
        self._basis, self._image = basis[:, order].contiguous(), image[:, order].contiguous()
        self.singular_values = norms[order].numpy() * self._scale


def largest_of(matrix: Matrix) -> float:
    """The largest magnitude of the elements; 0 where there are none."""
    return max(float(matrix.max(initial=0.0)), -float(matrix.min(initial=0.0)))


def row_energies(matrix: Matrix) -> NDArray[np.float64]:
    """The squared norm of every row."""
    with np.errstate(over="ignore"):
        energies: NDArray[np.float64] = np.einsum("ij,ij->i", matrix, matrix).astype(np.float64)
    if _SAFE_ENERGY[0] < energies.max(initial=0.0) < _SAFE_ENERGY[1]:
        return energies
    wide: NDArray[np.float64] = np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64)
    return wide


def factorise(matrix: Matrix, energy: float, seed: int = 0) -> tuple[Matrix, Matrix]:
    """Factors of the truncated SVD: left [rows, K] and right [K, cols], the singular values folded into the longer.

    K is `smallest_rank` at `energy`, or a little above it for a large matrix: singular values found by random
    projection are a little too small. left @ right has a squared error of at most (1 - energy) of the squared norm.

    Args:
        matrix: float32, shape [rows, cols].
        energy: in (0, 1].
        seed: of the random projections.

    Raises:
        numpy.linalg.LinAlgError: if the decomposition does not converge, or the matrix is not finite.
    """
    found = PartialSvd(matrix, seed)
    while not found.complete and np.square(found.singular_values).sum() <= energy * found.energy:
        found.grow()
    rank = smallest_rank(found.singular_values, energy, None if found.complete else found.energy)
    basis, image = found.basis[:, :rank], found.image[:, :rank]
    return (image, basis.T) if found.transposed else (basis, image.T)


def multiply(left: NDArray[Any], right: NDArray[Any]) -> Matrix:
    """Left @ right, summed in float64 and rounded to float32 once, so that both ends of a wire agree."""
    product: NDArray[np.float64] = left.astype(np.float64) @ right.astype(np.float64)
    rounded: Matrix = product.astype(np.float32)
    return rounded
