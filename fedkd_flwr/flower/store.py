"""What a client remembers, on its own disk.

`state_dir/<training_id>/<client_key>/state.safetensors` holds arrays and, in its header, the rest as JSON. It is
replaced whole by a rename, under a lock, before any reply leaves; a commit names the generation it read, so a late
process can't overwrite a newer state. Flower's own context is not used: it reaches the disk after the reply, or never.
"""

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedkd_flwr.core.arrays import Array, Arrays
from fedkd_flwr.core.modules import prefixed, without_prefix
from fedkd_flwr.experiment import NAME_PATTERN
from fedkd_flwr.flower.errors import StateError

STATE_FILE = "state.safetensors"
FORMAT = "fedkd client state 1"
_REPLY_PAYLOAD = "reply payload"
_SHARED, _PRIVATE, _COMMITTED, _PENDING, _DOWNLINK = "shared/", "private/", "committed/", "pending/", "downlink/"

_log = logging.getLogger("fedkd")


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
        version: of the shared arrays.
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


class ClientStore:
    """State of one client of one training.

    Args:
        state_dir: root of all trainings on this machine.
        training_id: a name that is safe as a folder.
        client_key: likewise.

    Raises:
        StateError: if a name is not safe, or the folder can't be made.
    """

    def __init__(self, state_dir: Path, training_id: str, client_key: str) -> None:
        for what, name in (("training id", training_id), ("client key", client_key)):
            if not re.fullmatch(NAME_PATTERN, name):
                raise StateError(f"{what} must be letters, digits, dots, dashes and underscores, got {name!r}")
        self.directory = state_dir / training_id / client_key
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"state directory {str(self.directory)!r} can't be made: {error.strerror}") from error

    def load(self) -> ClientState | None:
        """The last committed state, or None where there is none or its file is damaged."""
        path = self.directory / STATE_FILE
        with self._locked():
            if not path.exists():
                return None
            try:
                return _read(path)
            except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
                _log.warning("client state can't be read, starting afresh: %s", error)
                os.replace(path, path.with_suffix(".damaged"))
                return None

    def commit(self, state: ClientState) -> ClientState:
        """Replace the state on disk by this one, made from the one with its generation.

        Returns:
            The state with its new generation.

        Raises:
            StateError: if another process committed since, or the disk refuses.
        """
        with self._locked():
            on_disk = self._generation()
            if on_disk != state.generation:
                raise StateError(f"another process has changed the client state ({on_disk} != {state.generation})")
            following = replace(state, generation=state.generation + 1)
            try:
                _write(self.directory / STATE_FILE, following)
            except OSError as error:
                raise StateError(f"client state can't be written: {error.strerror}") from error
        return following

    def _generation(self) -> int:
        try:
            with safe_open(self.directory / STATE_FILE, framework="np") as file:
                return int(json.loads(file.metadata()["state"])["generation"])
        except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
            return 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise StateError(f"client state can't be locked: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _read(path: Path) -> ClientState:
    arrays: dict[str, Array] = {}
    with safe_open(path, framework="np") as file:
        facts = json.loads(file.metadata()["state"])
        for name in file.keys():  # noqa: SIM118 - not a mapping
            arrays[name] = file.get_tensor(name)
    if facts["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT!r}, got {facts['format']!r}")
    last = facts["last_reply"]
    reply = None
    if last is not None:
        payload = arrays[_REPLY_PAYLOAD].tobytes() if _REPLY_PAYLOAD in arrays else None
        reply = LastReply(last["server_round"], bytes.fromhex(last["lineage"]), payload, last["numbers"])
    return ClientState(
        version=facts["version"],
        lineage=bytes.fromhex(facts["lineage"]),
        shared=without_prefix(_SHARED, arrays),
        private=without_prefix(_PRIVATE, arrays),
        committed=without_prefix(_COMMITTED, arrays),
        pending=without_prefix(_PENDING, arrays),
        downlink=without_prefix(_DOWNLINK, arrays),
        last_reply=reply,
        committed_round=facts["committed_round"],
        generation=facts["generation"],
    )


def _write(path: Path, state: ClientState) -> None:
    arrays = prefixed(_SHARED, state.shared) | prefixed(_PRIVATE, state.private)
    arrays |= prefixed(_COMMITTED, state.committed) | prefixed(_PENDING, state.pending)
    arrays |= prefixed(_DOWNLINK, state.downlink)
    last: dict[str, Any] | None = None
    if state.last_reply is not None:
        last = asdict(state.last_reply) | {"lineage": state.last_reply.lineage.hex()}
        payload = last.pop("payload")
        if payload is not None:
            arrays[_REPLY_PAYLOAD] = np.frombuffer(payload, np.uint8)
    facts = {
        "format": FORMAT,
        "version": state.version,
        "lineage": state.lineage.hex(),
        "last_reply": last,
        "committed_round": state.committed_round,
        "generation": state.generation,
    }
    contiguous = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in arrays.items()}
    data = save(contiguous, metadata={"state": json.dumps(facts)})
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)
