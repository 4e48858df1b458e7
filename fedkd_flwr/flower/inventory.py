"""What clients keep on this machine's disk: to look at, and to delete."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedkd_flwr.flower.archive import ArchiveError, read_facts
from fedkd_flwr.flower.store import DAMAGED_SUFFIX, FORMAT, PREVIOUS_FILE, REFERENCES_DIR, STATE_FILE

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
        if client.is_dir() and any(next(client.glob(pattern), None) for pattern in _OURS):
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
    """Delete what a client keeps, its private model included; and what was shared, once no client is left."""
    shutil.rmtree(kept.directory)
    training = kept.directory.parent
    references = training / REFERENCES_DIR
    if references.is_dir():
        for pooled in references.iterdir():
            if pooled.stat().st_nlink == 1:
                pooled.unlink()
    if {path.name for path in training.iterdir()} <= {REFERENCES_DIR}:
        shutil.rmtree(training)
