"""A tensor as multiples of one step: its singular components, or its rows."""

import numpy as np
from numpy.typing import NDArray

from fedkd_flwr.compressors.allocation import Candidate
from fedkd_flwr.compressors.coded import (
    MAX_MAGNITUDE,
    UNIT_CODE,
    CodedDense,
    CodedFactored,
    code_of,
    is_exact,
    powers,
    spread_of,
)
from fedkd_flwr.compressors.payload import Part, Zero
from fedkd_flwr.core.low_rank import largest_of
from fedkd_flwr.core.rate_distortion import quantise

_ROWS_SHARE = 0.75  # rows are named where fewer than this are sent


def coded_factors(candidate: Candidate, rank: int, step: float) -> Part | None:
    """The largest singular components as integers; None where they would need too many digits."""
    svd = candidate.svd
    if svd is None or not svd.singular_values[0] <= MAX_MAGNITUDE * step:
        return None
    values = svd.singular_values[:rank]
    basis = quantise(svd.basis[:, :rank] * values, step)
    codes = code_of(values / step)
    seen = basis * powers(codes)  # the basis as the other end will have it
    wide = candidate.matrix.T if svd.transposed else candidate.matrix
    try:
        fitted = np.linalg.solve(seen.T @ seen, (seen.astype(np.float32).T @ wide).astype(np.float64))
    except np.linalg.LinAlgError:
        fitted = svd.image[:, :rank].T.astype(np.float64)
    if not np.abs(fitted).max() <= MAX_MAGNITUDE * step:
        return None
    image = quantise(fitted, step)
    used = basis.any(axis=0) & image.any(axis=1)
    basis, image = basis[:, used], image[used]
    if not used.any():
        return Zero()
    factors = (image.T, basis.T) if svd.transposed else (basis, image)
    part = CodedFactored(*factors, codes[used], candidate.rows)
    return part if is_exact(part) else None


def coded_rows(candidate: Candidate, wanted: NDArray[np.bool_], step: float) -> Part | None:
    """Some rows of the matrix as integers; None where they would need too many digits."""
    if not largest_of(candidate.matrix) <= MAX_MAGNITUDE * step:
        return None
    integers = quantise(candidate.matrix, step)
    integers[~wanted] = 0
    moved = integers.any(axis=1)
    if not moved.any():
        return Zero()
    rows: NDArray[np.bool_] | None = None
    if candidate.rows is not None or np.count_nonzero(moved) < _ROWS_SHARE * moved.size:
        rows = np.ones(moved.size, np.bool_) if candidate.rows is None else candidate.rows.copy()
        rows[rows] = moved
        integers = integers[moved]
    values = candidate.matrix if rows is None else candidate.matrix[moved]
    scale = float((integers * values).sum() / np.square(integers).sum() / step)
    correction = int(np.clip(np.rint(UNIT_CODE * (1 - np.log2(max(scale, 0.5)))), 0, 15))
    flat = integers.reshape(-1)
    return CodedDense(flat, correction, spread_of(flat), rows)
