"""What a client remembers, on its own disk.

    state_dir/<training_id>/
        references/<lineage>.safetensors    shared arrays of one version, once for all clients on this machine
        <client_key>/
            state.safetensors               private arrays, codec states, last reply; names the lineage it stands at
            previous.safetensors            the state before that: the teacher's last good copy
            reference-<lineage>.safetensors the same file as in references/, by a hard link
            private_model/                  the private model as a Hugging Face directory, after the final evaluation
            lock

Files are replaced whole by a rename, under a lock, before any reply leaves; a commit names the generation it read, so
a late process can't overwrite a newer state. Flower's own context is not used: it reaches the disk after the reply, or
never.
"""

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.modules import prefixed, without_prefix
from fedkd_flwr.experiment import NAME_PATTERN
from fedkd_flwr.flower.archive import (
    Archive,
    ArchiveError,
    read_archive,
    read_facts,
    reason_without_place,
    write_archive,
)
from fedkd_flwr.flower.errors import StateError
from fedkd_flwr.flower.reference import DECODER, SHARED, snapshot_arrays

STATE_FILE = "state.safetensors"
DAMAGED_SUFFIX = ".damaged"
PREVIOUS_FILE = "previous.safetensors"
REFERENCES_DIR = "references"
FORMAT = "fedkd client state 2"
REFERENCE_FORMAT = "fedkd reference 1"
UNKNOWN_VERSION = -1
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK)
_REPLY_PAYLOAD = "reply payload"
_PRIVATE, _COMMITTED, _PENDING = "private/", "committed/", "pending/"

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
            if not re.fullmatch(NAME_PATTERN, name) or name == REFERENCES_DIR:
                raise StateError(
                    f"{what} must be letters, digits, dots, dashes and underscores, and not {REFERENCES_DIR!r}, "
                    f"got {name!r}"
                )
        self.directory = state_dir / training_id / client_key
        self._training_id = training_id
        self._references = state_dir / training_id / REFERENCES_DIR
        try:
            for directory in (self.directory, self._references):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            # Where it is, is said here: the server reads what is raised.
            _log.error("%s can't be made: %s", self.directory, error.strerror)
            raise StateError(f"state-dir: no directory can be made in it: {error.strerror}") from None

    def load(self) -> ClientState | None:
        """The last committed state; None where there is none, or nothing of it can be read.

        Of a damaged state the last good copy of the private arrays is kept, and the rest is asked for again: its
        version is `UNKNOWN_VERSION`. Where only the shared arrays are damaged, codec states are kept too.

        Raises:
            StateError: if it is the state of another training, or the disk can't be read.
        """
        path = self.directory / STATE_FILE
        with self._locked():
            try:
                archive = read_archive(path, FORMAT)
            except FileNotFoundError:
                return self._salvage()
            except OSError as error:
                raise StateError(f"client state can't be read: {self._reason(error)}") from None
            except ArchiveError as error:
                _log.warning("client %s: %s", self.directory.name, error)
                self._set_aside(path)
                return self._salvage()
            if (found := archive.facts["training_id"]) != self._training_id:
                raise StateError(f"{path.name!r} is of training {found}, not of {self._training_id}; delete it")
            state = _state(archive)
            own = self._reference(state.lineage)
            try:
                reference = read_archive(own, REFERENCE_FORMAT).arrays
            except (OSError, ArchiveError) as error:
                _log.warning("client %s: %s", self.directory.name, error)
                self._drop_reference(own)  # or it would be linked again
                return replace(state, version=UNKNOWN_VERSION)
        return replace(state, shared=without_prefix(SHARED, reference), downlink=without_prefix(DECODER, reference))

    def _salvage(self) -> ClientState | None:
        """The private arrays of the generation before. Found again and again until a commit has made them current."""
        try:
            archive = read_archive(self.directory / PREVIOUS_FILE, FORMAT)
        except (OSError, ArchiveError):
            return None
        if archive.facts["training_id"] != self._training_id:
            return None
        return ClientState(UNKNOWN_VERSION, bytes(32), {}, _state(archive).private, {}, {}, {})

    def _reason(self, error: Exception) -> str:
        """What the server may read of an error of this disk."""
        return reason_without_place(error, self.directory / STATE_FILE)

    def _set_aside(self, path: Path) -> None:
        try:
            os.replace(path, path.with_suffix(DAMAGED_SUFFIX))
        except OSError as error:
            raise StateError(f"damaged client state can't be set aside: {self._reason(error)}") from None

    def _drop_reference(self, own: Path) -> None:
        pooled = self._references / own.name.removeprefix("reference-")
        with suppress(OSError):
            if own.exists() and pooled.exists() and own.samefile(pooled):
                pooled.unlink()
            own.unlink(missing_ok=True)

    def commit(self, state: ClientState) -> ClientState:
        """Replace the state on disk by this one, made from the one with its generation.

        Returns:
            The state with its new generation.

        Raises:
            StateError: if another process committed since, or the disk refuses.
        """
        path = self.directory / STATE_FILE
        with self._locked():
            on_disk = self._generation()
            if on_disk != state.generation:
                raise StateError(f"another process has changed the client state ({on_disk} != {state.generation})")
            following = replace(state, generation=state.generation + 1)
            try:
                self._keep_reference(state)
                if path.exists():
                    self._link(path, self.directory / PREVIOUS_FILE)
                write_archive(path, FORMAT, _archive(following, self._training_id))
                self._forget_references(state.lineage)
            except (OSError, ArchiveError) as error:
                raise StateError(f"client state can't be written: {self._reason(error)}") from None
        return following

    def _generation(self) -> int:
        try:
            return int(read_facts(self.directory / STATE_FILE, FORMAT)["generation"])
        except (FileNotFoundError, ArchiveError):
            return 0
        except OSError as error:
            raise StateError(f"client state can't be read: {self._reason(error)}") from None

    # Shared arrays, once on this machine for each version

    def _reference(self, lineage: bytes) -> Path:
        return self.directory / f"reference-{lineage.hex()}.safetensors"

    def _pooled(self, lineage: bytes) -> Path:
        return self._references / f"{lineage.hex()}.safetensors"

    def _keep_reference(self, state: ClientState) -> None:
        own, pooled = self._reference(state.lineage), self._pooled(state.lineage)
        if own.exists():
            return
        try:
            self._link(pooled, own)
        except FileNotFoundError:  # the first here at this version, or the last one left meanwhile
            write_archive(own, REFERENCE_FORMAT, Archive({}, snapshot_arrays(state.shared, state.downlink)))
            with suppress(OSError):  # the pool only saves space
                self._link(own, pooled)

    def _link(self, source: Path, target: Path) -> None:
        """Let `target` be the same file as `source`, in one step; a copy where the disk knows no links."""
        # Other clients write into the pool at the same time, each under its own lock.
        partial = target.with_name(f"{target.name}.{self.directory.name}.link")
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copyfile(source, partial)
        os.replace(partial, target)
        partial.unlink(missing_ok=True)  # a rename onto another link of the same file leaves both

    def _forget_references(self, lineage: bytes) -> None:
        """Drop this client's hold on older versions, and the versions that nobody here holds any more."""
        for own in self.directory.glob("reference-*.safetensors"):
            if own == self._reference(lineage):
                continue
            pooled = self._references / own.name.removeprefix("reference-")
            own.unlink(missing_ok=True)
            try:
                if pooled.stat().st_nlink == 1:
                    pooled.unlink()
            except FileNotFoundError:
                continue

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise StateError(f"client state can't be locked: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _state(archive: Archive) -> ClientState:
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


def _archive(state: ClientState, training_id: str) -> Archive:
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
