"""How long a node keeps the state of trainings, and how much of it.

A training's folder goes whole, the one that was used longest ago first, and never one that a process has in its hands:
every process that works for a training holds a shared lock on `<training>/.lock`, and who deletes takes it alone. An
age limit (`state-max-age-days`) deletes trainings that nobody has used for so long; a quota (`state-max-bytes`) makes
room before something is written, and refuses where that is not enough.
"""

import fcntl
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedkd_flwr.disk import make_directory, make_durable
from fedkd_flwr.experiment import NAME_PATTERN
from fedkd_flwr.flower.errors import StateError

LOCK_FILE = ".lock"
REFERENCES_DIR = "references"
CLIENT_LOCK_FILE = "lock"
SECONDS_PER_DAY = 86_400.0
# Between two rounds no process has a training in its hands; one that was used so recently may be in a run.
_IN_A_RUN_SECONDS = 3600.0
_DELETED = ".deleted-"

_log = logging.getLogger("fedkd")


@dataclass(frozen=True, slots=True)
class Retention:
    """What a node keeps.

    Attributes:
        max_age_days: a training that was not used for longer is deleted; 0: never. The default is half a year.
        max_bytes: what all trainings below a state directory may take on the disk; 0: any number.
    """

    max_age_days: float = 180.0
    max_bytes: int = 0


KEEP_HALF_A_YEAR = Retention()


@dataclass(frozen=True, slots=True)
class Training:
    """What clients of this machine keep of one training.

    Attributes:
        directory: its folder, named after it.
        used: when a client last worked for it, in seconds since the epoch.
    """

    directory: Path
    used: float

    def num_bytes(self) -> int:
        """On disk, a file with several names counted once."""
        return size_on_disk([self.directory])


def size_on_disk(directories: Iterable[Path]) -> int:
    """Bytes of all files below some directories; a file with several names counts once."""
    sizes: dict[tuple[int, int], int] = {}
    for directory in directories:
        for folder, _, names in os.walk(directory):
            for name in names:
                with suppress(OSError):  # it may go while others are looked at
                    facts = os.lstat(os.path.join(folder, name))
                    sizes[facts.st_dev, facts.st_ino] = facts.st_size
    return sum(sizes.values())


def trainings(state_dir: Path, without: str = "") -> list[Training]:
    """Trainings below a state directory, the one used longest ago first. What else lies there is left alone.

    Args:
        state_dir: root of all trainings.
        without: a training that is not looked at: one of hundreds of clients takes a while.
    """
    found = []
    with suppress(OSError):
        for directory in state_dir.iterdir():
            looked_at = directory.name != without and re.fullmatch(NAME_PATTERN, directory.name)
            if looked_at and (used := _last_used(directory)) is not None:
                found.append(Training(directory, used))
    return sorted(found, key=lambda training: training.used)


def _last_used(directory: Path) -> float | None:
    """When a training was used; None where the folder has anything in it that no client puts there."""
    times = []
    try:
        for entry in directory.iterdir():
            if entry.name not in (LOCK_FILE, REFERENCES_DIR) and not _is_of_a_client(entry):
                return None
            times.append(entry.stat().st_mtime)
    except OSError:
        return None
    return max(times, default=None)


def _is_of_a_client(directory: Path) -> bool:
    return (directory / CLIENT_LOCK_FILE).is_file() or next(directory.iterdir(), None) is None


def hold(training: Path) -> int:
    """Make a training's folder, if need be, and keep it from being deleted until the descriptor is closed.

    Raises:
        OSError: if the disk refuses.
    """
    path = training / LOCK_FILE
    while True:
        make_directory(training, 0o700)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        except FileNotFoundError:  # deleted meanwhile
            continue
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_at(descriptor, path):
            os.utime(descriptor)
            return descriptor
        os.close(descriptor)


@contextmanager
def alone(training: Path) -> Iterator[bool]:
    """Whether no process has a training in its hands; while this is entered and true, none gets it.

    Raises:
        OSError: if the disk refuses.
    """
    path = training / LOCK_FILE
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = _is_at(descriptor, path)
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def delete_training(training: Path) -> bool:
    """Delete a training's folder, whole; False where a process has it in its hands, or the disk refuses."""
    gone = training.with_name(f"{_DELETED}{secrets.token_hex(4)}")
    try:
        with alone(training) as free:
            if free:
                os.rename(training, gone)  # in one step: half a state would look like a damaged one
                make_durable(training.parent)
                shutil.rmtree(gone, ignore_errors=True)
            return free
    except OSError:
        return False


def forget_old(state_dir: Path, retention: Retention, keep: str) -> None:
    """Delete the trainings that are older than a node keeps them.

    Args:
        state_dir: root of all trainings.
        retention: what the node keeps.
        keep: the training that goes on, whatever its age.
    """
    for remains in state_dir.glob(f"{_DELETED}*"):  # of a process that was killed
        shutil.rmtree(remains, ignore_errors=True)
    if not retention.max_age_days:
        return
    for training in trainings(state_dir, without=keep):
        age = (time.time() - training.used) / SECONDS_PER_DAY
        if age > retention.max_age_days and delete_training(training.directory):
            _log.warning(
                "state of training %s deleted: not used for %.1f days, state-max-age-days is %g",
                training.directory.name,
                age,
                retention.max_age_days,
            )


@contextmanager
def room(state_dir: Path, retention: Retention, keep: str, num_bytes: int) -> Iterator[None]:
    """While this is entered, so much may be written below a state directory without exceeding the quota.

    Others that write there wait, so that two can't take the same room.

    Args:
        state_dir: root of all trainings.
        retention: what the node keeps; without a quota there is always room.
        keep: the training that is written, which is never deleted.
        num_bytes: about to be written, beside what is there.

    Raises:
        StateError: if it does not fit, even with every training deleted that may be.
        OSError: if the disk refuses.
    """
    if not retention.max_bytes:
        yield
        return
    descriptor = os.open(state_dir / LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _make_room(state_dir, retention.max_bytes, keep, num_bytes)
        yield
    finally:
        os.close(descriptor)


def _make_room(state_dir: Path, max_bytes: int, keep: str, num_bytes: int) -> None:
    found = trainings(state_dir)
    others = [training for training in found if training.directory.name != keep]
    taken = size_on_disk(training.directory for training in found)
    idle = (training for training in others if time.time() - training.used > _IN_A_RUN_SECONDS)
    while taken + num_bytes > max_bytes:
        if (training := next(idle, None)) is None:
            break
        freed = training.num_bytes()
        if delete_training(training.directory):
            taken -= freed
            _log.warning(
                "state of training %s deleted: %d bytes, to keep within state-max-bytes %d",
                training.directory.name,
                freed,
                max_bytes,
            )
    if taken + num_bytes > max_bytes:
        own = size_on_disk([state_dir / keep])
        raise StateError(
            f"state-max-bytes: must be at least {taken + num_bytes} on this node, got {max_bytes}: this training has "
            f"{own} bytes and needs {num_bytes} more, trainings in use have {taken - own}; raise it in the node's "
            "configuration, or delete what is not needed with fedkd state --delete"
        )


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
