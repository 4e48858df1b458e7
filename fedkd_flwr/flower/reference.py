"""The server's copy of what every up-to-date client holds, and how to bring the others there."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedkd_flwr.algorithms.base import SharedState
from fedkd_flwr.core.arrays import Array, Arrays, require_finite
from fedkd_flwr.core.modules import prefixed, without_prefix
from fedkd_flwr.core.protocols import Codec
from fedkd_flwr.core.snapshot import pack_snapshot, snapshot_bytes
from fedkd_flwr.flower.archive import Archive
from fedkd_flwr.flower.lineage import next_lineage

SHARED, DECODER, _ENCODER, _WINDOW = "shared/", "decoder/", "encoder/", "window/"


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
        self._lineages = [lineage]
        self._snapshot: bytes | None = None
        self._window: deque[bytes] = deque()  # the newest payloads, together smaller than a snapshot

    def advance(
        self, broadcast: Arrays, *, progress: float, seed: int, approve: Callable[[Arrays], None] | None = None
    ) -> int:
        """Encode a broadcast, apply what clients will decode from it, and return the payload's bytes.

        Args:
            broadcast: what everyone is sent.
            progress: share of training done, in [0, 1].
            seed: of the codec.
            approve: called with the shared arrays of the next version before it is taken.

        Raises:
            ValueError: if the broadcast, or what it leads to, is not finite. Nothing has moved then, nor where
                `approve` raises.
        """
        if self._downlink is None:
            raise RuntimeError("an algorithm that exchanges nothing has no next version")
        payload, encoder_state = self._downlink.encode(broadcast, self._encoder_state, progress=progress, seed=seed)
        decoded, decoder_state = self._downlink.decode(payload, self._decoder_state)
        with np.errstate(over="ignore"):
            shared = self._shared_state.apply(self.shared, decoded)
        require_finite(shared)
        if approve is not None:
            approve(shared)
        self.shared = shared
        self._encoder_state, self._decoder_state = encoder_state, decoder_state
        self.lineage = next_lineage(self.lineage, payload)
        self._lineages.append(self.lineage)
        self._snapshot = None
        self.version += 1
        self._window.append(payload)
        while len(self._window) > 1 and sum(map(len, self._window)) >= self._snapshot_bytes():
            self._window.popleft()
        return len(payload)

    def version_of(self, version: int | None, lineage: bytes) -> int | None:
        """The version that a client says it holds, if its lineage is ours; else None."""
        if version is None or not 0 <= version <= self.version:
            return None
        return version if self._lineages[version] == lineage else None

    def delivery(self, held: int | None, oldest: int = 0) -> Delivery:
        """The fewest bytes that bring a client from the version it holds to the current one.

        Args:
            held: None where the client has no version of ours.
            oldest: broadcasts that led to this version and to earlier ones are not for this client to see.
        """
        if held == self.version:
            return Delivery(self.version)
        missing = None if held is None or held > self.version else self.version - held
        if missing is not None and missing <= len(self._window) and self.version - missing >= oldest:
            payloads = tuple(self._window)[len(self._window) - missing :]
            if sum(map(len, payloads)) < self._snapshot_bytes():
                return Delivery(self.version - missing, payloads)
        if self._snapshot is None:
            self._snapshot = pack_snapshot(snapshot_arrays(self.shared, self._decoder_state))
        return Delivery(self.version, snapshot=self._snapshot)

    def saved(self) -> Archive:
        """For a checkpoint."""
        arrays = snapshot_arrays(self.shared, self._decoder_state) | prefixed(_ENCODER, self._encoder_state)
        arrays |= {f"{_WINDOW}{i:06d}": np.frombuffer(payload, np.uint8) for i, payload in enumerate(self._window)}
        return Archive({"lineages": [lineage.hex() for lineage in self._lineages]}, arrays)

    def restore(self, archive: Archive) -> None:
        """Go on from a checkpoint."""
        self._lineages = [bytes.fromhex(lineage) for lineage in archive.facts["lineages"]]
        self.lineage, self.version = self._lineages[-1], len(self._lineages) - 1
        self.shared = without_prefix(SHARED, archive.arrays)
        self._decoder_state = without_prefix(DECODER, archive.arrays)
        self._encoder_state = without_prefix(_ENCODER, archive.arrays)
        window = without_prefix(_WINDOW, archive.arrays)
        self._window = deque(window[name].tobytes() for name in sorted(window))
        self._snapshot = None

    def _snapshot_bytes(self) -> int:
        return snapshot_bytes(snapshot_arrays(self.shared, self._decoder_state))


def snapshot_arrays(shared: Arrays, decoder_state: Arrays) -> dict[str, Array]:
    """What a client needs to stand where the others stand: the shared arrays, and its decoder's state."""
    return prefixed(SHARED, shared) | prefixed(DECODER, decoder_state)
