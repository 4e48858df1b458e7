"""What clients keep on this machine's disk: to look at, and to delete."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedkd_flwr.flower.archive import ArchiveError, read_facts
from fedkd_flwr.flower.store import FORMAT, REFERENCES_DIR, STATE_FILE


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


def kept_states(state_dir: Path) -> Iterator[Kept]:
    """States below a state directory, or below that of a run, by training and client."""
    for path in sorted(state_dir.glob(f"*/*/{STATE_FILE}")):
        directory = path.parent
        version, replied_round = None, 0
        try:
            facts = read_facts(path, FORMAT)
            version = facts["version"]
            replied_round = facts["last_reply"]["server_round"] if facts["last_reply"] else 0
        except ArchiveError:
            pass  # shown as it is: a state that can't be read
        num_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        changed = datetime.fromtimestamp(path.stat().st_mtime)
        yield Kept(directory.parent.name, directory.name, directory, version, replied_round, num_bytes, changed)


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
