"""Truncated SVD of the update at a scheduled energy, as published.

Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature Communications 13:2032
(2022), equations 8 and 9: every matrix of the update is factored on its own, at the smallest rank whose energy exceeds
T(t). float32 factors, no error feedback. Vectors and buffers travel dense, and so does a matrix whose factors would
not be smaller: a Gaussian 768 x 768 needs rank 468 at T = 0.95, which is 1.22 times its own size.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from fedkd_flwr.compressors.base import CompressorOptions
from fedkd_flwr.compressors.payload import Dense, Factored, Part, Zero, pack, to_arrays, unpack
from fedkd_flwr.core.arrays import Array, Arrays, Spec, TensorSpec, require_finite
from fedkd_flwr.core.low_rank import factorise, matrix_shape
from fedkd_flwr.core.schedules import Schedule, linear

CODEC_ID = 1


class SvdOptions(CompressorOptions):
    """Energies are shares of the squared norm in (0, 1]; the paper raises them from 0.95 to 0.98 over the training."""

    name: Literal["svd"] = "svd"
    energy_start: float = Field(0.95, gt=0, le=1)
    energy_end: float = Field(0.98, gt=0, le=1)

    def build(self, spec: Spec) -> "SvdCodec":
        """The codec of payloads with the tensors of `spec`."""
        return SvdCodec(spec, linear(self.energy_start, self.energy_end))


class SvdCodec:
    """Factors every matrix where that saves bytes."""

    def __init__(self, spec: Spec, energy: Schedule) -> None:
        self.spec = spec
        self._energy = energy

    def initial_state(self) -> Arrays:
        """Neither end keeps anything."""
        return {}

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        """Factor the update at the energy of `progress`.

        Raises:
            ValueError: if the update holds a NaN or an infinity.
        """
        require_finite(update)
        energy = self._energy(progress)
        parts = {tensor.name: _cheapest(tensor, update[tensor.name], energy) for tensor in self.spec}
        return pack(self.spec, parts, CODEC_ID), state

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        """The update that the factors stand for."""
        return to_arrays(self.spec, unpack(payload, self.spec, CODEC_ID)), state


def _cheapest(tensor: TensorSpec, value: Array, energy: float) -> Part:
    if not value.any():
        return Zero()
    shape = matrix_shape(tensor.shape)
    if shape is None or tensor.kind == "buffer":
        return Dense(value)
    try:
        left, right = factorise(np.ascontiguousarray(value.reshape(shape), np.float32), energy)
    except np.linalg.LinAlgError:
        return Dense(value)
    # Rank 0 is left when the singular values of a tiny update underflow; it is not zero, so it travels dense.
    return Factored(left, right) if 0 < left.size + right.size < value.size else Dense(value)
