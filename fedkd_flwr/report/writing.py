"""The figure and the table of some runs, as files."""

from collections.abc import Sequence
from pathlib import Path

from fedkd_flwr.report.figures import draw_curves
from fedkd_flwr.report.runs import read_run
from fedkd_flwr.report.table import markdown_table
from fedkd_flwr.report.verdict import verdict

CURVES_FILE = "curves.png"
TABLE_FILE = "table.md"


def write_report(directories: Sequence[Path], output: Path | None = None) -> tuple[Path, Path]:
    """Draw runs into one figure and one Markdown table, with a verdict on distillation under it.

    Args:
        directories: of the runs.
        output: where to write; by default the first run's own directory.

    Returns:
        Paths of the figure and of the table.
    """
    runs = [read_run(directory) for directory in directories]
    target = output or directories[0]
    target.mkdir(parents=True, exist_ok=True)
    figure, table = target / CURVES_FILE, target / TABLE_FILE
    draw_curves([run.curve() for run in runs], runs[0].metric, figure)
    text = markdown_table([run.table_row() for run in runs]) + "".join(f"\n* {line}" for line in verdict(runs))
    table.write_text(text.rstrip() + "\n", encoding="utf-8")
    return figure, table
