"""Uploads into one aggregate. An aggregator sees decoded float32 updates about zero, one at a time."""

from typing import Protocol

from fedkd_flwr.core.arrays import Arrays, RunningMean
from fedkd_flwr.experiment import AggregatorOptions


class Aggregator(Protocol):
    """Turns the uploads of one round into one."""

    def begin(self) -> None:
        """Forget the round before."""

    def add(self, upload: Arrays, num_examples: int) -> None:
        """Take one upload."""

    def result(self) -> Arrays:
        """The aggregate of what was taken since `begin`."""


class Mean:
    """The mean, every client alike or weighted by training examples; one sum in memory for any number of clients."""

    def __init__(self, options: AggregatorOptions) -> None:
        self._uniform = options.weighting == "uniform"
        self._mean = RunningMean()

    def begin(self) -> None:
        """Forget the round before."""
        self._mean = RunningMean()

    def add(self, upload: Arrays, num_examples: int) -> None:
        """Add one upload to the sum."""
        self._mean.add(upload, 1.0 if self._uniform else float(num_examples))

    def result(self) -> Arrays:
        """The mean."""
        return self._mean.result()


AGGREGATORS = {
    "fedavg": Mean,
}
