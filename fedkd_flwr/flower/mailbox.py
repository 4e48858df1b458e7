"""Sends messages, waits for their replies no longer than asked, and books every byte.

What is unanswered when its time is over stays on a list: its node is busy and gets no further work until its reply has
been collected as late.

Replies are pulled one by one. Flower hands over each only once, and raises where it can't read one: in a pull of many,
one node's three bytes would cost the replies of all. It also tells whose a reply is, whatever it says of itself.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Literal

import httpx
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedkd_flwr.flower.carriage import carried_bytes
from fedkd_flwr.flower.errors import MessageError, WorkerLostError
from fedkd_flwr.flower.grace import Grace
from fedkd_flwr.flower.inflation import inflation_limited
from fedkd_flwr.flower.replies import reason_of, unreadable
from fedkd_flwr.flower.simulation import lost_worker
from fedkd_flwr.flower.traffic import Traffic, traffic_of, unknown_traffic
from fedkd_flwr.flower.uploads import uploads_awaited
from fedkd_flwr.measure.ledger import Ledger, MessageRow

_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 1.0
# Of the time spent on asking in vain: each question costs the SuperLink some milliseconds, and nodes need it, too.
_PAUSE_RATIO = 4.0
_UPLOAD_SECONDS = 10.0  # for an upload that began in time, after its time is over
MOST_UNFOLDED_BYTES = 2**31  # of one array, where nothing is known of what a client may send
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
class _Received:
    """A reply, and what it weighed on its way."""

    message: Message
    traffic: Traffic
    payload_bytes: int


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
        most_unfolded_bytes: that an array of a reply may have when its repeated pieces are written out.
    """

    def __init__(self, ledger: Ledger, most_unfolded_bytes: int = MOST_UNFOLDED_BYTES) -> None:
        self._ledger = ledger
        self._most_unfolded_bytes = most_unfolded_bytes
        self._unanswered: dict[str, Unanswered] = {}  # by message id
        self._stalled: set[int] = set()  # nodes that have announced what they did not upload

    def busy_nodes(self) -> set[int]:
        """Nodes that still have a message of an earlier batch."""
        return {message.node_id for message in self._unanswered.values()}

    def collect_late(self, grid: Grid) -> list[tuple[Unanswered, Message]]:
        """Replies to messages whose time was over, as far as they have come by now. Does not wait.

        Raises:
            WorkerLostError: see `exchange`.
        """
        collected = []
        for message_id, asked in list(self._unanswered.items()):
            if (received := self._pull(grid, message_id, 0.0)) is not None:
                del self._unanswered[message_id]
                self._book_reply(received, asked)
                self._require_worker(grid, received.message)
                collected.append((asked, received.message))
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

        Raises:
            WorkerLostError: if a process that simulates clients has died.
        """
        sent: dict[str, Unanswered] = {}
        unsent: list[int] = []
        # A list, never a generator: in a deployment a generator fails with an HTTP error.
        for message, message_id in zip(messages, list(grid.push_messages(list(messages))), strict=True):
            node_id = message.metadata.dst_node_id
            asked = Unanswered(node_id, names.get(node_id, NOBODY), purpose, server_round)
            if message_id:
                sent[message_id] = asked
                self._book_sent(message, asked)
            else:
                unsent.append(node_id)
        replies: list[tuple[int, Message]] = []
        for message_id, received in self._poll(grid, sent, timeout_seconds, grace):
            asked = sent.pop(message_id)
            self._book_reply(received, asked)
            self._require_worker(grid, received.message)
            replies.append((asked.node_id, received.message))
        self._unanswered |= sent
        return Post(tuple(replies), tuple(unsent), tuple(asked.node_id for asked in sent.values()))

    def _poll(
        self, grid: Grid, asked: Mapping[str, Unanswered], timeout_seconds: float, grace: Grace | None
    ) -> Iterator[tuple[str, _Received]]:
        """Yield each reply as it comes, with the id of the message that it answers.

        Ends when all are there, or the time, or the grace, is over.
        Polls often at first and after each reply, then less and less, and the less the longer it takes. Whoever has
        stalled before is polled when all others have answered, or the time is over: waiting for its upload is waiting
        with everybody's replies.
        """
        deadline = monotonic() + timeout_seconds
        pause = _FIRST_PAUSE_SECONDS
        waiting = list(asked)
        while waiting:
            last = [message_id for message_id in waiting if asked[message_id].node_id in self._stalled]
            deferred = last if len(last) < len(waiting) and monotonic() < deadline else []
            in_vain, silent, prompt = 0.0, [], [message_id for message_id in waiting if message_id not in deferred]
            for message_id in prompt:
                began = monotonic()
                ends = deadline if grace is None else min(deadline, grace.ends())
                if (received := self._pull(grid, message_id, ends - began)) is not None:
                    if grace is not None:
                        grace.take(received.message)
                    yield message_id, received
                else:
                    silent.append(message_id)
                    in_vain += monotonic() - began
            if grace is not None:
                deadline = min(deadline, grace.ends())
            waiting = silent + deferred
            if monotonic() >= deadline:
                if not deferred:
                    return
                waiting = deferred
            elif silent:
                pause = _FIRST_PAUSE_SECONDS if len(silent) < len(prompt) else min(pause * 1.5, _LONGEST_PAUSE_SECONDS)
                sleep(max(0.0, min(max(pause, _PAUSE_RATIO * in_vain), deadline - monotonic())))

    def _pull(self, grid: Grid, message_id: str, seconds: float) -> _Received | None:
        """The reply to a message if it is there; where it can't be read, a message with the reason in its place.

        Args:
            grid: Flower's.
            message_id: of the message.
            seconds: that are left for what a node has announced and is still uploading.

        Raises:
            httpx.TransportError: if the SuperLink is gone, which is no node's doing.
        """
        try:
            awaited = uploads_awaited(max(seconds, _UPLOAD_SECONDS))
            with awaited, inflation_limited(self._most_unfolded_bytes):
                replies = list(grid.pull_messages([message_id]))
            return _received(replies, message_id) if replies else None
        except httpx.TransportError:
            raise
        except Exception as error:  # Flower's reader of untrusted bytes raises many kinds
            reply = unreadable(message_id, f"its reply can't be read: {reason_of(error)}")
            return _Received(reply, unknown_traffic("uplink"), 0)

    def _require_worker(self, grid: Grid, reply: Message) -> None:
        if lost := lost_worker(grid, reply):
            raise WorkerLostError(
                f"a worker of the simulation died ({lost}; out of memory?); go on with: "
                f"fedkd resume {shlex.quote(str(self._ledger.directory))}"
            )

    def _book_sent(self, message: Message, asked: Unanswered) -> None:
        self._book(asked, "downlink", traffic_of(message, "downlink"), carried_bytes(message.content))

    def _book_reply(self, received: _Received, asked: Unanswered) -> None:
        message = received.message
        if message.has_error() and message.error.code == ErrorCode.MESSAGE_UNAVAILABLE:
            self._stalled.add(asked.node_id)
        else:
            self._stalled.discard(asked.node_id)
        self._book(asked, "uplink", received.traffic, received.payload_bytes)

    def _book(
        self, asked: Unanswered, direction: Literal["downlink", "uplink"], traffic: Traffic, payload_bytes: int
    ) -> None:
        row = MessageRow(
            asked.server_round,
            asked.client_key,
            direction,
            asked.purpose,
            payload_bytes,
            traffic.wire_bytes,
            traffic.framing_bytes,
        )
        self._ledger.message(row)


def _received(replies: Sequence[object], message_id: str) -> _Received:
    """The reply to a message among what was pulled for it.

    Raises:
        MessageError: if there is none, or it is none; and whatever a part of it raises that is not what it says.
    """
    messages = [reply for reply in replies if isinstance(reply, Message)]
    message = next((each for each in messages if each.metadata.reply_to_message_id == message_id), None)
    if message is None:
        raise MessageError("it answers another message" if messages else "it is no message")
    if message.has_error():
        return _Received(message, traffic_of(message, "uplink"), 0)
    if not isinstance(message.content, RecordDict):
        raise MessageError(f"it must hold records, got {type(message.content).__name__}")
    traffic = traffic_of(message, "uplink")
    # What an array unfolds to may be more than what came.
    return _Received(message, traffic, min(carried_bytes(message.content), traffic.wire_bytes))
