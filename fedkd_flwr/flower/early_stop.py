"""When a run has what was wanted of it, and when it has stopped learning."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from fedkd_flwr.flower.archive import Archive
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.measure.ledger import Row
from fedkd_flwr.server_options import EarlyStopOptions


def reason_to_stop(wish: EarlyStopOptions, row: Row, moved_bytes: int) -> str:
    """Why no further round is needed; empty where one is.

    Args:
        wish: what was wanted.
        row: of the last round.
        moved_bytes: by all messages so far.

    Raises:
        RunError: if the metric is none of those that the task gives.
    """
    if wish.target is not None:
        scores = row["metrics"]["shared_global"] or {}
        if wish.metric not in scores:
            names = ", ".join(scores) or "none of a shared model"
            raise RunError(f"server.early_stop.metric must be one of {names}, got {wish.metric!r}")
        if (score := scores[wish.metric]) is not None and score >= wish.target:
            return f"{wish.metric} {score:.4g} is at least {wish.target:g}"
    if wish.max_wire_bytes is not None and moved_bytes + row["wire_bytes"] > wish.max_wire_bytes:
        return f"{moved_bytes} bytes moved, another round would bring them above {wish.max_wire_bytes}"
    return ""


@dataclass
class Tally:
    """Which rounds counted, and whether the run still learns.

    A resumed run begins its count of skipped rounds anew: whatever was in the way may be mended, and it gets as many
    tries as a new one. What does not begin anew is whether any round has counted at all.

    Attributes:
        most_skipped: skipped rounds in a row that end the run.
        run_dir: of the run, to say how it goes on.
        num_good: rounds that counted.
        num_skipped: rounds that did not, since the last one that did or since the run was resumed.
        reason: why the first of those did not.
    """

    most_skipped: int
    run_dir: Path
    num_good: int = 0
    num_skipped: int = 0
    reason: str = ""
    _before: int = 0  # skipped rounds at the end of an earlier process's part

    def take(self, *, skipped: bool, reason: str) -> None:
        """A round is closed, and, where it was skipped, this was the first thing that went wrong in it."""
        self._before = 0
        if not skipped:
            self.num_good, self.num_skipped, self.reason = self.num_good + 1, 0, ""
            return
        self.num_skipped += 1
        self.reason = self.reason or reason

    def require_learning(self) -> None:
        """Do nothing while the run learns.

        Raises:
            RunError: if too many rounds in a row were skipped, with the first reason and how to go on.
        """
        if self.num_skipped >= self.most_skipped:
            raise RunError(
                f"{self.num_skipped} rounds in a row were skipped (server.max_skipped_rounds){self._because()}; when "
                f"it is mended: fedkd resume {self._quoted()}; of a deployment: run config resume={self.run_dir.name!r}"
            )

    def require_learned(self, num_needed: int, stop: str) -> None:
        """Do nothing if the run may call itself completed.

        Args:
            num_needed: good replies that a round needs.
            stop: why no further round is wanted; empty where none is left.

        Raises:
            RunError: if no round has counted, or none is left after too many that were skipped.
        """
        more = stop or f"no round is left: fedkd resume {self._quoted()} --force --set num_rounds=..."
        if self.num_good == 0:
            raise RunError(f"no round had {num_needed} good replies{self._because()}; {more}")
        if self._before >= self.most_skipped and not stop:
            raise RunError(f"the last {self._before} rounds were skipped{self._because()}; {more}")

    def _quoted(self) -> str:
        return shlex.quote(str(self.run_dir))  # as a shell takes it

    def _because(self) -> str:
        return f"; first reason: {self.reason}" if self.reason else ""

    def saved(self) -> Archive:
        """For a checkpoint."""
        return Archive(
            {"num_good": self.num_good, "num_skipped": self.num_skipped + self._before, "first_failure": self.reason}
        )

    def restore(self, archive: Archive) -> None:
        """Go on from a checkpoint."""
        self.num_good = archive.facts["num_good"]
        self._before = archive.facts.get("num_skipped", 0)
        self.num_skipped, self.reason = 0, archive.facts["first_failure"] if self._before or not self.num_good else ""
