"""The server's copy of what every up-to-date client holds, and how to bring the others there."""

from collections import deque
from dataclasses import dataclass

from fedkd_flwr.algorithms.base import SharedState
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.protocols import Codec
from fedkd_flwr.core.snapshot import pack_snapshot, snapshot_bytes
from fedkd_flwr.flower.lineage import next_lineage


@dataclass(frozen=True, slots=True)
class Delivery:
    """What brings a client to the current version: payloads in order, or a snapshot, or nothing."""

    base_version: int
    payloads: tuple[bytes, ...] = ()
    snapshot: bytes | None = None


class Reference:
    """Shared arrays at a version. The *decoded* broadcast is applied here, exactly as clients do it."""

    def __init__(self, shared_state: SharedState, downlink: Codec | None, initial: Arrays, lineage: bytes) -> None:
        self.version = 0
        self.lineage = lineage
        self.shared = initial
        self._shared_state = shared_state
        self._downlink = downlink
        state = downlink.initial_state() if downlink else {}
        self._encoder_state = state
        self._decoder_state = state
        self._window: deque[bytes] = deque()  # the newest payloads, together smaller than a snapshot

    def advance(self, broadcast: Arrays, *, progress: float, seed: int) -> int:
        """Encode a broadcast, apply what clients will decode from it, and return the payload's bytes.

        Raises:
            ValueError: if the broadcast is not finite.
        """
        if self._downlink is None:
            raise RuntimeError("an algorithm that exchanges nothing has no next version")
        payload, encoder_state = self._downlink.encode(broadcast, self._encoder_state, progress=progress, seed=seed)
        decoded, self._decoder_state = self._downlink.decode(payload, self._decoder_state)
        self._encoder_state = encoder_state
        self.shared = self._shared_state.apply(self.shared, decoded)
        self.lineage = next_lineage(self.lineage, payload)
        self.version += 1
        self._window.append(payload)
        while len(self._window) > 1 and sum(map(len, self._window)) >= snapshot_bytes(self.shared):
            self._window.popleft()
        return len(payload)

    def delivery(self, held: int | None) -> Delivery:
        """The fewest bytes that bring a client from the version it holds to the current one.

        Args:
            held: None where the client has no version of ours.
        """
        if held == self.version:
            return Delivery(self.version)
        missing = None if held is None or held > self.version else self.version - held
        if missing is not None and missing <= len(self._window):
            payloads = tuple(self._window)[len(self._window) - missing :]
            if sum(map(len, payloads)) < snapshot_bytes(self.shared):
                return Delivery(self.version - missing, payloads)
        return Delivery(self.version, snapshot=pack_snapshot(self.shared))
