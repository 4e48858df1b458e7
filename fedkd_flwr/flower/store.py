"""What a client remembers, on its own disk.

    state_dir/<training_id>/
        .lock                               held by every process that works for the training; see retention.py
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
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.modules import without_prefix
from fedkd_flwr.disk import make_directory, make_durable, write_directory
from fedkd_flwr.experiment import NAME_PATTERN
from fedkd_flwr.flower.archive import (
    Archive,
    ArchiveError,
    read_archive,
    read_facts,
    reason_without_place,
    write_archive,
)
from fedkd_flwr.flower.client_state import UNKNOWN_VERSION, ClientState, archive_of, state_of
from fedkd_flwr.flower.errors import StateError
from fedkd_flwr.flower.reference import DECODER, SHARED, snapshot_arrays
from fedkd_flwr.flower.retention import (
    CLIENT_LOCK_FILE,
    KEEP_HALF_A_YEAR,
    REFERENCES_DIR,
    Retention,
    forget_old,
    hold,
    room,
)

STATE_FILE = "state.safetensors"
DAMAGED_SUFFIX = ".damaged"
PREVIOUS_FILE = "previous.safetensors"
FORMAT = "fedkd client state 2"
REFERENCE_FORMAT = "fedkd reference 1"
_BYTES_BESIDE = 16_384  # at most, of a file beside its arrays: header, names, facts
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK)

_log = logging.getLogger("fedkd")


class ClientStore:
    """State of one client of one training.

    Args:
        state_dir: root of all trainings on this machine.
        training_id: a name that is safe as a folder.
        client_key: likewise.
        retention: how long, and how much, this machine keeps of all trainings there. This one is in use, and so safe
            from it, for as long as the object lives.

    Raises:
        StateError: if a name is not safe, or the folder can't be made.
    """

    def __init__(
        self, state_dir: Path, training_id: str, client_key: str, retention: Retention = KEEP_HALF_A_YEAR
    ) -> None:
        for what, name in (("training id", training_id), ("client key", client_key)):
            if not re.fullmatch(NAME_PATTERN, name) or name == REFERENCES_DIR:
                raise StateError(
                    f"{what} must be letters, digits, dots, dashes and underscores, and not {REFERENCES_DIR!r}, "
                    f"got {name!r}"
                )
        self.directory = state_dir / training_id / client_key
        self._training_id = training_id
        self._retention = retention
        self._references = state_dir / training_id / REFERENCES_DIR
        try:
            weakref.finalize(self, os.close, hold(state_dir / training_id))
            for directory in (self.directory, self._references):
                make_directory(directory, 0o700)
            forget_old(state_dir, retention, keep=training_id)
        except OSError as error:
            # Where it is, is said here: the server reads what is raised.
            _log.error("%s can't be made: %s", self.directory, error.strerror)
            raise StateError(
                f"state-dir: no directory can be made in it: {error.strerror}; "
                "set state-dir in the node's configuration to a directory that can be written"
            ) from None

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
            state = state_of(archive)
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
        return ClientState(UNKNOWN_VERSION, bytes(32), {}, state_of(archive).private, {}, {}, {})

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
            archive = archive_of(following, self._training_id)
            try:
                with self._room(self._size(archive.arrays) + self._size_of_reference(state)):
                    self._keep_reference(state)
                    if path.exists():
                        self._link(path, self.directory / PREVIOUS_FILE)
                    write_archive(path, FORMAT, archive)
                    self._forget_references(state.lineage)
                if on_disk == 0:
                    self._make_folders_durable()
            except (OSError, ArchiveError) as error:
                raise StateError(f"client state can't be written: {self._reason(error)}") from None
        return following

    def export(self, name: str, arrays: Arrays, write: Callable[[Path], object]) -> None:
        """Replace a directory beside the state by what `write` makes, in one step; by none where it makes none.

        Args:
            name: of the directory.
            arrays: what is written holds about as many bytes.
            write: called with the path of a directory that it makes and fills.

        Raises:
            StateError: if the node's quota refuses.
            OSError: if the disk does. Either way the directory is as it was.
        """
        with self._room(self._size(arrays)):
            write_directory(self.directory / name, write)

    def _room(self, num_bytes: int) -> AbstractContextManager[None]:
        return room(self.directory.parent.parent, self._retention, self._training_id, num_bytes)

    def _size(self, arrays: Arrays) -> int:
        return sum(value.nbytes for value in arrays.values()) + _BYTES_BESIDE

    def _size_of_reference(self, state: ClientState) -> int:
        if self._reference(state.lineage).exists() or self._pooled(state.lineage).exists():
            return 0
        return self._size(snapshot_arrays(state.shared, state.downlink))

    def _make_folders_durable(self) -> None:
        """Wait for the folders of a first commit, which another process may have made a moment ago."""
        training = self.directory.parent
        for folder in (self._references, training, training.parent, training.parent.parent):
            make_durable(folder)

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
            descriptor = os.open(self.directory / CLIENT_LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise StateError(f"client state can't be locked: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
