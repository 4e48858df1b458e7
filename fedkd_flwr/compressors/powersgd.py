"""One step of power iteration for each update, started where the last one ended.

Vogels, Karimireddy and Jaggi, "PowerSGD", 2019, https://arxiv.org/abs/1905.13727: a fixed rank, no decomposition, error
feedback. It was made for all workers in every step; a client that is seldom sampled starts from an old subspace.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from fedkd_flwr.compressors.base import Compressed, LossyCodec, LossyOptions, exact
from fedkd_flwr.compressors.numbers import Precision
from fedkd_flwr.compressors.payload import Dense, Factored, Part, Parts
from fedkd_flwr.core.arrays import Array, Arrays, Spec, TensorSpec, require_finite
from fedkd_flwr.core.low_rank import matrix_shape
from fedkd_flwr.core.seeds import derive_seed

CODEC_ID = 5
_SUBSPACE = "subspace/"


class PowerSgdOptions(LossyOptions):
    """The rank of every matrix, and the precision of factors and vectors."""

    name: Literal["powersgd"] = "powersgd"
    rank: int = Field(4, ge=1)
    precision: Precision = "float16"

    def build(self, spec: Spec) -> "PowerSgdCodec":
        """The codec of payloads with the tensors of `spec`."""
        return PowerSgdCodec(spec, self.rank, self.precision)


class PowerSgdCodec(LossyCodec):
    """Keeps the right factor of each matrix for its next update."""

    codec_id = CODEC_ID

    def __init__(self, spec: Spec, rank: int, precision: Precision) -> None:
        super().__init__(spec)
        self._rank = rank
        self._precision = precision

    def compress(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> Compressed:
        """Factors at the fixed rank; dense where those would not be smaller.

        Raises:
            ValueError: if the update holds a NaN or an infinity.
        """
        require_finite(update)
        parts: dict[str, Part] = {}
        after: dict[str, Array] = {}
        for tensor in self.spec:
            value, shape = update[tensor.name], matrix_shape(tensor.shape)
            parts[tensor.name] = exact(tensor, value)
            if not isinstance(parts[tensor.name], Dense) or tensor.kind == "buffer":
                continue
            if shape is None or self._rank * sum(shape) >= tensor.size or self._rank > min(shape):
                parts[tensor.name] = Dense(value, self._precision)
                continue
            start = state.get(_SUBSPACE + tensor.name)
            left, right = power_step(
                value.reshape(shape), self._random(tensor, shape[1], seed) if start is None else start
            )
            if not np.isfinite(right).all():
                parts[tensor.name] = Dense(value, self._precision)
                continue
            parts[tensor.name] = Factored(left, right.T, self._precision)
            after[_SUBSPACE + tensor.name] = right
        return self.packed(Parts(parts), after)

    def _random(self, tensor: TensorSpec, cols: int, seed: int) -> Array:
        return np.random.default_rng(derive_seed(seed, tensor.name)).standard_normal((cols, self._rank), np.float32)


def power_step(matrix: Array, start: Array) -> tuple[Array, Array]:
    """Orthonormal left [rows, K] and right [cols, K]: the matrix is about left @ right.T.

    `right` is not finite where the norm of the matrix overflows float32.
    """
    # Scaled by their largest elements, so that no product overflows or underflows float32.
    largest = np.abs(matrix).max()
    scaled = matrix / largest
    left = np.linalg.qr(scaled @ (start / (np.abs(start).max() or 1)))[0]
    with np.errstate(over="ignore"):
        return left, scaled.T @ left * largest
