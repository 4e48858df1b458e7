"""Who is connected: every unknown node is asked who it is and what it holds before it gets work."""

import logging
from collections import Counter
from collections.abc import Callable
from time import monotonic, sleep

from flwr.app import Message
from flwr.serverapp import Grid

from fedkd_flwr.core.printable import printable
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.mailbox import NOBODY, Mailbox
from fedkd_flwr.flower.records import HELLO, Hello, HelloReply
from fedkd_flwr.flower.reference import Reference
from fedkd_flwr.flower.replies import content_of, reason_of
from fedkd_flwr.flower.roster import Roster, Seat, owners_of
from fedkd_flwr.flower.round import Round
from fedkd_flwr.flower.validation import implausible
from fedkd_flwr.measure.ledger import Ledger
from fedkd_flwr.server_options import ServerOptions

TTL_MARGIN_SECONDS = 60.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0
_HOPELESS_HELLOS = 3
_HELLO_PATIENCE_SECONDS = 10.0
_HELLO = "hello"

_log = logging.getLogger("fedkd")


class Reception:
    """Greets nodes, waits for enough of them, and knows which ones are free to work.

    Args:
        options: how long to wait, and what to believe.
        hello: the question.
        roster: who was admitted.
        mailbox: carries the question.
        reference: says which versions are ours.
        reset: told of a client whose codec state begins again; None where nothing is exchanged.
        ledger: gets an event for whatever is unusual.

    Attributes:
        live: nodes that were connected when they were last greeted.
    """

    def __init__(
        self,
        options: ServerOptions,
        hello: Hello,
        roster: Roster,
        mailbox: Mailbox,
        reference: Reference,
        reset: Callable[[str], None] | None,
        ledger: Ledger,
    ) -> None:
        self._options = options
        self._hello = hello
        self._roster = roster
        self._mailbox = mailbox
        self._reference = reference
        self._reset = reset
        self._ledger = ledger
        self.live: set[int] = set()
        self._owners: dict[int, str] = {}  # to which key the name of a node belongs
        self._failed: Counter[int] = Counter()  # hellos that a node answered with an error
        self._disbelieved: dict[str, str] = {}
        self._first_failure = ""

    def gather(self, grid: Grid, current: Round, wanted: int, *, present: bool = False) -> list[Seat]:
        """Clients that are free to work, once there are so many; fewer when the connect timeout is over.

        Gives up at once where enough nodes are connected and none of them can say who it is.

        Args:
            grid: Flower's.
            current: the round.
            wanted: how many.
            present: count those too that are there and will not be asked, because they are not believed.
        """
        deadline = monotonic() + self._options.connect_timeout_seconds
        pause = _FIRST_PAUSE_SECONDS
        while True:
            live = self._greet(grid, current)
            seats = self._free(grid, current)
            num_found = len(seats) + (len(self._disbelieved) if present else 0)
            hopeless = len(live) >= wanted and all(self._failed[node] >= _HOPELESS_HELLOS for node in live)
            if num_found >= wanted or hopeless or monotonic() >= deadline:
                return seats
            sleep(min(pause, max(0.0, deadline - monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def require(self, grid: Grid, current: Round, wanted: int, remedy: str, *, present: bool = False) -> list[Seat]:
        """Clients that are free to work, at least so many. Arguments as of `gather`, and what to do about it.

        Raises:
            RunError: if they are not there within the connect timeout.
        """
        seats = self.gather(grid, current, wanted, present=present)
        if len(seats) + (len(self._disbelieved) if present else 0) < wanted:
            because = f"; first reason: {self._first_failure}" if self._first_failure else ""
            raise RunError(
                f"round {current.number}: {wanted} clients wanted, {len(seats)} connected within "
                f"{self._options.connect_timeout_seconds:g} s{because}; {remedy}"
            )
        return seats

    def refresh(self, grid: Grid, current: Round) -> list[Seat]:
        """Greet once; clients that are free to work now."""
        self._greet(grid, current)
        return self._free(grid, current)

    def _free(self, grid: Grid, current: Round) -> list[Seat]:
        busy = self._mailbox.busy_nodes()
        connected = self._roster.available(grid.get_node_ids())
        disbelieved = implausible(connected, self._options.validation.max_examples_ratio)
        for client_key in disbelieved.keys() - self._disbelieved.keys():
            self._event(current, client_key, f"not asked to train: {disbelieved[client_key]}")
        self._disbelieved = disbelieved
        return [seat for seat in connected if seat.node_id not in busy and seat.client_key not in disbelieved]

    def _greet(self, grid: Grid, current: Round) -> set[int]:
        """Ask every unknown node who it is and what it holds; collect what came late. All live nodes."""
        connected = list(grid.get_nodes())
        self.live = live = {node.node_id for node in connected}
        self._owners |= owners_of(
            connected, self._options.bind_names
        )  # of those that leave, too: their hello may be late
        for asked, message in self._mailbox.collect_late(grid):
            if asked.purpose == _HELLO:
                self._admit(asked.node_id, message, live, current)
            else:
                current.reject(asked.client_key, "late", f"its reply to round {asked.server_round} came after it")
        unknown = [node_id for node_id in self._roster.unknown(live) if node_id not in self._mailbox.busy_nodes()]
        # Who takes longer is heard when it has answered, and so is who could not say before who it is: nobody waits.
        patience = min(_HELLO_PATIENCE_SECONDS, self._options.connect_timeout_seconds / 4)
        failed = [node_id for node_id in unknown if self._failed[node_id]]
        for nodes, seconds in ((failed, 0.0), ([node_id for node_id in unknown if node_id not in failed], patience)):
            self._ask(grid, nodes, seconds, live, current)
        return live

    def _ask(self, grid: Grid, nodes: list[int], patience: float, live: set[int], current: Round) -> None:
        """Say hello to nodes and take in those that answer in so many seconds."""
        if not nodes:
            return
        ttl = self._options.round_timeout_seconds + TTL_MARGIN_SECONDS
        messages = [Message(self._hello.to_records(), node_id, HELLO, ttl=ttl) for node_id in nodes]
        post = self._mailbox.exchange(grid, messages, {}, _HELLO, current.number, patience)
        for node_id, message in post.replies:
            self._admit(node_id, message, live, current)

    def _admit(self, node_id: int, message: Message, live: set[int], current: Round) -> None:
        try:
            reply = HelloReply.from_records(content_of(message))
        except Exception as error:  # whatever a stranger sends, the others go on
            self._failed[node_id] += 1
            self._first_failure = self._first_failure or reason_of(error)
            _log.warning("node %d did not say who it is: %s", node_id, reason_of(error))
            if self._failed[node_id] == 1:  # it is asked again and again
                event = f"not taken in (node {node_id}): {reason_of(error)}"
                self._ledger.write("event", round=current.number, client=NOBODY, event=event)
            return
        del self._failed[node_id]
        key = reply.client_key
        before = self._roster.seat(key)
        held = self._reference.version_of(reply.version, reply.lineage)
        owner = self._owners.get(node_id, "")
        if why := self._roster.admit(node_id, reply, held, self._reference.version, live, owner):
            self._first_failure = self._first_failure or f"{why} was refused: {key!r}"
            self._event(current, key, f"{why} was refused (node {node_id})")
            return
        if before is not None and before.replied_round > 0 and reply.memory != "all":
            fate = "restarts from version 0" if reply.memory == "nothing" else "is kept"
            event = f"lost its state after round {before.replied_round}: its private model {fate}"
            self._event(current, key, event)
        seat = self._roster.seat(key)
        if self._reset is not None and seat is not None and seat.counted_round == 0:
            self._reset(key)  # its encoder begins again, and so does our decoder

    def _event(self, current: Round, client_key: str, event: str) -> None:
        event = printable(event)
        _log.warning("client %s: %s", client_key, event)
        self._ledger.write("event", round=current.number, client=client_key, event=event)
