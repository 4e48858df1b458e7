"""Delimited files in which no quote is in doubt: Arrow's reader takes them, many times faster than ours."""

import mmap
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import csv

from fedkd_flwr.tasks.partition import Rows

_AT_ONCE = 64 * 2**20  # bytes that are looked at together
_BLOCK = 4 * 2**20  # bytes that Arrow takes at a time; a longer row is left to our reader
_MARK = b"\xef\xbb\xbf"  # of UTF-8
_QUOTE, _NEWLINE, _RETURN = b'"\n\r'

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Quotes = Literal["none", "paired"]


def quotes_of(path: str, delimiter: str, width: int) -> Quotes | None:
    """Whether all quotes of a file are characters, or all of them open and close fields; None where in doubt.

    In doubt is, too, a quoted field over several lines all of which would be whole rows by themselves, and a line that
    ends as no system of today ends it.

    Args:
        path: of a file in UTF-8.
        delimiter: one character.
        width: number of columns.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        text = np.frombuffer(content, np.uint8)
        try:
            return _quotes(text, ord(delimiter), width)
        finally:
            del text  # or the map could not be closed


def _quotes(text: Bytes, delimiter: int, width: int) -> Quotes | None:
    returns = _places(text, _RETURN)
    if len(returns) and (text[np.minimum(returns + 1, len(text) - 1)] != _NEWLINE).any():
        return None
    start = len(_MARK) if text[: len(_MARK)].tobytes() == _MARK else 0
    quotes = _places(text, _QUOTE)
    before = np.where(quotes > start, text[np.maximum(quotes - 1, 0)], _NEWLINE)
    if not _is_edge(before, delimiter).any():
        return "none"
    after = np.where(quotes + 1 < len(text), text[np.minimum(quotes + 1, len(text) - 1)], _NEWLINE)
    opening, closing = before[::2], after[1::2]
    doubled = (opening == _QUOTE) & np.append(False, np.diff(quotes)[1::2] == 1)[: len(opening)]
    follows = np.append(doubled[1:], False)[: len(closing)]
    whole = len(quotes) % 2 == 0 and (_is_edge(opening, delimiter) | doubled).all()
    if not whole or not (_is_edge(closing, delimiter) | follows).all():
        return None
    return None if _swallows(text, quotes, delimiter, width) else "paired"


def _swallows(text: Bytes, quotes: Rows, delimiter: int, width: int) -> bool:
    """Whether a row goes over several lines each of which has as many fields as there are columns."""
    ends = _places(text, _NEWLINE)
    inside = np.searchsorted(quotes, ends) % 2 == 1
    if width < 2 or not inside.any():
        return False
    if not len(ends) or ends[-1] != len(text) - 1:
        ends, inside = np.append(ends, len(text)), np.append(inside, False)
    delimiters = np.diff(np.searchsorted(_places(text, delimiter), ends), prepend=0)
    first = np.flatnonzero(np.append(True, ~inside[:-1]))  # line of each row
    complete = np.logical_and.reduceat(delimiters == width - 1, first)
    lines = np.diff(np.append(first, len(ends)))
    return bool((complete & (lines > 1)).any())


def _is_edge(values: Bytes, delimiter: int) -> Mask:
    edges: Mask = (values == delimiter) | (values == _NEWLINE) | (values == _RETURN)
    return edges


def _places(text: Bytes, value: int) -> Rows:
    """Where a byte is: [times]."""
    parts = range(0, len(text), _AT_ONCE)
    return np.concatenate([np.flatnonzero(text[part : part + _AT_ONCE] == value) + part for part in parts])


def batches(path: str, delimiter: str, names: Sequence[str], *, quotes: Quotes, header: bool) -> Iterator[pa.Table]:
    """The rows of a file as texts, null where a cell is empty; some at a time.

    Args:
        path: of a file in UTF-8.
        delimiter: one character.
        names: of the columns.
        quotes: see `quotes_of`.
        header: whether the first line is one.

    Raises:
        pyarrow.ArrowInvalid: if a row has more or fewer fields than there are names, or is too long.
    """
    reader = csv.open_csv(
        path,
        read_options=csv.ReadOptions(
            use_threads=False, block_size=_BLOCK, skip_rows=int(header), column_names=list(names)
        ),
        parse_options=csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if quotes == "paired" else False,
            newlines_in_values=quotes == "paired",
        ),
        convert_options=csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
        ),
    )
    for batch in reader:
        yield pa.Table.from_batches([batch])
