"""The figure, the table and the pages of some runs, as files."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from fedkd_flwr.disk import make_directory, write_whole
from fedkd_flwr.measure.ledger import LEDGER_FILE
from fedkd_flwr.measure.link import NetworkOptions
from fedkd_flwr.report.comparison_page import comparison_page
from fedkd_flwr.report.figures import draw_curves
from fedkd_flwr.report.html_page import PAGE_FILE, html_page
from fedkd_flwr.report.runs import common_link, read_run, rounds_in_words, table_rows
from fedkd_flwr.report.table import markdown_table
from fedkd_flwr.report.verdict import verdict

_log = logging.getLogger("fedkd")

CURVES_FILE = "curves.png"
TABLE_FILE = "table.md"
COMPARISON_DIR = "comparison"


def comparison_dir(root: Path) -> Path:
    """A new place for a comparison of several runs, beside the folders of their experiments.

    Args:
        root: where results go; the folders of experiments are in it.
    """
    return root / COMPARISON_DIR / datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def write_report(
    directories: Sequence[Path], output: Path | None = None, link: NetworkOptions | None = None
) -> tuple[Path, Path]:
    """Draw runs into one figure and one Markdown table, with a verdict on distillation under it.

    What is drawn of several runs never takes the place of what lies beside one of them. A comparison has a page of its
    own; each run's page goes into the run's directory, that of a single run to where the rest is written.

    Args:
        directories: of the runs.
        output: where to write; by default the directory of a single run, and for several a new one in `comparison`
            beside the folders of their experiments.
        link: over which bytes are turned into seconds; None takes what the runs name, see `common_link`.

    Returns:
        Paths of the figure and of the table.
    """
    runs = [read_run(directory) for directory in directories]
    several = len(runs) > 1
    beside = comparison_dir(directories[0].resolve().parent.parent) if several else directories[0]
    target = output or beside
    make_directory(target)
    figure, table = target / CURVES_FILE, target / TABLE_FILE
    asked, link = link, link or common_link(runs)
    draw_curves([run.curve(link) for run in runs], runs[0].metric, link.describe(), figure)
    rows, lines = table_rows(runs, link), verdict(runs)
    text = markdown_table(rows, link.describe(), rounds_in_words(runs)) + "".join(f"\n* {line}" for line in lines)
    write_whole(table, text.rstrip() + "\n")
    if several:
        write_whole(target / PAGE_FILE, comparison_page(runs, rows, lines, link.describe(), figure.read_bytes()))
    if output is None or not several:  # of several runs elsewhere, each has its page already
        for run in runs:
            write_whole((run.directory if several else target) / PAGE_FILE, html_page(run, asked))
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
