"""One round on the server, from the choice of clients to the row in the ledger."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter

from fedkd_flwr.core.printable import printable
from fedkd_flwr.flower.records import Reply
from fedkd_flwr.flower.roster import Seat

_log = logging.getLogger("fedkd")


@dataclass(frozen=True, slots=True)
class Rejection:
    """A reply that does not count.

    Attributes:
        client: client key.
        kind: what it is counted under: error, silent, unsent, late, malformed, stale, payload, norm, aggregate.
        reason: in words.
    """

    client: str
    kind: str
    reason: str


@dataclass
class Round:
    """What one round gathers on its way to the ledger.

    Attributes:
        number: 0 before training, 1 to num_rounds, num_rounds + 1 for the final evaluation.
        progress: share of training done, in [0, 1].
        version: that clients work from.
        lineage: of that version.
        wire_bytes_before: moved by the run when the round began.
        attempt: of the messages that are out.
        seats: clients asked, by Flower's node id.
        sampled: their names, as first chosen.
        resynced: those among them that are sent again what they were sent before.
        trains: whether it asks for training, not for scores alone.
        accepted: good replies, by client key.
        rejected: every other outcome.
        num_clipped: accepted updates, of parameters or of buffers, that were scaled down to what is believed.
        seconds: by name, summed over clients and server.
        payload_bytes: of the broadcast.
    """

    number: int
    progress: float
    version: int
    lineage: bytes
    wire_bytes_before: int = 0
    attempt: int = 1
    seats: dict[int, Seat] = field(default_factory=dict)
    sampled: list[str] = field(default_factory=list)
    resynced: set[str] = field(default_factory=set)
    trains: bool = False
    accepted: dict[str, Reply] = field(default_factory=dict)
    num_clipped: int = 0
    rejected: list[Rejection] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    payload_bytes: int = 0

    def reject(self, client_key: str, kind: str, reason: str) -> None:
        """Note that a client's reply does not count, and why, in one printable line."""
        reason = printable(reason)
        _log.warning("round %d: reply of %s rejected: %s", self.number, client_key, reason)
        self.rejected.append(Rejection(client_key, kind, reason))

    def timed(self, name: str, started: float) -> None:
        """Add the time since `started` under a name."""
        self.spent({name: perf_counter() - started})

    def spent(self, seconds: Mapping[str, float]) -> None:
        """Add seconds under their names."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
