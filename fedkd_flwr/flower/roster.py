"""The server's table of clients: who is connected, and what each one holds."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedkd_flwr.flower.archive import Archive
from fedkd_flwr.flower.records import HelloReply

_NOT_CONNECTED = -1
_NOTHING = -1
_MOST_NAMES_PER_CLIENT = 4


@dataclass(frozen=True, slots=True)
class Seat:
    """One client.

    Attributes:
        client_key: its lasting name.
        node_id: Flower's, of this connection.
        version: the version it holds; None where that is not known, or is not one of ours.
        num_examples: its training examples.
        num_test_examples: examples that its scores are means over.
        counted_round: round of its last reply that entered an aggregate; 0 where none did.
        replied_round: round of its last good reply, counted or not; 0 before the first.
        joined_version: the version that was current when it was first seen.
        sent_version: the newest version that was sent to it; -1 before the first message.
    """

    client_key: str
    node_id: int
    version: int | None
    num_examples: int
    num_test_examples: int = 1
    counted_round: int = 0
    replied_round: int = 0
    joined_version: int = 0
    sent_version: int = _NOTHING

    @property
    def needs_resync(self) -> bool:
        """Whether it holds less than it was sent: catching up sends the same bytes again."""
        return (_NOTHING if self.version is None else self.version) < self.sent_version


class Roster:
    """Clients by name. Flower's node ids are random and change on a restart; names last.

    Args:
        num_clients: that the experiment has. No more names are taken in at a time, so that nobody can crowd the others
            out, and not many more over the whole training.
    """

    def __init__(self, num_clients: int) -> None:
        self._num_clients = num_clients
        self._seats: dict[str, Seat] = {}
        self._refused: dict[int, str] = {}
        self._stale: set[int] = set()

    def unknown(self, live: Iterable[int]) -> list[int]:
        """Nodes to ask who they are: new ones, those whose version is uncertain, and those refused whose rival is gone.

        Flower shows a node that was killed as live for up to a minute, while its successor is there already.
        """
        nodes = set(live)
        self._refused = {n: key for n, key in self._refused.items() if n in nodes and self._kept_out(key, nodes)}
        known = {seat.node_id for seat in self._seats.values()} - self._stale
        return sorted(nodes - known - self._refused.keys())

    def _kept_out(self, client_key: str, live: set[int]) -> bool:
        """Whether another live node has the name or, of a name never seen, as many are connected as there may be."""
        if (seat := self._seats.get(client_key)) is not None:
            return seat.node_id in live
        num_connected = sum(seat.node_id in live for seat in self._seats.values())
        return num_connected >= self._num_clients or len(self._seats) >= _MOST_NAMES_PER_CLIENT * self._num_clients

    def seat(self, client_key: str) -> Seat | None:
        """What is known of a client."""
        return self._seats.get(client_key)

    def all(self) -> list[Seat]:
        """Every client ever seen, by name."""
        return [seat for _, seat in sorted(self._seats.items())]

    def admit(self, node_id: int, reply: HelloReply, version: int | None, current: int, live: Iterable[int]) -> bool:
        """Take a node's word for who it is. False if another live node has that name, or there are names enough.

        Args:
            node_id: Flower's.
            reply: what it says.
            version: the version it holds, if that is one of ours.
            current: the server's version.
            live: nodes that are connected.
        """
        seat = self._seats.get(reply.client_key)
        if self._kept_out(reply.client_key, set(live) - {node_id}):
            self._refused[node_id] = reply.client_key
            return False
        # A node that changes its name leaves the old one behind, with all that is known of it.
        self._seats = {
            key: replace(other, node_id=_NOT_CONNECTED) if other.node_id == node_id else other
            for key, other in self._seats.items()
        }
        fresh = Seat(reply.client_key, node_id, version, reply.num_examples, joined_version=current)
        # Codec states are out of step where the client has none after the reply that counted; both begin again then.
        in_step = seat is not None and seat.counted_round in (reply.committed_round, reply.replied_round)
        self._seats[reply.client_key] = replace(
            seat or fresh,
            node_id=node_id,
            version=version,
            num_examples=reply.num_examples,
            num_test_examples=reply.num_test_examples,
            counted_round=seat.counted_round if seat is not None and in_step else 0,
        )
        self._stale.discard(node_id)
        return True

    def doubt(self, client_key: str) -> None:
        """What this client holds has become uncertain; ask again before sending it work."""
        self._stale.add(self._seats[client_key].node_id)

    def sent(self, client_key: str, version: int) -> None:
        """The client has been sent what it needs for a version."""
        seat = self._seats[client_key]
        self._seats[client_key] = replace(seat, sent_version=max(seat.sent_version, version))

    def replied(self, client_key: str, version: int, server_round: int) -> None:
        """The client has given a good reply from a version."""
        self._seats[client_key] = replace(self._seats[client_key], version=version, replied_round=server_round)

    def counted(self, client_key: str, server_round: int) -> None:
        """The client's reply of a round has entered an aggregate."""
        self._seats[client_key] = replace(self._seats[client_key], counted_round=server_round)

    def available(self, node_ids: Iterable[int]) -> list[Seat]:
        """Clients that are connected and whose state is known, by name."""
        live = set(node_ids) - self._stale
        return [seat for seat in self.all() if seat.node_id in live]

    def online(self, node_ids: Iterable[int]) -> dict[str, int]:
        """How many connected clients hold each version, by version; those whose version is uncertain as "unknown"."""
        live = set(node_ids)
        held = [None if seat.node_id in self._stale else seat.version for seat in self.all() if seat.node_id in live]
        known = sorted(version for version in held if version is not None)
        counts = Counter(str(version) for version in known)
        return dict(counts) | ({"unknown": held.count(None)} if None in held else {})

    def offline(self, node_ids: Iterable[int]) -> list[str]:
        """Names of clients that were there once and are not connected."""
        live = set(node_ids)
        return [seat.client_key for seat in self.all() if seat.node_id not in live]

    def saved(self) -> Archive:
        """For a checkpoint."""
        return Archive({"seats": [asdict(seat) for seat in self.all()]})

    def restore(self, archive: Archive) -> None:
        """Go on from a checkpoint: the same clients, none of them connected yet."""
        seats: list[dict[str, Any]] = archive.facts["seats"]
        self._seats = {facts["client_key"]: Seat(**(facts | {"node_id": _NOT_CONNECTED})) for facts in seats}
