"""Several runs as one HTML file: the verdict, the table, the figure, and where each run lies."""

from base64 import b64encode
from collections.abc import Mapping, Sequence

from fedkd_flwr.report.html_page import page_of, section_of_lines, table_of
from fedkd_flwr.report.markup import as_text
from fedkd_flwr.report.runs import RunResult, rounds_in_words, shown_path
from fedkd_flwr.report.table import LEGEND, filled_columns


def comparison_page(
    runs: Sequence[RunResult], rows: Sequence[Mapping[str, str]], lines: Sequence[str], link: str, figure: bytes
) -> str:
    """The page of a comparison.

    Args:
        runs: that are compared.
        rows: of the table, cells by column.
        lines: of the verdict.
        link: over which bytes are turned into seconds, in words.
        figure: of their curves, a PNG file.
    """
    shown = filled_columns(rows)
    cells = [[as_text(row[column]) for column in shown] for row in rows]
    table = table_of(f"{as_text(runs[0].metric)}, bytes and time", list(map(as_text, shown)), cells)
    legend = as_text(LEGEND.format(link=link, rounds=rounds_in_words(runs)), None)
    picture = b64encode(figure).decode()
    places = [(as_text(run.label), as_text(shown_path(run.directory), None)) for run in runs]
    return page_of(
        "Comparison",
        [
            f"<header><h1>Comparison</h1><p>{len(runs)} runs</p></header>",
            section_of_lines("Verdict", lines),
            f'<section><h2>Runs</h2>{table}<p class="legend-text">{legend}</p></section>',
            f'<section><h2>Curves</h2><img alt="Score by round, against bytes and against transfer" '
            f'src="data:image/png;base64,{picture}"></section>',
            f"<section><h2>Places</h2>{table_of('Each has a page of its own', ['run', 'directory'], places, 'words')}"
            "</section>",
        ],
    )
