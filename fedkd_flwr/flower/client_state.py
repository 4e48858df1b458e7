"""Everything a client needs to go on, and what its file holds of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.modules import prefixed, without_prefix
from fedkd_flwr.flower.archive import Archive
from fedkd_flwr.flower.errors import StateError

UNKNOWN_VERSION = -1
_REPLY_PAYLOAD = "reply payload"
_PRIVATE, _COMMITTED, _PENDING = "private/", "committed/", "pending/"


@dataclass(frozen=True, slots=True)
class LastReply:
    """The reply that a client gave last, to be given again if asked for the same work.

    Attributes:
        server_round: of the reply.
        lineage: of the version it trained from.
        payload: encoded upload, or None.
        numbers: the reply's other fields.
    """

    server_round: int
    lineage: bytes
    payload: bytes | None
    numbers: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ClientState:
    """Everything a client needs to go on.

    Attributes:
        version: of the shared arrays; `UNKNOWN_VERSION` where they were lost and a snapshot is needed.
        lineage: of that version.
        shared: what server and client both hold.
        private: what never leaves.
        committed: uplink codec state after the last reply that is known to have counted.
        pending: the one after the last reply given, which may yet count.
        downlink: downlink codec state.
        last_reply: None before the first.
        committed_round: round of the reply that `committed` stands after; 0 for the state before any.
        generation: counts commits.
    """

    version: int
    lineage: bytes
    shared: Arrays
    private: Arrays
    committed: Arrays
    pending: Arrays
    downlink: Arrays
    last_reply: LastReply | None = None
    committed_round: int = 0
    generation: int = 0

    @property
    def replied_round(self) -> int:
        """Round of the last reply given; 0 before the first."""
        return self.last_reply.server_round if self.last_reply else 0

    def settle(self, counted_round: int, initial: Arrays) -> "ClientState":
        """The state once it is known which reply counted last: pending becomes committed, or is dropped.

        Args:
            counted_round: what the server says; 0 where its decoder stands at the beginning.
            initial: uplink codec state at the beginning.

        Raises:
            StateError: if this client has no state after that reply; it lost its disk since.
        """
        if counted_round == 0:
            return replace(self, committed=initial, pending=initial, committed_round=0)
        if counted_round == self.replied_round:
            return replace(self, committed=self.pending, committed_round=counted_round)
        if counted_round == self.committed_round:
            return replace(self, pending=self.committed)
        raise StateError(f"has no codec state after its reply of round {counted_round}, which the server counted")


def state_of(archive: Archive) -> ClientState:
    """What a file of `archive_of` says; the shared arrays and the downlink's state are in a file of their own."""
    facts, arrays = archive.facts, archive.arrays
    last = facts["last_reply"]
    reply = None
    if last is not None:
        payload = arrays[_REPLY_PAYLOAD].tobytes() if _REPLY_PAYLOAD in arrays else None
        reply = LastReply(last["server_round"], bytes.fromhex(last["lineage"]), payload, last["numbers"])
    return ClientState(
        version=facts["version"],
        lineage=bytes.fromhex(facts["lineage"]),
        shared={},
        private=without_prefix(_PRIVATE, arrays),
        committed=without_prefix(_COMMITTED, arrays),
        pending=without_prefix(_PENDING, arrays),
        downlink={},
        last_reply=reply,
        committed_round=facts["committed_round"],
        generation=facts["generation"],
    )


def archive_of(state: ClientState, training_id: str) -> Archive:
    """A state of a training as it is written, without what all clients of a machine share."""
    arrays = prefixed(_PRIVATE, state.private) | prefixed(_COMMITTED, state.committed)
    arrays |= prefixed(_PENDING, state.pending)
    last = state.last_reply
    if last is not None and last.payload is not None:
        arrays[_REPLY_PAYLOAD] = np.frombuffer(last.payload, np.uint8)
    reply = last and {"server_round": last.server_round, "lineage": last.lineage.hex(), "numbers": dict(last.numbers)}
    facts = {
        "training_id": training_id,
        "version": state.version,
        "lineage": state.lineage.hex(),
        "last_reply": reply,
        "committed_round": state.committed_round,
        "generation": state.generation,
    }
    return Archive(facts, arrays)
