"""One round on the server, from the choice of clients to the row in the ledger."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter

from fedkd_flwr.flower.records import Reply
from fedkd_flwr.flower.roster import Seat

_log = logging.getLogger("fedkd")


@dataclass
class Round:
    """What one round gathers on its way to the ledger.

    Attributes:
        number: 0 before training, 1 to num_rounds, num_rounds + 1 for the final evaluation.
        progress: share of training done, in [0, 1].
        version: that clients work from.
        lineage: of that version.
        seats: clients chosen, by Flower's node id.
        accepted: good replies, by client key.
        rejected: client key and reason of every other outcome.
        seconds: by name, summed over clients and server.
        payload_bytes: of the broadcast.
    """

    number: int
    progress: float
    version: int
    lineage: bytes
    seats: dict[int, Seat] = field(default_factory=dict)
    accepted: dict[str, Reply] = field(default_factory=dict)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    payload_bytes: int = 0

    def reject(self, client_key: str, reason: str) -> None:
        """Note that a client's reply does not count, and why."""
        _log.warning("round %d: reply of %s rejected: %s", self.number, client_key, reason)
        self.rejected.append((client_key, reason))

    def timed(self, name: str, started: float) -> None:
        """Add the time since `started` under a name."""
        self.spent({name: perf_counter() - started})

    def spent(self, seconds: Mapping[str, float]) -> None:
        """Add seconds under their names."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
