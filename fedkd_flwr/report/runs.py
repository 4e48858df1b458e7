"""Finished runs, read back from their directories."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd_flwr.measure.ledger import LEDGER_FILE, Row, read_rows
from fedkd_flwr.measure.link import USUAL, NetworkOptions, Transfer, network_of, transfer_of
from fedkd_flwr.measure.metrics import last_mean
from fedkd_flwr.measure.summary import summarise, without_repeats
from fedkd_flwr.report.figures import Curve
from fedkd_flwr.report.table import COLUMNS

MEGABYTE = 1e6
AVERAGED_ROUNDS = 3
ALMOST_ALL = 0.995


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run.

    Attributes:
        directory: where its ledger lies.
        summary: as in summary.json.
        rows: of the ledger.
    """

    directory: Path
    summary: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """Name and seed."""
        return f"{self.summary['experiment']} (seed {self.summary['seed']})"

    @property
    def metric(self) -> str:
        """The task's first metric."""
        metrics = self.summary["metrics"]
        return next((name for scores in metrics.values() if scores for name in scores), "accuracy")

    def score(self, scope: str) -> float | None:
        """Final value of the first metric in a scope, or None where the algorithm has no such model."""
        scores = self.summary["metrics"][scope]
        return scores.get(self.metric) if scores else None

    def last_rounds(self) -> float | None:
        """Mean of the shared model's score over the last three rounds."""
        scores = [r["metrics"]["shared_global"] for r in self.rows if r["kind"] == "round" and r["round"] > 0]
        return last_mean([s[self.metric] for s in scores if s and s.get(self.metric) is not None], AVERAGED_ROUNDS)

    @property
    def network(self) -> NetworkOptions | None:
        """The links that the experiment names."""
        return network_of(self.rows)

    def curve(self, link: NetworkOptions = USUAL) -> Curve:
        """Score by round, against the bytes spent until then, and against what these take over a link."""
        scope = "shared_global" if self.summary["metrics"]["shared_global"] else "private_local"
        total, transfer = 0, Transfer(link)
        spent = {-1: (0.0, 0.0)}  # by round
        curve = Curve(self.label + ("" if scope == "shared_global" else ", own data"), [], [], [], [])
        for row in self.rows:
            transfer.take(row)
            if row["kind"] == "message":
                total += row["wire_bytes"]
            if row["kind"] not in ("round", "final"):
                continue
            spent[row["round"]] = total / MEGABYTE / self.summary["num_clients"], transfer.seconds
            # Local scores are of the version that the round began with; the shared one has been scored by then.
            at = row["round"] - (scope != "shared_global")
            scores = row["metrics"].get(scope) if scope != "shared_global" or row["kind"] == "round" else None
            if scores and scores.get(self.metric) is not None and at in spent:
                curve.rounds.append(at)
                curve.megabytes.append(spent[at][0])
                curve.seconds.append(spent[at][1])
                curve.scores.append(scores[self.metric])
        return curve

    def table_row(self, link: NetworkOptions = USUAL) -> dict[str, str]:
        """Cells for `COLUMNS`; seconds of transfer are those over a link."""
        counted, clients = self.summary["bytes"], self.summary["num_clients"]
        reduction = counted["reduction_vs_dense_teacher"]
        values = [
            self.label,
            _score(self.score("shared_global")),
            _score(self.last_rounds()),
            _score(self.score("shared_local")),
            _score(self.score("private_local")),
            _score(self.score("ensemble_local")),
            f"{counted['uplink'] / clients / MEGABYTE:.3f}",
            f"{counted['downlink'] / clients / MEGABYTE:.3f}",
            "-" if reduction is None else _percent(reduction),
            f"{transfer_of(self.rows, link).seconds:.1f}",
            f"{self.summary['seconds']['wall']:.0f}",
        ]
        return dict(zip(COLUMNS, values, strict=True))


def common_link(runs: Sequence[RunResult]) -> NetworkOptions:
    """The link that runs are compared over: what the first names that names one, else the usual one."""
    return next((run.network for run in runs if run.network), USUAL)


def read_run(directory: Path) -> RunResult:
    """Read a run directory.

    Raises:
        FileNotFoundError: if it holds no ledger.
    """
    rows = tuple(without_repeats(read_rows(directory / LEDGER_FILE)))
    return RunResult(directory, summarise(rows), rows)


def _percent(reduction: float) -> str:
    """With another digit where little is left: 99.95 % is half of 99.9."""
    return f"{100 * reduction:.{2 if reduction > ALMOST_ALL else 1}f} %"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
