"""What a message may hold, known at both ends before it is read: its bytes, and the names and ranges of its metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

from fedkd_flwr.core.protocols import Range
from fedkd_flwr.core.quoting import cut
from fedkd_flwr.flower.errors import MessageError

_ROUNDING = 1e-6  # a mean of ones may be a little above 1
_MANY_SECONDS = 1e7


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a reply, and of what brings a client up to date.

    Attributes:
        upload_bytes: of the longest upload; 0 where nothing is exchanged.
        broadcast_bytes: of the longest broadcast.
        snapshot_bytes: of every snapshot.
        scores: each metric of the task, and its range.
        train: each metric of local training, and its range.
        seconds: that one step of a client is believed to take.
    """

    upload_bytes: int
    broadcast_bytes: int
    snapshot_bytes: int
    scores: Mapping[str, Range] = field(default_factory=dict)
    train: Mapping[str, Range] = field(default_factory=dict)
    seconds: float = _MANY_SECONDS

    def group(self, letter: str) -> Mapping[str, Range]:
        """Ranges of a group of a reply's metrics: "t" are those of training, any other letter stands for scores."""
        return self.train if letter == "t" else self.scores

    def require(self, letter: str, name: str, value: float) -> None:
        """Refuse a metric that no client of this release reports.

        Raises:
            MessageError: if its name is unknown, or it is out of its range.
        """
        ranges = self.group(letter)
        if name not in ranges:
            known = ", ".join(ranges) or "none"
            raise MessageError(f"metric {cut(name)!r} has no name that is known here; allowed: {known}")
        if not _within(value, ranges[name]):
            low, high = ranges[name]
            raise MessageError(f"metric {name!r} must be in [{low:g}, {high:g}], got {value:g}")

    def tellable(self, letter: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a client itself that are in their ranges: a model that has diverged costs its score alone."""
        ranges = self.group(letter)
        return {name: value for name, value in metrics.items() if name in ranges and _within(value, ranges[name])}


def _within(value: float, bounds: Range) -> bool:
    low, high = bounds
    return isfinite(value) and low - _ROUNDING <= value <= high + _ROUNDING
