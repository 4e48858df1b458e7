"""The comparison table, in Markdown and on screen."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

COLUMNS = (
    "run",
    "shared, global test",
    "mean of last 3 rounds",
    "shared, clients' tests",
    "private, clients' tests",
    "MB up per client",
    "MB down per client",
    "fewer bytes than FedAvg of the teacher",
    "seconds",
)
LEGEND = (
    "shared: the model that the algorithm shares, on the server's test set and on each client's own; private: what "
    "stays on a client. Bytes are those of every serialised message."
)


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as a Markdown table, with a legend."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(row[column] for column in COLUMNS) + " |" for row in rows]
    return "\n".join([*lines, "", LEGEND, ""])


def screen_table(rows: Sequence[Mapping[str, str]], metric: str) -> Table:
    """The rows as a table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{metric}, bytes and time", caption=LEGEND, title_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(row[column] for column in COLUMNS))
    return table
