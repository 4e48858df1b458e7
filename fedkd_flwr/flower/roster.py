"""The server's table of clients: who is connected, and what each one holds."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any, Literal

from flwr.proto.node_pb2 import NodeInfo

from fedkd_flwr.flower.archive import Archive
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.records import HelloReply

_NOT_CONNECTED = -1
_NOTHING = -1
_OWNER_DIGITS = 32  # 128 bits: nobody finds a second key of the same digest
_MOST_NAMES_PER_CLIENT = 4  # over the whole training, and of one node: an operator may correct a name a few times


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
        owner: digest of the public key that the name belongs to; empty where it belongs to none.
        admitted_by: digest of the key, or number of the node, that claimed the name first.
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
    owner: str = ""
    admitted_by: str = ""

    @property
    def needs_resync(self) -> bool:
        """Whether it holds less than it was sent: catching up sends the same bytes again."""
        return (_NOTHING if self.version is None else self.version) < self.sent_version


class Roster:
    """Clients by name. Flower's node ids are random and change on a restart; names last.

    Args:
        num_clients: that the experiment has. No more names are taken in at a time, so that nobody can crowd the others
            out, and not many more over the whole training; of one node, a few.
        released: names of an earlier process that the next key to claim them gets; None for all of them.
    """

    def __init__(self, num_clients: int, released: Collection[str] | None = ()) -> None:
        self._num_clients = num_clients
        self._released = released
        self._seats: dict[str, Seat] = {}
        self._refused: dict[int, tuple[str, str]] = {}  # name and owner, by node
        self._stale: set[int] = set()

    def unknown(self, live: Iterable[int]) -> list[int]:
        """Nodes to ask who they are: new ones, those whose version is uncertain, and those refused whose rival is gone.

        Flower shows a node that was killed as live for up to a minute, while its successor is there already.
        """
        nodes = set(live)
        self._refused = {n: who for n, who in self._refused.items() if n in nodes and self.refusal(n, *who, nodes)}
        known = {seat.node_id for seat in self._seats.values()} - self._stale
        return sorted(nodes - known - self._refused.keys())

    def refusal(self, node_id: int, client_key: str, owner: str, live: Iterable[int]) -> str:
        """Why a node may not have a name; empty where it may.

        Args:
            node_id: Flower's.
            client_key: the name that it claims.
            owner: digest of its public key; empty where names belong to no key.
            live: nodes that are connected.
        """
        others = set(live) - {node_id}
        seat = self._seats.get(client_key)
        if seat is not None:
            if seat.owner and seat.owner != owner:
                return "a node with another key than the one that had this name first"
            return "a second live node with this name" if seat.node_id in others else ""
        claimed = sum(seat.admitted_by == _claimant(node_id, owner) for seat in self._seats.values())
        if claimed >= _MOST_NAMES_PER_CLIENT:
            return f"a node that has had {claimed} names"
        connected = sum(seat.node_id in others for seat in self._seats.values())
        if connected >= self._num_clients or len(self._seats) >= _MOST_NAMES_PER_CLIENT * self._num_clients:
            return "a client more than num_clients"
        return ""

    def seat(self, client_key: str) -> Seat | None:
        """What is known of a client."""
        return self._seats.get(client_key)

    def all(self) -> list[Seat]:
        """Every client ever seen, by name."""
        return [seat for _, seat in sorted(self._seats.items())]

    def admit(
        self, node_id: int, reply: HelloReply, version: int | None, current: int, live: Iterable[int], owner: str = ""
    ) -> str:
        """Take a node's word for who it is, or say why not: if the name is another's, or there are names enough.

        Args:
            node_id: Flower's.
            reply: what it says.
            version: the version it holds, if that is one of ours.
            current: the server's version.
            live: nodes that are connected.
            owner: digest of its public key; empty where names belong to no key.

        Returns:
            Why it was refused, empty if it wasn't.
        """
        if refusal := self.refusal(node_id, reply.client_key, owner, live):
            self._refused[node_id] = reply.client_key, owner
            return refusal
        # A node that changes its name leaves the old one behind, with all that is known of it.
        self._seats = {
            key: replace(other, node_id=_NOT_CONNECTED) if other.node_id == node_id else other
            for key, other in self._seats.items()
        }
        seat = self._seats.get(reply.client_key)
        claimant = _claimant(node_id, owner)
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
            owner=owner,
            admitted_by=seat.admitted_by if seat is not None else claimant,
        )
        self._stale.discard(node_id)
        return ""

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
        """Go on from a checkpoint: the same clients, none of them connected yet.

        Raises:
            RunError: if a name that is to be released was never heard of.
        """
        seats: list[dict[str, Any]] = archive.facts["seats"]
        for facts in seats:
            seat = Seat(**(facts | {"node_id": _NOT_CONNECTED}))
            freed = self._released is None or seat.client_key in self._released
            self._seats[seat.client_key] = replace(seat, owner="") if freed else seat
        if missing := sorted(set(self._released or ()) - self._seats.keys()):
            known = ", ".join(sorted(self._seats)) or "none"
            raise RunError(f"server.release_names must be names of this run's clients ({known}), got {missing[0]!r}")


def _claimant(node_id: int, owner: str) -> str:
    """Who claims a name: a key where keys last, else a node for as long as it is connected."""
    return owner or str(node_id)


def owners_of(nodes: Iterable[NodeInfo], bind: Literal["registered", "all", "none"]) -> dict[int, str]:
    """Digests of the keys to which the names of nodes belong, by node; of the others none.

    A SuperLink tells of each node its public key and the name that it was registered under. A node that was not
    registered by anybody has no such name, and a key that it drew when it started.

    Args:
        nodes: that are connected.
        bind: see `ServerOptions.bind_names`.
    """
    if bind == "none":
        return {}
    return {
        node.node_id: sha256(node.public_key).hexdigest()[:_OWNER_DIGITS]
        for node in nodes
        if node.public_key and (bind == "all" or node.name)
    }
