"""The server's table of clients: who is connected, and what each one holds."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedkd_flwr.flower.records import HelloReply


@dataclass(frozen=True, slots=True)
class Seat:
    """One client.

    Attributes:
        client_key: its lasting name.
        node_id: Flower's, of this connection.
        version: the version it holds; None where that is not known, or is not one of ours.
        num_examples: its training examples.
        counted_round: round of its last reply that entered an aggregate; 0 where none did.
    """

    client_key: str
    node_id: int
    version: int | None
    num_examples: int
    counted_round: int = 0


class Roster:
    """Clients by name. Flower's node ids are random and change on a restart; names last."""

    def __init__(self) -> None:
        self._seats: dict[str, Seat] = {}
        self._refused: dict[int, str] = {}
        self._stale: set[int] = set()

    def unknown(self, live: Iterable[int]) -> list[int]:
        """Nodes to ask who they are: new ones, those whose version is uncertain, and those refused whose rival is gone.

        Flower shows a node that was killed as live for up to a minute, while its successor is there already.
        """
        nodes = set(live)
        self._refused = {node: key for node, key in self._refused.items() if self._seats[key].node_id in nodes}
        known = {seat.node_id for seat in self._seats.values()} - self._stale
        return sorted(nodes - known - self._refused.keys())

    def admit(self, node_id: int, reply: HelloReply, version: int | None, live: Iterable[int]) -> bool:
        """Take a node's word for who it is. False if another live node has that name already.

        Args:
            node_id: Flower's.
            reply: what it says.
            version: the version it holds, if that is one of ours.
            live: nodes that are connected.
        """
        seat = self._seats.get(reply.client_key)
        if seat is not None and seat.node_id != node_id and seat.node_id in set(live):
            self._refused[node_id] = reply.client_key
            return False
        self._seats = {key: other for key, other in self._seats.items() if other.node_id != node_id}
        # Codec states are out of step where the client has none after the reply that counted; both begin again then.
        in_step = seat is not None and seat.counted_round in (reply.committed_round, reply.replied_round)
        counted = seat.counted_round if seat is not None and in_step else 0
        self._seats[reply.client_key] = Seat(reply.client_key, node_id, version, reply.num_examples, counted)
        self._stale.discard(node_id)
        return True

    def counted_round(self, client_key: str) -> int:
        """Round of its last reply that entered an aggregate; 0 where none did, or codec states began again."""
        return self._seats[client_key].counted_round

    def doubt(self, client_key: str) -> None:
        """What this client holds has become uncertain; ask again before sending it work."""
        self._stale.add(self._seats[client_key].node_id)

    def holds(self, client_key: str, version: int) -> None:
        """The client has reached a version."""
        self._seats[client_key] = replace(self._seats[client_key], version=version)

    def counted(self, client_key: str, server_round: int) -> None:
        """The client's reply of a round has entered an aggregate."""
        self._seats[client_key] = replace(self._seats[client_key], counted_round=server_round)

    def available(self, node_ids: Iterable[int]) -> list[Seat]:
        """Clients that are connected and whose state is known, by name."""
        live = set(node_ids) - self._stale
        return [seat for _, seat in sorted(self._seats.items()) if seat.node_id in live]
