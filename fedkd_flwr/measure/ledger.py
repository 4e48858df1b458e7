"""The ledger: one JSON row for everything that happened in a run, appended as it happens.

Row kinds: `start` (who, with what), `message` (bytes of one message), `round` (metrics, counts, seconds), `event`
(something unusual about a client), `account` (what a checkpoint knows to have been moved and disclosed, where rows of
it were lost), `final` (the evaluation on all clients at the end), `end` (status), `resume` (a later process goes on
after an end or a crash). A row is written whole or, if the process dies, not at all as far as a reader can tell: an
unfinished last line is left out.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedkd_flwr.measure.privacy_account import PrivacyAccount

Row = dict[str, Any]
Listener = Callable[[Row], None]

LEDGER_FILE = "ledger.jsonl"
_TIME = "elapsed_seconds"  # every row has it


class LedgerError(ValueError):
    """A ledger that can't be read. The message is one line: which file, which line, what to do."""


@dataclass(frozen=True, slots=True)
class MessageRow:
    """Bytes of one message.

    Attributes:
        round: 1 to num_rounds; 0 before the first, num_rounds + 1 for the final evaluation.
        node: client_key of the other end, or "-" where it is not known yet.
        direction: "downlink" to a client, "uplink" from it.
        purpose: "hello", "train" or "evaluate".
        payload_bytes: the packed payload in it.
        wire_bytes: the serialised message, payload included.
        framing_bytes: what Flower adds to move the message's objects.
    """

    round: int
    node: str
    direction: Literal["downlink", "uplink"]
    purpose: str
    payload_bytes: int
    wire_bytes: int
    framing_bytes: int


class Ledger:
    """Appends rows to `directory`/ledger.jsonl and tells a listener.

    Where the file holds rows of an earlier process already, time and bytes go on from them.

    Raises:
        LedgerError: if a line of that file is damaged.

    Attributes:
        directory: where the file is.
        wire_bytes: of all messages so far.
        last_round: the last round that has a row; -1 where none has.
        training_id: of the `start` row, or empty.
        num_resumes: how often the run was resumed.
        privacy: what clients have disclosed; None where they add no noise.
    """

    def __init__(self, directory: Path, listener: Listener | None = None) -> None:
        path = directory / LEDGER_FILE
        self.directory = directory
        self.wire_bytes = 0
        self.last_round = -1
        self.training_id = ""
        self.num_resumes = 0
        self.privacy: PrivacyAccount | None = None
        elapsed = 0.0
        if path.exists():
            _cut_torn_line(path)
            for row in read_rows(path):
                elapsed = row["elapsed_seconds"]
                self._count(row)
        self._file = path.open("a", encoding="utf-8")
        self._listener = listener
        self._started = time.monotonic() - elapsed

    def _count(self, row: Row) -> None:
        kind = row["kind"]
        if kind == "message":
            self.wire_bytes += row.get("wire_bytes", 0)
        elif kind == "account":
            self.wire_bytes += row["lost_wire_bytes"]
        elif kind == "round":
            self.last_round = row.get("round", self.last_round)
        elif kind == "start":
            self.training_id = row.get("training_id", "")
            self.privacy = PrivacyAccount(facts) if (facts := row.get("privacy")) else None
        self.num_resumes += kind == "resume"
        if self.privacy is not None:
            self.privacy.take(row)

    def write(self, kind: str, **values: Any) -> None:
        """Append one row of a kind."""
        row: Row = {"kind": kind, "elapsed_seconds": round(time.monotonic() - self._started, 4), **values}
        self._count(row)
        if self.privacy is not None and kind in ("round", "final"):
            row["privacy"] = self.privacy.spent()
        self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._file.flush()
        if self._listener:
            self._listener(row)

    def message(self, row: MessageRow) -> None:
        """Append the bytes of one message."""
        self.write("message", **asdict(row))

    def go_on(self, wire_bytes: int, disclosed: Mapping[str, Any] | None) -> None:
        """Count at least so much from here on: this file may have been lost, or be an older one, and rows with it.

        Args:
            wire_bytes: of all messages.
            disclosed: see `PrivacyAccount.saved`; None where clients add no noise.
        """
        lost = max(0, wire_bytes - self.wire_bytes)
        if lost or (self.privacy is not None and disclosed is not None and self.privacy.lacks(disclosed)):
            self.write("account", lost_wire_bytes=lost, disclosed=disclosed)

    def make_durable(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make what was written durable and let go of the file."""
        self.make_durable()
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    """Drop an unfinished last line, or the next row would be written onto it."""
    written = path.read_bytes()
    os.truncate(path, written.rfind(b"\n") + 1)


def _finite(value: Any) -> Any:
    """The value as JSON can hold it: null for NaN and infinity (a diverged model's loss), numbers for numpy's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a ledger file, without an unfinished last line.

    Raises:
        LedgerError: at a line that is no row.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield _row_of(line, number, path)


def _row_of(line: bytes, number: int, path: Path) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # also bytes that are no text
        row = None
    if isinstance(row, dict) and isinstance(row.get("kind"), str) and isinstance(row.get(_TIME), int | float):
        return row
    raise LedgerError(
        f"line {number} of {str(path)!r} is damaged: it is no row of a ledger; put a copy of the file back, or delete "
        "that line, and the bytes and scores in it do not count"
    )


def environment() -> Mapping[str, str | int]:
    """What the run ran on."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "flwr": version("flwr"),
        "cpu_count": os.cpu_count() or 1,
    }
