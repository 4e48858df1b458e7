"""Finished runs, read back from their directories."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd_flwr.measure.ledger import LEDGER_FILE, Row, read_rows
from fedkd_flwr.measure.link import USUAL, NetworkOptions, Transfer, network_of, transfer_of
from fedkd_flwr.measure.metrics import last_mean, num_averaged
from fedkd_flwr.measure.summary import summarise, without_repeats
from fedkd_flwr.report.figures import Curve
from fedkd_flwr.report.table import COLUMNS

MEGABYTE = 1e6
ALMOST_ALL = 0.995
OVERHEAD = 0.01  # of dense models: what surrounds them in messages
UNEVEN = 1.5  # times the share that the largest of even classes would have: from here on accuracy flatters
LABEL_LENGTH = 24


@dataclass(frozen=True, slots=True)
class Majority:
    """Always the same answer.

    Attributes:
        label: the answer: the largest class of the training split.
        share: of that class there, in (0, 1]; None where the answer is no class of the examples.
        num_classes: how many there are.
        scores: of it on the server's test set, by name.
    """

    label: str
    share: float | None
    num_classes: int
    scores: Mapping[str, float]

    @property
    def words(self) -> str:
        """What is answered, in a few words that can stand in a table."""
        label = "".join(c if c.isprintable() and c != "|" else "?" for c in self.label)
        label = label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…"
        return f"always {label!r}" + ("" if self.share is None else f" ({100 * self.share:.0f} %)")

    @property
    def uneven(self) -> bool:
        """Whether the largest class is so large that accuracy says little."""
        return self.share is not None and self.share >= UNEVEN / self.num_classes

    def table_row(self, metric: str) -> dict[str, str]:
        """Cells for `COLUMNS`: it needs no training, so every round scores alike."""
        score, macro = self.scores.get(metric), self.scores.get("macro_f1")
        cells = {"run": self.words, "shared model": _score(score), "last rounds": _score(score)}
        if metric == "accuracy" and self.uneven:
            cells["macro-F1"] = _score(macro)
        return dict.fromkeys(COLUMNS, "-") | cells


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
        """Mean of the shared model's score over the last rounds: those that `rounds_averaged` names."""
        scored = self._scored_rounds()
        return last_mean([score for _, score in scored], num_averaged(len(scored)))

    @property
    def rounds_averaged(self) -> str:
        """Which rounds `last_rounds` is of, in words; empty where no round has a score."""
        numbers = [number for number, _ in self._scored_rounds()]
        last = numbers[-num_averaged(len(numbers)) :]
        if len(last) < 2:
            return f"round {last[0]}" if last else ""
        return f"mean of rounds {last[0]} to {last[-1]}"

    def _scored_rounds(self) -> list[tuple[int, float]]:
        """Number and score of every round after which the shared model was scored."""
        rows = (row for row in self.rows if row["kind"] == "round" and row["round"] > 0)
        scores = ((row["round"], (row["metrics"]["shared_global"] or {}).get(self.metric)) for row in rows)
        return [(number, score) for number, score in scores if score is not None]

    @property
    def last_round(self) -> int:
        """Number of the last round that is closed; 0 before the first."""
        return max((row["round"] for row in self.rows if row["kind"] == "round"), default=0)

    @property
    def majority(self) -> "Majority | None":
        """What always answering the largest class scores; None where labels are no classes, or nobody wrote it down."""
        found = self.summary.get("majority")
        return (
            Majority(str(found["label"]), found.get("share"), found["num_classes"], found["scores"]) if found else None
        )

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

    def macro_f1(self) -> float | None:
        """Macro-F1 of the shared model after the last round where accuracy alone would flatter; else None."""
        majority = self.majority
        if majority is None or not majority.uneven or self.metric != "accuracy":
            return None
        value = (self.summary["metrics"]["shared_global"] or {}).get("macro_f1")
        return None if value is None else float(value)

    def table_row(self, link: NetworkOptions = USUAL) -> dict[str, str]:
        """Cells for `COLUMNS`; seconds of transfer are those over a link."""
        counted, clients = self.summary["bytes"], self.summary["num_clients"]
        reduction = counted["reduction_vs_dense_teacher"]
        values = [
            self.label,
            _score(self.score("shared_global")),
            _score(self.last_rounds()),
            _score(self.macro_f1()),
            _score(self.score("shared_local")),
            _score(self.score("private_local")),
            _score(self.score("ensemble_local")),
            f"{counted['uplink'] / clients / MEGABYTE:.3f}",
            f"{counted['downlink'] / clients / MEGABYTE:.3f}",
            "-" if reduction is None else fewer_bytes(reduction),
            f"{transfer_of(self.rows, link).seconds:.1f}",
            f"{self.summary['seconds']['wall']:.0f}",
        ]
        return dict(zip(COLUMNS, values, strict=True))


def common_link(runs: Sequence[RunResult]) -> NetworkOptions:
    """The link that runs are compared over: what the first names that names one, else the usual one."""
    return next((run.network for run in runs if run.network), USUAL)


def table_rows(runs: Sequence[RunResult], link: NetworkOptions) -> list[dict[str, str]]:
    """A row for each run, and one for each answer that is always the same and that a run is scored beside."""
    constant = [majority.table_row(run.metric) for run in runs if (majority := run.majority)]
    return [run.table_row(link) for run in runs] + [row for n, row in enumerate(constant) if row not in constant[:n]]


def shown_path(path: Path) -> Path:
    """A path as its user would write it: from the working directory where it lies below that."""
    path, here = path.resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def rounds_in_words(runs: Sequence[RunResult]) -> str:
    """Which rounds the means of some runs are of, for a legend; the rule where they are not the same for all."""
    said = {run.rounds_averaged for run in runs} - {""}
    return said.pop() if len(said) == 1 else "mean of the last quarter of a run's rounds, at least 1 and at most 3"


def read_run(directory: Path) -> RunResult:
    """Read a run directory.

    Raises:
        FileNotFoundError: if it holds no ledger.
    """
    rows = tuple(without_repeats(read_rows(directory / LEDGER_FILE)))
    return RunResult(directory, summarise(rows), rows)


def fewer_bytes(reduction: float) -> str:
    """In per cent, with another digit where little is left: 99.95 % is half of 99.9.

    The scores and names beside dense models make dense FedAvg no larger than itself.
    """
    reduction = 0.0 if abs(reduction) < OVERHEAD else reduction
    return f"{100 * reduction:.{2 if reduction > ALMOST_ALL else 1}f} %"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
