"""Progress on screen or in a log, fed by the rows of a ledger."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedkd_flwr.console import print_line
from fedkd_flwr.measure.ledger import Row


class RunProgress:
    """A bar that moves with each round. Use as a context manager, and pass `update` as the ledger's listener."""

    def __init__(self, name: str, num_rounds: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task: TaskID = self._progress.add_task(name, total=num_rounds, note="starting")
        self._num_rounds = num_rounds
        self._note = RoundNote()

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it is."""
        self._progress.stop()

    def update(self, row: Row) -> None:
        """Take one row of the ledger."""
        if note := self._note.of(row):
            self._progress.update(self._task, completed=min(row["round"], self._num_rounds), note=note)


class RoundNote:
    """What to say of a round: the score, and the bytes that all clients moved since the start."""

    def __init__(self) -> None:
        self._moved = 0

    def of(self, row: Row) -> str | None:
        """The note of a round's row, or of the scores after the last; None of any other."""
        if row["kind"] == "message":
            self._moved += row["wire_bytes"]
        if row["kind"] not in ("round", "final"):
            return None
        scores = row["metrics"]["shared_global"] or row["metrics"]["private_local"] or {}
        score = next((f"{name} {value:.3f}, " for name, value in scores.items() if value is not None), "")
        return f"{score}{self._moved / 1e6:.1f} MB in all{', skipped' if row['skipped'] else ''}"


class RoundLog:
    """What is to be noted of the data, and a line for each round, printed for the log that Flower keeps of a run."""

    def __init__(self) -> None:
        self._note = RoundNote()

    def update(self, row: Row) -> None:
        """Take one row of the ledger."""
        if row["kind"] == "start":
            for line in row.get("notes", ()):
                print_line(f"note: {line}")
        if note := self._note.of(row):
            when = f"round {row['round']}" if row["kind"] == "round" else "after the last round"
            print_line(f"{when}: {note}")
