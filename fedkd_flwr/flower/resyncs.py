"""How often a client may be sent again what it was sent before.

A small request for a full model must not be able to drain the server's uplink: a client that keeps forgetting waits
twice as long each time, and only a few are served in one round. Only good replies in rounds in which it had forgotten
nothing are to its credit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.flower.archive import Archive
from fedkd_flwr.flower.roster import Seat

_LONGEST_WAIT_ROUNDS = 32


@dataclass
class Resyncs:
    """Back-off for each client, and a limit for each round.

    Attributes:
        per_round: clients served in one round.
        seed: chooses among more of them than that.
    """

    per_round: int
    seed: int
    _served: dict[str, tuple[int, int]] = field(default_factory=dict)  # client key: how often, in which round last

    def eligible(self, seats: Sequence[Seat], server_round: int) -> list[Seat]:
        """Seats without those that must wait."""
        again = [seat for seat in seats if seat.needs_resync and self._waited(seat.client_key, server_round)]
        again.sort(key=lambda seat: derive_seed(self.seed, "resync", server_round, seat.client_key))
        served = {seat.client_key for seat in again[: self.per_round]}
        return [seat for seat in seats if not seat.needs_resync or seat.client_key in served]

    def served(self, client_key: str, server_round: int) -> None:
        """A client is being sent again what it was sent before."""
        times, _ = self._served.get(client_key, (0, 0))
        self._served[client_key] = (times + 1, server_round)

    def kept(self, client_key: str) -> None:
        """A client has given a good reply without being sent anything again: one time is forgiven."""
        times, last = self._served.pop(client_key, (0, 0))
        if times > 1:
            self._served[client_key] = (times - 1, last)

    def _waited(self, client_key: str, server_round: int) -> bool:
        times, last = self._served.get(client_key, (0, 0))
        return times == 0 or server_round - last >= min(2 ** (times - 1), _LONGEST_WAIT_ROUNDS)

    def saved(self) -> Archive:
        """For a checkpoint."""
        return Archive({"served": {key: list(value) for key, value in self._served.items()}})

    def restore(self, archive: Archive) -> None:
        """Go on from a checkpoint."""
        served: dict[str, Any] = archive.facts["served"]
        self._served = {key: (times, last) for key, (times, last) in served.items()}
