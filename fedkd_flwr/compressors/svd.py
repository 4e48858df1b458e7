"""Truncated SVD of the update at a scheduled energy, as published.

Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature Communications 13:2032
(2022), equations 8 and 9: every matrix of the update is factored on its own, at the smallest rank whose energy exceeds
T(t). float32 factors, no error feedback. Vectors and buffers travel dense, and so does a matrix whose factors would
not be smaller: a Gaussian 768 x 768 needs rank 468 at T = 0.95, which is 1.22 times its own size.

Beyond the paper, by option: factors and vectors of fewer bits, and error feedback.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from fedkd_flwr.compressors.base import Compressed, ErrorFeedback, LossyCodec, LossyOptions, exact
from fedkd_flwr.compressors.numbers import Precision
from fedkd_flwr.compressors.payload import Dense, Factored, Part, Parts
from fedkd_flwr.core.arrays import Array, Arrays, Spec, TensorSpec, require_finite
from fedkd_flwr.core.low_rank import factorise, matrix_shape
from fedkd_flwr.core.schedules import Schedule, linear
from fedkd_flwr.core.seeds import derive_seed

CODEC_ID = 1


class SvdOptions(LossyOptions):
    """The paper's compressor, and what it becomes with fewer bits or with error feedback.

    Attributes:
        energy_start: share of each matrix's squared norm that the first payload keeps, in (0, 1].
        energy_end: of the last; the paper raises it from 0.95 to 0.98 over the training.
        precision: of factors and vectors: "float32" as published, "float16", "int8", "int4". Integers have one scale
            for each rank of a matrix, and for each 64 values of a vector.
        error_feedback: none, as published.
    """

    name: Literal["svd"] = "svd"
    energy_start: float = Field(0.95, gt=0, le=1)
    energy_end: float = Field(0.98, gt=0, le=1)
    precision: Precision = "float32"
    error_feedback: ErrorFeedback = "none"

    def objection_to_noise(self) -> str:
        """An energy: noise is spread over all directions, so nearly all of them would be kept."""
        return super().objection_to_noise() or (
            "name must be a compressor with a fixed size, because energy does not tell noise from signal: "
            "transform_coding with bytes_per_round, powersgd, quantize, top_k or identity; got svd"
        )

    def build(self, spec: Spec) -> "SvdCodec":
        """The codec of payloads with the tensors of `spec`."""
        return SvdCodec(spec, linear(self.energy_start, self.energy_end), self.precision)


class SvdCodec(LossyCodec):
    """Factors every matrix where that saves bytes."""

    codec_id = CODEC_ID

    def __init__(self, spec: Spec, energy: Schedule, precision: Precision) -> None:
        super().__init__(spec)
        self._energy = energy
        self._precision = precision

    def compress(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> Compressed:
        """Factor the update at the energy of `progress`.

        Raises:
            ValueError: if the update holds a NaN or an infinity.
        """
        require_finite(update)
        energy = self._energy(progress)
        parts = {t.name: self._cheapest(t, update[t.name], energy, derive_seed(seed, t.name)) for t in self.spec}
        return self.packed(Parts(parts))

    def _cheapest(self, tensor: TensorSpec, value: Array, energy: float, seed: int) -> Part:
        if not value.any() or tensor.kind == "buffer":
            return exact(tensor, value)
        dense = Dense(value, self._precision)
        shape = matrix_shape(tensor.shape)
        if shape is None:
            return dense
        try:
            left, right = factorise(np.ascontiguousarray(value.reshape(shape), np.float32), energy, seed)
        except np.linalg.LinAlgError:
            return dense
        # Rank 0 is left when the singular values of a tiny update underflow; it is not zero, so it travels dense. So
        # does a huge one, whose singular values overflow.
        shorter = 0 < left.size + right.size < value.size and bool(np.isfinite(left).all() and np.isfinite(right).all())
        return Factored(left, right, self._precision) if shorter else dense
