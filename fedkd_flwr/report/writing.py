"""The figure, the table and the pages of some runs, as files."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fedkd_flwr.measure.ledger import LEDGER_FILE
from fedkd_flwr.measure.link import NetworkOptions
from fedkd_flwr.report.figures import draw_curves
from fedkd_flwr.report.html_page import PAGE_FILE, html_page
from fedkd_flwr.report.runs import common_link, read_run
from fedkd_flwr.report.table import markdown_table
from fedkd_flwr.report.verdict import verdict

_log = logging.getLogger("fedkd")

CURVES_FILE = "curves.png"
TABLE_FILE = "table.md"


def write_report(
    directories: Sequence[Path], output: Path | None = None, link: NetworkOptions | None = None
) -> tuple[Path, Path]:
    """Draw runs into one figure and one Markdown table, with a verdict on distillation under it.

    Each run's page goes into its own directory; that of a single run to where the rest is written.

    Args:
        directories: of the runs.
        output: where to write; by default the first run's own directory.
        link: over which bytes are turned into seconds; None takes what the runs name, see `common_link`.

    Returns:
        Paths of the figure and of the table.
    """
    runs = [read_run(directory) for directory in directories]
    target = output or directories[0]
    target.mkdir(parents=True, exist_ok=True)
    figure, table = target / CURVES_FILE, target / TABLE_FILE
    asked, link = link, link or common_link(runs)
    draw_curves([run.curve(link) for run in runs], runs[0].metric, link.describe(), figure)
    rows = markdown_table([run.table_row(link) for run in runs], link.describe())
    text = rows + "".join(f"\n* {line}" for line in verdict(runs))
    table.write_text(text.rstrip() + "\n", encoding="utf-8")
    if output is None or len(runs) == 1:  # of several runs elsewhere, each has its page already
        for run in runs:
            (output or run.directory).joinpath(PAGE_FILE).write_text(html_page(run, asked), encoding="utf-8")
    return figure, table


@contextmanager
def reported(run_dir: Path) -> Iterator[None]:
    """Write the report of a run when it ends, however it ends: one that failed is the one to look at."""
    try:
        yield
    except BaseException:
        # What ended the run is what must be heard, not that its ledger can't be drawn.
        with suppress(Exception):
            if (run_dir / LEDGER_FILE).is_file():
                write_report([run_dir])
        raise
    try:
        write_report([run_dir])
    except Exception as error:
        # The run is complete and written down; what can't be drawn now can be drawn later.
        _log.warning("the run is complete, its report is not: %r; fedkd report %s draws it again", error, run_dir)
