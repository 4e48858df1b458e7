"""What a ledger's bytes take in time over links of a given speed: a model, not a measurement.

Every client has a link of its own, slower up than down as a rule. Clients move their messages at the same time, so a
round takes as long as the client with the most to move; training and waiting are not counted.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, Field

BITS = 8
MEGABIT = 1e6
_UNKNOWN = "-"  # a node that has not said who it is


class NetworkOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """The link of every client.

    Attributes:
        uplink_mbps: from the client, in 10^6 bits a second.
        downlink_mbps: to it.
        latency_ms: that every message takes besides.
        round_deadline_s: counts the clients whose messages of a round would take longer than this. Nothing is dropped:
            what a run does not wait for is `server.round_timeout_seconds`.
    """

    uplink_mbps: float = Field(gt=0)
    downlink_mbps: float = Field(gt=0)
    latency_ms: float = Field(0.0, ge=0)
    round_deadline_s: float | None = Field(None, gt=0)

    def seconds(self, num_bytes: int, direction: str) -> float:
        """How long one message is on its way.

        Args:
            num_bytes: of the message, framing included.
            direction: "uplink" or "downlink".
        """
        speed = self.uplink_mbps if direction == "uplink" else self.downlink_mbps
        return self.latency_ms / 1e3 + BITS * num_bytes / (MEGABIT * speed)

    def describe(self) -> str:
        """In a few words."""
        latency = f", {self.latency_ms:g} ms a message" if self.latency_ms else ""
        return f"{self.uplink_mbps:g} Mbit/s up, {self.downlink_mbps:g} down{latency}"


# Where an experiment names no network: the link that figures of different methods are drawn for.
USUAL = NetworkOptions(uplink_mbps=1.0, downlink_mbps=10.0)


@dataclass
class Transfer:
    """Time that messages take, round by round.

    Attributes:
        link: of every client.
        by_round: seconds of each round, those of its slowest client.
        seconds: of all rounds so far, one after the other.
    """

    link: NetworkOptions
    by_round: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    _by_node: dict[int, dict[str, float]] = field(default_factory=dict)
    _before: dict[int, float] = field(default_factory=dict)  # seconds of rounds before the run was resumed
    _late_before: Counter[int] = field(default_factory=Counter)
    _unknown: Counter[tuple[int, str]] = field(default_factory=Counter)

    def take(self, row: Mapping[str, Any]) -> None:
        """Add a row of the ledger; only messages count, and where a resumed run began anew."""
        if row["kind"] == "resume":
            self._begin_anew()
        if row["kind"] != "message":
            return
        node = row["node"]
        if node == _UNKNOWN:  # the first answer in a round is to the first greeting, as far as anybody knows
            self._unknown[row["round"], row["direction"]] += 1
            node = f"{_UNKNOWN}{self._unknown[row['round'], row['direction']]}"
        nodes = self._by_node.setdefault(row["round"], {})
        num_bytes = row["wire_bytes"] + row.get("framing_bytes", 0)
        nodes[node] = nodes.get(node, 0.0) + self.link.seconds(num_bytes, row["direction"])
        before = self.by_round.get(row["round"], 0.0)
        self.by_round[row["round"]] = max(before, self._before.get(row["round"], 0.0) + nodes[node])
        self.seconds += self.by_round[row["round"]] - before

    @property
    def late_by_round(self) -> dict[int, int]:
        """How many clients would have been beyond the deadline in a round; rounds without any are left out."""
        late = self._late_before + self._late()
        return {number: count for number, count in sorted(late.items()) if count}

    def _late(self) -> Counter[int]:
        deadline = self.link.round_deadline_s
        if deadline is None:
            return Counter()
        return Counter({number: sum(s > deadline for s in nodes.values()) for number, nodes in self._by_node.items()})

    def _begin_anew(self) -> None:
        """What follows comes after all that was, also where a round has the number of one before."""
        self._late_before += self._late()
        self._before, self._by_node, self._unknown = dict(self.by_round), {}, Counter()


def network_of(rows: Iterable[Mapping[str, Any]]) -> NetworkOptions | None:
    """The links that a run names; those that it named last, where it was resumed with others."""
    named: Mapping[str, Any] | None = None
    for row in rows:
        if row["kind"] == "start" or (row["kind"] == "resume" and "network" in row):
            named = row.get("network")
    return NetworkOptions(**named) if named else None


def transfer_of(rows: Iterable[Mapping[str, Any]], link: NetworkOptions) -> Transfer:
    """The transfer of all rows."""
    transfer = Transfer(link)
    for row in rows:
        transfer.take(row)
    return transfer
