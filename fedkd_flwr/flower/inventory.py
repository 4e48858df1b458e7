"""What clients keep on this machine's disk: to look at, and to delete."""

import errno
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from fedkd_flwr.experiment import NAME_PATTERN
from fedkd_flwr.flower.archive import ArchiveError, read_facts
from fedkd_flwr.flower.retention import LOCK_FILE, REFERENCES_DIR, alone
from fedkd_flwr.flower.store import DAMAGED_SUFFIX, FORMAT, PREVIOUS_FILE, STATE_FILE

_OURS = (STATE_FILE, PREVIOUS_FILE, Path(STATE_FILE).with_suffix(DAMAGED_SUFFIX).name, "reference-*.safetensors")


@dataclass(frozen=True, slots=True)
class Kept:
    """What one client keeps of one training.

    Attributes:
        training_id: of the training.
        client_key: of the client.
        directory: where it lies.
        version: of the shared model it holds; None where its state can't be read.
        replied_round: round of its last reply; 0 before the first.
        num_bytes: on disk, the shared model counted with every client that links to it.
        changed: when it was last written.
    """

    training_id: str
    client_key: str
    directory: Path
    version: int | None
    replied_round: int
    num_bytes: int
    changed: datetime


def kept_states(directory: Path) -> Iterator[Kept]:
    """States below a state directory, or in a run directory, by training and client."""
    state_dir = directory / "state" if (directory / "state").is_dir() else directory
    for client in sorted(state_dir.glob("*/*")):
        # Nothing is listed, and so nothing deleted, that does not look like a client's.
        names = (client.parent.name, client.name)
        if not client.is_dir() or not all(re.fullmatch(NAME_PATTERN, name) for name in names):
            continue
        if any(next(client.glob(pattern), None) for pattern in _OURS):
            yield _kept(client)


def _kept(directory: Path) -> Kept:
    path = directory / STATE_FILE
    version, replied_round = None, 0
    try:
        facts = read_facts(path, FORMAT)
        version = facts["version"]
        replied_round = facts["last_reply"]["server_round"] if facts["last_reply"] else 0
    except (OSError, ArchiveError):
        pass  # shown as it is: a state that can't be read
    num_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    changed = datetime.fromtimestamp((path if path.exists() else directory).stat().st_mtime)
    return Kept(directory.parent.name, directory.name, directory, version, replied_round, num_bytes, changed)


def delete_state(kept: Kept) -> None:
    """Delete what a client keeps, its private model included; and what was shared, once no client is left.

    Raises:
        OSError: if a process works for the training now, or the disk refuses.
    """
    training = kept.directory.parent
    with alone(training) as free:
        if not free:
            raise OSError(errno.EBUSY, "a process of this machine works for this training now; end its run first")
        shutil.rmtree(kept.directory)
        references = training / REFERENCES_DIR
        if references.is_dir():
            for pooled in references.iterdir():
                if pooled.stat().st_nlink == 1:
                    pooled.unlink()
        if {path.name for path in training.iterdir()} <= {REFERENCES_DIR, LOCK_FILE}:
            shutil.rmtree(training)


def describe_age(age: timedelta) -> str:
    """How long ago, in the largest unit of which there is one."""
    seconds = age.total_seconds()
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "now"
