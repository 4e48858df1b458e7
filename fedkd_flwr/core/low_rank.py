"""Low-rank form of a matrix at a given energy.

Equation 8 of Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature Communications
13:2032 (2022): the smallest K with sum(s[:K]**2) / sum(s**2) > T.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


def smallest_rank(singular_values: NDArray[Any], energy: float) -> int:
    """Smallest K whose energy sum(s[:K]**2) exceeds `energy` * sum(s**2).

    All singular values where no smaller K exceeds it (`energy` 1, a flat spectrum); 0 only for a zero matrix.

    Args:
        singular_values: non-increasing, shape [min(rows, cols)].
        energy: the share T of the squared Frobenius norm to exceed, in (0, 1].

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
    return min(int(np.searchsorted(retained, energy * retained[-1], side="right")) + 1, values.size)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns in which a tensor is factored, or None where it is a vector or a scalar.

    Axes of size 1 are dropped; what is left with more than two axes becomes (first, product of the rest), so a
    convolution kernel [out, in, height, width] is one matrix [out, in * height * width].
    """
    axes = [axis for axis in shape if axis != 1]
    if len(axes) < 2 or 0 in axes:
        return None
    return axes[0], int(np.prod(axes[1:], dtype=np.int64))


def factorise(matrix: Matrix, energy: float) -> tuple[Matrix, Matrix]:
    """Factors of the truncated SVD: left [rows, K] with the singular values folded in, right [K, cols].

    K is `smallest_rank` at `energy`; left @ right has a squared error of at most (1 - energy) of the squared norm.

    Args:
        matrix: float32, shape [rows, cols].
        energy: in (0, 1].

    Raises:
        numpy.linalg.LinAlgError: if the decomposition does not converge, or overflows.
    """
    try:
        u, s, vt = torch.linalg.svd(torch.from_numpy(np.ascontiguousarray(matrix)), full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise np.linalg.LinAlgError(str(error)) from error
    if not torch.isfinite(s).all():
        raise np.linalg.LinAlgError("singular values overflow float32")
    rank = smallest_rank(s.numpy(), energy)
    left: Matrix = (u[:, :rank] * s[:rank]).contiguous().numpy()
    right: Matrix = vt[:rank].contiguous().numpy()
    return left, right


def multiply(left: Matrix, right: Matrix) -> Matrix:
    """Left @ right, summed in float64 and rounded to float32 once, so that both ends of a wire agree."""
    product: Matrix = (left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)
    return product
