"""Sends messages, waits for their replies no longer than asked, and books every byte.

What is unanswered when its time is over stays on a list: its node is busy and gets no further work until its reply has
been collected as late.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Literal

from flwr.app import Message
from flwr.serverapp import Grid

from fedkd_flwr.flower.carriage import carried_bytes
from fedkd_flwr.flower.grace import Grace
from fedkd_flwr.flower.traffic import traffic_of
from fedkd_flwr.measure.ledger import Ledger, MessageRow

_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 1.0
NOBODY = "-"  # stands for a node that has not said who it is


@dataclass(frozen=True, slots=True)
class Post:
    """What came back for one batch of messages.

    Attributes:
        replies: node id asked, and its reply.
        unsent: node ids that Flower would not send to.
        silent: node ids that did not reply in time.
    """

    replies: tuple[tuple[int, Message], ...]
    unsent: tuple[int, ...]
    silent: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A message whose time is over.

    Attributes:
        node_id: whom it was sent to.
        client_key: that node's name, or `NOBODY`.
        purpose: of the message.
        server_round: of the message.
    """

    node_id: int
    client_key: str
    purpose: str
    server_round: int


class Mailbox:
    """All messages of a run pass here.

    Args:
        ledger: where bytes are booked.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._unanswered: dict[str, Unanswered] = {}  # by message id

    def busy_nodes(self) -> set[int]:
        """Nodes that still have a message of an earlier batch."""
        return {message.node_id for message in self._unanswered.values()}

    def collect_late(self, grid: Grid) -> list[tuple[Unanswered, Message]]:
        """Replies to messages whose time was over, as far as they have come by now. Does not wait."""
        if not self._unanswered:
            return []
        collected = []
        for reply in list(grid.pull_messages(list(self._unanswered))):
            asked = self._unanswered.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None:
                self._book(reply, "uplink", asked.client_key, asked.purpose, asked.server_round)
                collected.append((asked, reply))
        return collected

    def exchange(
        self,
        grid: Grid,
        messages: Sequence[Message],
        names: Mapping[int, str],
        purpose: str,
        server_round: int,
        timeout_seconds: float,
        grace: Grace | None = None,
    ) -> Post:
        """Send a batch and collect its replies.

        Args:
            grid: Flower's.
            messages: at most one for each node.
            names: client key of each node, where known.
            purpose: for the ledger.
            server_round: for the ledger.
            timeout_seconds: how long to wait for the replies.
            grace: may end the wait earlier.
        """
        sent: dict[str, int] = {}
        unsent: list[int] = []
        # A list, never a generator: in a deployment a generator fails with an HTTP error.
        for message, message_id in zip(messages, list(grid.push_messages(list(messages))), strict=True):
            node_id = message.metadata.dst_node_id
            if message_id:
                sent[message_id] = node_id
                self._book(message, "downlink", names.get(node_id, NOBODY), purpose, server_round)
            else:
                unsent.append(node_id)
        received: list[tuple[int, Message]] = []
        for reply in self._poll(grid, set(sent), timeout_seconds, grace):
            node_id = sent.pop(reply.metadata.reply_to_message_id)
            received.append((node_id, reply))
            self._book(reply, "uplink", names.get(node_id, NOBODY), purpose, server_round)
        for message_id, node_id in sent.items():
            self._unanswered[message_id] = Unanswered(node_id, names.get(node_id, NOBODY), purpose, server_round)
        return Post(tuple(received), tuple(unsent), tuple(sent.values()))

    def _poll(self, grid: Grid, asked: set[str], timeout_seconds: float, grace: Grace | None) -> Iterator[Message]:
        """Yield each reply as it comes, until all are there or the time, or the grace, is over.

        Polls often at first and after each reply, then less and less.
        """
        deadline = monotonic() + timeout_seconds
        pause = _FIRST_PAUSE_SECONDS
        while asked:
            received = list(grid.pull_messages(list(asked)))
            for reply in received:
                message_id = reply.metadata.reply_to_message_id
                if message_id in asked:  # each answer counts once
                    asked.discard(message_id)
                    if grace is not None:
                        grace.take(reply)
                    yield reply
            if grace is not None:
                deadline = min(deadline, grace.ends())
            if not asked or monotonic() >= deadline:
                return
            pause = _FIRST_PAUSE_SECONDS if received else min(pause * 1.5, _LONGEST_PAUSE_SECONDS)
            sleep(max(0.0, min(pause, deadline - monotonic())))

    def _book(
        self,
        message: Message,
        direction: Literal["downlink", "uplink"],
        client_key: str,
        purpose: str,
        server_round: int,
    ) -> None:
        traffic = traffic_of(message, direction)
        payload_bytes = carried_bytes(message.content) if message.has_content() else 0
        self._ledger.message(
            MessageRow(
                server_round, client_key, direction, purpose, payload_bytes, traffic.wire_bytes, traffic.framing_bytes
            )
        )
