"""The comparison table, in Markdown and on screen."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

COLUMNS = (
    "run",
    "shared model",
    "last rounds",
    "macro-F1",
    "shared, local",
    "private, local",
    "both, local",
    "MB up",
    "MB down",
    "fewer bytes",
    "link, s",
    "seconds",
)
# In a terminal that is too narrow for all; a file has them.
LEFT_OUT_FIRST = ("seconds", "link, s", "both, local", "macro-F1", "shared, local", "last rounds", "MB down", "MB up")
BETWEEN = 1  # character, between columns on a screen and around all

LEGEND = (
    "shared model: on the server's test set after the last round; last rounds: the same, {rounds}, as in the verdict; "
    "local: on the clients' own test data after the last round; private: what never leaves a client; both: the mean of "
    "their probabilities; always ...: the same answer to every example, without any training. MB: per "
    "client over the whole run, every serialised message; fewer bytes: than dense FedAvg of the teacher with the same "
    "participation; link, s: the time that these bytes take over {link}, with the slowest client of each round."
)


def markdown_table(rows: Sequence[Mapping[str, str]], link: str, rounds: str) -> str:
    """The rows as a Markdown table, with a legend; columns that no row fills are left out.

    Args:
        rows: cells by column.
        link: that of their seconds of transfer, in words.
        rounds: which rounds "last rounds" is of, in words.
    """
    shown = filled_columns(rows)
    lines = ["| " + " | ".join(shown) + " |", "|---" + "|---:" * (len(shown) - 1) + "|"]
    lines += ["| " + " | ".join(row[column] for column in shown) + " |" for row in rows]
    return "\n".join([*lines, "", LEGEND.format(link=link, rounds=rounds), ""])


def screen_table(rows: Sequence[Mapping[str, str]], link: str, rounds: str, metric: str, room: int) -> Table:
    """The rows as a table for a terminal with room for so many characters; the rest as for `markdown_table`.

    No number is broken in two: what does not fit is left out, and so is what no run has.
    """
    shown = filled_columns(rows)
    for column in LEFT_OUT_FIRST:
        if sum(_width(rows, name) + BETWEEN for name in shown) + BETWEEN > room and column in shown:
            shown.remove(column)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{metric}, bytes and time",
        caption=LEGEND.format(link=link, rounds=rounds),
        title_justify="left",
        caption_justify="left",
        padding=0,
    )
    for index, column in enumerate(shown):
        width = _width(rows, column)  # or a heading of many words would take room from a number
        table.add_column(column, justify="left" if index == 0 else "right", width=width, no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(row[column]) for column in shown))  # a class may be called "[b]"
    return table


def filled_columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The columns that at least one row has something in."""
    return [column for column in COLUMNS if any(row[column] != "-" for row in rows)]


def _width(rows: Sequence[Mapping[str, str]], column: str) -> int:
    """Of the longest cell; the words of a heading may stand below one another."""
    return max(map(len, (*column.split(), *(row[column] for row in rows))))
