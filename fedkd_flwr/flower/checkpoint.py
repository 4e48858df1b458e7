"""Checkpoints of the server: a version is on disk before any message names it.

`<run>/checkpoints/round-0000012.safetensors` holds everything that the rounds after it depend on: the reference with
its window of payloads and encoder state, the uplink decoders, the aggregator's moments, the table of clients, and the
ledger's row of that round. What clients may have written, such as the reasons of their errors, is in the file's body:
its header has a limit, which no client must reach. `chosen.json` names the clients of the round that has begun since:
whom a round asks depends on who is there and what they hold, and a resumed round must ask the same.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedkd_flwr.core.arrays import Array
from fedkd_flwr.core.modules import prefixed, without_prefix
from fedkd_flwr.disk import make_directory, write_whole
from fedkd_flwr.flower.archive import Archive, ArchiveError, read_archive, write_archive
from fedkd_flwr.flower.errors import RunError

CHECKPOINTS_DIR = "checkpoints"
FORMAT = "fedkd checkpoint 2"
FORMER_FORMAT = "fedkd checkpoint 1"  # all facts in the header
_CHOICE_FILE = "chosen.json"
_PATTERN = "round-*.safetensors"
_FACTS = "facts"

_log = logging.getLogger("fedkd")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The server after one round.

    Attributes:
        server_round: 0 before the first.
        training_id: names the training on every client's disk.
        parts: state by part of the server.
        row: of that round, for the ledger.
    """

    server_round: int
    training_id: str
    parts: Mapping[str, Archive]
    row: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """Whom a round asks.

    Attributes:
        server_round: the round.
        clients: their names.
        resynced: those among them that are sent again what they were sent before.
    """

    server_round: int
    clients: tuple[str, ...]
    resynced: tuple[str, ...]


class Checkpoints:
    """The newest checkpoints of a run.

    Args:
        run_dir: the run's directory.
        keep: how many stay.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.directory = run_dir / CHECKPOINTS_DIR
        self._keep = keep

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; when this returns it is on the disk.

        Raises:
            RunError: if the disk refuses. Earlier checkpoints are as they were.
        """
        arrays: dict[str, Array] = {}
        for part, archive in checkpoint.parts.items():
            arrays |= prefixed(f"{part}/", archive.arrays)
        facts = {part: archive.facts for part, archive in checkpoint.parts.items()}
        written = json.dumps({"parts": facts, "row": checkpoint.row}).encode()
        arrays[_FACTS] = np.frombuffer(written, np.uint8)
        header = {"server_round": checkpoint.server_round, "training_id": checkpoint.training_id}
        try:
            make_directory(self.directory)
            write_archive(self._path(checkpoint.server_round), FORMAT, Archive(header, arrays))
            for path in self._paths()[self._keep :]:
                path.unlink()
        except (OSError, ArchiveError) as error:
            raise RunError(f"checkpoint of round {checkpoint.server_round} can't be written: {error}") from error

    def save_choice(self, choice: Choice) -> None:
        """Write down whom a round asks, before it asks them.

        Raises:
            RunError: if the disk refuses.
        """
        try:
            make_directory(self.directory)
            write_whole(self.directory / _CHOICE_FILE, json.dumps(asdict(choice)))
        except OSError as error:
            raise RunError(f"the choice of round {choice.server_round} can't be written: {error}") from error

    def choice(self) -> Choice | None:
        """Whom the last round that began has asked; None where that is not known."""
        try:
            facts = json.loads((self.directory / _CHOICE_FILE).read_text(encoding="utf-8"))
            return Choice(facts["server_round"], tuple(facts["clients"]), tuple(facts["resynced"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def latest(self, parts: Iterable[str] = ()) -> Checkpoint | None:
        """The newest checkpoint that can be read, or None.

        Args:
            parts: that it must have.

        Raises:
            RunError: if there are some and none can be read.
        """
        reasons: list[str] = []
        for path in self._paths():
            try:
                found = _checkpoint(_read(path))
                if missing := sorted({*parts} - {*found.parts}):
                    raise ArchiveError(f"{path.name} lacks its part {missing[0]!r}")
                return found
            except (ArchiveError, OSError) as error:
                reasons.append(str(error))
            except (KeyError, TypeError, ValueError) as error:
                reasons.append(f"{path.name} is damaged: {type(error).__name__}: {error}")
            _log.warning("%s; trying the one before", reasons[-1])
        if reasons:
            raise RunError(
                f"no checkpoint in {str(self.directory)!r} can be read: {reasons[0]}; put a copy of it back, or start "
                "a new run, which keeps more of them with a larger server.keep_checkpoints"
            )
        return None

    def _path(self, server_round: int) -> Path:
        return self.directory / _PATTERN.replace("*", f"{server_round:07d}")

    def _paths(self) -> list[Path]:
        return sorted(self.directory.glob(_PATTERN), reverse=True)


def _read(path: Path) -> Archive:
    """A checkpoint's file, of this format or of the one before."""
    try:
        archive = read_archive(path, FORMAT)
    except ArchiveError as error:
        try:
            return read_archive(path, FORMER_FORMAT)
        except ArchiveError:
            raise error from None
    facts = json.loads(archive.arrays[_FACTS].tobytes())
    return Archive({**archive.facts, **facts}, archive.arrays)


def _checkpoint(archive: Archive) -> Checkpoint:
    facts = archive.facts
    parts = {part: Archive(facts["parts"][part], without_prefix(f"{part}/", archive.arrays)) for part in facts["parts"]}
    return Checkpoint(facts["server_round"], facts["training_id"], parts, facts["row"])
