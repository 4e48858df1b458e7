"""Differential privacy by a trusted server: clip each update, add noise to their sum, divide.

McMahan et al., ICLR 2018, https://arxiv.org/abs/1710.06963, with a fixed clipping norm. Flower's strategy for it adds
float32 noise of numpy's Mersenne Twister, which can be predicted from some of its numbers, and whose last bits tell of
the sum. This one draws noise as clients do (`privacy.py`), so epsilon needs no exception.
"""

import numpy as np
from numpy.typing import NDArray

from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.privacy import clipped_on_grid, grid_step, noise_on_grid
from fedkd_flwr.server_options import DpFixedClippingAggregation


class FixedClipping:
    """The mean of clipped updates, every client alike, with Gaussian noise.

    Args:
        options: how long an update may be, and how much noise its sum gets.
    """

    def __init__(self, options: DpFixedClippingAggregation) -> None:
        self._clip_norm = options.clipping_norm
        self._deviation = options.noise_multiplier * options.clipping_norm
        self._step = grid_step(self._deviation)
        self._sums: dict[str, NDArray[np.float64]] = {}  # multiples of the step: exact, in whatever order
        self._count = 0

    def begin(self, server_round: int) -> None:
        """Forget the round before."""
        self._sums, self._count = {}, 0

    def add(self, upload: Arrays, num_examples: int, loss: float | None, client: str = "") -> None:
        """Add one upload, clipped.

        Raises:
            ValueError: if it holds a NaN or an infinity.
        """
        for name, value in clipped_on_grid(upload, self._clip_norm, self._step).items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def result(self) -> Arrays | None:
        """The mean, with noise; None of nothing."""
        if not self._count:
            return None
        noisy = {
            name: value + noise_on_grid(value.shape, self._deviation, self._step) if self._deviation else value
            for name, value in self._sums.items()
        }
        unit = self._step or 1.0
        return {name: np.asarray(value * unit / self._count, np.float32) for name, value in noisy.items()}

    def state(self) -> Arrays:
        """Nothing is kept."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing to restore."""
