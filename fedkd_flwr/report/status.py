"""How a run stands, from its ledger, while it goes on or after it."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fedkd_flwr.experiment import CONFIG_FILE, ConfigError, load
from fedkd_flwr.measure.ledger import LEDGER_FILE, LedgerError
from fedkd_flwr.measure.metrics import SCOPES
from fedkd_flwr.report.account import Account, account_of
from fedkd_flwr.report.privacy import privacy_rows
from fedkd_flwr.report.runs import MEGABYTE, RunResult, read_run

GRACE_SECONDS = 60.0
LAST_SKIPPED = 10
LONGEST_REASON = 300


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run at one moment.

    Attributes:
        run: its ledger so far.
        account: what that adds up to.
        quiet_seconds: since the ledger's last row.
        patience_seconds: the longest that a run is quiet while it waits for clients.
    """

    run: RunResult
    account: Account
    quiet_seconds: float
    patience_seconds: float

    @property
    def ended(self) -> bool:
        """Whether the ledger says that the run is over."""
        return bool(self.run.summary["status"] != "unfinished")

    @property
    def state(self) -> str:
        """Running, silent for too long, or how it ended and why."""
        if self.ended:
            why = self.account.reason or self.run.summary["stopped_early"]
            return f"{self.run.summary['status']}{f': {_one_line(why)}' if why else ''}"
        if self.quiet_seconds > self.patience_seconds:
            return "silent for longer than a round may take: probably dead; fedkd resume goes on with it"
        return "running"

    def table(self) -> Table:
        """For a terminal. Names and reasons are text of clients and are shown as text."""
        summary, account = self.run.summary, self.account
        held = account.num_online
        online = ", ".join(f"{count} at version {version}" for version, count in (held or {}).items())
        counted = summary["bytes"]
        rows = [
            ("run", f"{self.run.label}, {self.run.directory}"),
            ("state", self.state),
            ("last row", f"{_ago(self.quiet_seconds)} ago, {_ago(summary['seconds']['wall'])} after the start"),
            ("round", f"{account.last_round or 0} of {summary['num_rounds']}"),
            ("online", "" if held is None else f"{sum(held.values())}{f' ({online})' if online else ''}"),
            ("offline", ", ".join(account.offline)),
            ("bytes", f"{counted['uplink'] / MEGABYTE:.3f} MB up, {counted['downlink'] / MEGABYTE:.3f} MB down"),
            *((scope.replace("_", " "), self._scores(scope)) for scope in SCOPES),
            ("rejected", ", ".join(f"{kind} {count}" for kind, count in summary["rejected"].items()) or "none"),
            ("skipped", _last(account.skipped) or "none"),
            *privacy_rows(summary.get("privacy"))[:2],
        ]
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in rows:
            if value:
                table.add_row(name, Text(_printable(value)))
        return table

    def _scores(self, scope: str) -> str:
        scores = self.run.summary["metrics"][scope] or {}
        return ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if value is not None)


def status_of(directory: Path) -> RunStatus:
    """How a run stands.

    Args:
        directory: of the run, or of its experiment: its newest run.

    Raises:
        ConfigError: if there is no ledger of a run.
    """
    run_dir = newest_run(directory)
    try:
        quiet = max(0.0, time.time() - (run_dir / LEDGER_FILE).stat().st_mtime)
        run = read_run(run_dir)
        if not run.rows or run.summary["experiment"] is None:
            raise ValueError("no start row")
        return RunStatus(run, account_of(run.rows), quiet, _patience(run_dir))
    except LedgerError as error:
        raise ConfigError(str(error)) from None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        where = str(run_dir / LEDGER_FILE)
        raise ConfigError(f"{where!r} can't be read as the ledger of a run: {error!r}") from error


def newest_run(directory: Path) -> Path:
    """The directory itself if it holds a ledger, else that directory in it whose ledger was written last.

    Raises:
        ConfigError: if there is none.
    """
    if (directory / LEDGER_FILE).is_file():
        return directory
    ledgers = [path for path in directory.glob(f"*/{LEDGER_FILE}") if path.is_file()]
    if not ledgers:
        remedy = "give results/<experiment> or results/<experiment>/<run>"
        raise ConfigError(f"{str(directory)!r} holds no {LEDGER_FILE}, nor does a directory in it; {remedy}")
    return max(ledgers, key=lambda path: path.stat().st_mtime).parent


def _patience(run_dir: Path) -> float:
    try:
        options = load(run_dir / CONFIG_FILE).server
    except ConfigError:  # of another version; a status is wanted all the same
        return float("inf")
    return max(options.round_timeout_seconds, options.connect_timeout_seconds) + GRACE_SECONDS


def _ago(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _last(rounds: list[int]) -> str:
    if not rounds:
        return ""
    named = ", ".join(map(str, rounds[-LAST_SKIPPED:]))
    return f"{len(rounds)} ({'the last: ' if len(rounds) > LAST_SKIPPED else ''}round {named})"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]} ..."


def _printable(text: str) -> str:
    """Without what would move the cursor or colour the screen."""
    return "".join(c if c.isprintable() else "?" for c in text)
