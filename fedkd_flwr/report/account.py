"""What a ledger says of each client, of each round's bytes, and of what went wrong."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedkd_flwr.measure.ledger import Row

NOBODY = "-"  # stands in the ledger for a node that has not said who it is
SERVER = "server"


@dataclass
class ClientAccount:
    """One client.

    Attributes:
        num_asked: rounds that asked it to train.
        num_answered: rounds with a good reply of it.
        uplink: bytes from it.
        downlink: bytes to it.
        num_rejected: replies that did not count.
        version: of the shared model that its last good reply was made from; None before the first.
        events: what was unusual, as (round, text).
    """

    num_asked: int = 0
    num_answered: int = 0
    uplink: int = 0
    downlink: int = 0
    num_rejected: int = 0
    version: int | None = None
    events: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Account:
    """A run, seen from its rows.

    Attributes:
        clients: by name.
        bytes_by_round: (uplink, downlink); 0 is before training, num_rounds + 1 the final evaluation.
        rejected: how often each reason was given, by kind.
        skipped: rounds without enough good replies.
        last_round: the last that is closed; None before the first. Round 0 is the state before training.
        num_online: clients that were connected, by the version they hold ("unknown" where that is uncertain);
            None where the ledger does not say.
        offline: names of clients that were there once and are not now.
        reason: why the run ended, where it did not complete.
    """

    clients: dict[str, ClientAccount] = field(default_factory=dict)
    bytes_by_round: dict[int, tuple[int, int]] = field(default_factory=dict)
    rejected: dict[str, Counter[str]] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    last_round: int | None = None
    num_online: dict[str, int] | None = None
    offline: list[str] = field(default_factory=list)
    reason: str = ""

    def client(self, name: str) -> ClientAccount:
        """The client of a name, new where it has not been heard of."""
        return self.clients.setdefault(name, ClientAccount())

    def take(self, row: Row) -> None:
        """Add one row."""
        if row["kind"] == "message":
            self._take_message(row)
        elif row["kind"] == "event" and row["client"] != NOBODY:
            self.client(row["client"]).events.append((row["round"], row["event"]))
        elif row["kind"] in ("round", "final"):
            self._take_round(row)
        if row["kind"] in ("resume", "end"):
            self.reason = row.get("reason", "")

    def _take_message(self, row: Row) -> None:
        up, down = self.bytes_by_round.get(row["round"], (0, 0))
        is_uplink = row["direction"] == "uplink"
        up, down = up + row["wire_bytes"] * is_uplink, down + row["wire_bytes"] * (not is_uplink)
        self.bytes_by_round[row["round"]] = (up, down)
        if row["node"] != NOBODY:
            client = self.client(row["node"])
            client.uplink += row["wire_bytes"] * is_uplink
            client.downlink += row["wire_bytes"] * (not is_uplink)

    def _take_round(self, row: Row) -> None:
        if row["kind"] == "round":
            self.last_round = row["round"]
            if row["skipped"]:
                self.skipped.append(row["round"])
            for name in row.get("sampled", ()):
                self.client(name).num_asked += 1
        for name in row.get("clients", ()):
            client = self.client(name)
            client.num_answered += row["kind"] == "round"
            client.version = row["local_version"]
        for rejection in row.get("rejected", ()):
            self.rejected.setdefault(rejection["kind"], Counter())[rejection["reason"]] += 1
            if rejection["client"] not in (SERVER, NOBODY):
                self.client(rejection["client"]).num_rejected += 1
        self.num_online = row.get("online")
        self.offline = row.get("offline", [])


def account_of(rows: Iterable[Row]) -> Account:
    """What rows add up to; rounds that were done twice must be left out before (`without_repeats`)."""
    account = Account()
    for row in rows:
        account.take(row)
    return account
