"""Files of delimited text (CSV, TSV) as Arrow tables: one place decides what a row, a field and a type is.

A cell is what is written in it: "NA", "null" and "None" are texts, and only an empty cell is missing. A quote that is
not closed where its field ends is a character. A column has numbers or truth values only if every cell of it, in all
files of a data set, is written as Python would write that value; so "007" and "1.50" stay text, and no text is lost.
"""

import csv
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]

from fedkd_flwr.tasks.cells import Kind, kind_of, values
from fedkd_flwr.tasks.wellformed import Quotes, batches, quotes_of

Style = Literal["quoted", "stray", "plain"]
Row = tuple[int, list[str]]  # the line that it begins in, from 1, and its fields

_ROWS_AT_ONCE = 10_000
_LINES_OF_FIELD = 100  # where a quote is not closed within as many lines, it is a character
_SWALLOWED = 3  # lines of one quoted field, each of them a whole row by itself: a quote was left open
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # of encodings, at the start


@dataclass(frozen=True, slots=True)
class Survey:
    """How a file is to be read, and what is in it.

    Attributes:
        path: of the file.
        encoding: Python's name.
        delimiter: one character.
        style: "quoted" by the rules of CSV; "stray" likewise, but a quote that is not closed is a character; "plain" if
            all quotes are characters.
        names: of the columns.
        has_header: whether the first line has them.
        quotes: what they are where all of them are alike and Arrow's reader can be used; else None.
        kinds: of the columns.
        num_rows: without the header and empty lines.
        notes: what looks like an accident, one sentence each.
    """

    path: str
    encoding: str
    delimiter: str
    style: Style
    names: tuple[str, ...]
    has_header: bool
    quotes: Quotes | None = None
    kinds: tuple[Kind, ...] = ()
    num_rows: int = 0
    notes: tuple[str, ...] = ()


def survey(path: str, *, delimiter: str, names: Sequence[str] | None = None) -> Survey:
    """Decide how a file is read, and read it once.

    Args:
        path: of an unpacked file.
        delimiter: what its name promises; another one is taken where the header has none of it, but another.
        names: of the columns of a file without a header, all of whose quotes are characters; None takes the header's.

    Raises:
        ValueError: if it is no text in UTF-8 or marked UTF-16, is empty, or has a row with more fields than columns;
            the message says which line, and does not name the file.
    """
    csv.field_size_limit(sys.maxsize)
    encoding = _encoding(path)
    try:
        if names is not None:
            return _survey_without_header(path, encoding, delimiter, names)
        return _survey_with_header(path, encoding, delimiter)
    except UnicodeError as error:
        raise ValueError(f"is not {encoding.removesuffix('-sig').upper()}; save it as UTF-8") from error


def tables(found: Survey, kinds: Sequence[Kind]) -> Iterator[pa.Table]:
    """The rows of a file, some at a time.

    Args:
        found: of the file.
        kinds: that its columns are to have, which may be those of several files together.
    """
    for table in _texts(found, _Tally()):
        arrays = [values(cells, kind) for cells, kind in zip(table.columns, kinds, strict=True)]
        yield pa.Table.from_arrays(arrays, names=list(found.names))


def _texts(found: Survey, tally: "_Tally", spans: "Callable[[_Span], None] | None" = None) -> Iterator[pa.Table]:
    """The rows of a file as texts, some at a time."""
    if found.quotes is not None:
        yield from batches(found.path, found.delimiter, found.names, quotes=found.quotes, header=found.has_header)
        return
    rows = (fields for _, fields in _fitted(_rows(found, spans), len(found.names), tally))
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        columns = [pa.array([cell or None for cell in cells], pa.string()) for cells in zip(*some, strict=True)]
        yield pa.Table.from_arrays(columns, names=list(found.names))


def _encoding(path: str) -> str:
    with open(path, "rb") as file:
        start = file.read(4096)
    if not start:
        raise ValueError("is empty")
    for mark, encoding in _MARKS.items():
        if start.startswith(mark):
            return encoding
    if b"\0" in start:
        raise ValueError("has zero bytes, as UTF-16 without a mark has; save it as UTF-8")
    return "utf-8"


def _survey_without_header(path: str, encoding: str, delimiter: str, names: Sequence[str]) -> Survey:
    found = Survey(path, encoding, delimiter, "plain", tuple(names), has_header=False)
    first = next(_rows(found), (0, []))[1]
    if [name.strip() for name in first] == list(names):
        found = replace(found, has_header=True)
    return _read_fast(found) or _read(found)


def _survey_with_header(path: str, encoding: str, delimiter: str) -> Survey:
    with _opened(path, encoding) as file:
        first = file.readline()
        header = first if first.strip() else next((line for line in file if line.strip()), "")
    if not header:
        raise ValueError("is empty")
    delimiter = _delimiter(header, delimiter)
    quoted_header = header.startswith('"')

    def styled(style: Style) -> Survey:
        found = Survey(path, encoding, delimiter, style, (), has_header=True)
        return replace(found, names=_unique(next(_rows(found, from_header=True))[1]))

    def is_whole(style: Style) -> Survey | None:
        try:
            found = _read(styled(style))
        except ValueError:
            return None
        return None if found.notes else found

    try:
        if header is first and header.count('"') % 2 == 0 and (found := _read_fast(styled("quoted"))):
            return found
    except _QuoteError:
        pass  # of the header; below it is read another way
    tabs = delimiter == "\t" and not quoted_header
    try:
        found = _read(styled("quoted"))
    except _QuoteError:
        return (is_whole("plain") if tabs else None) or _read(styled("stray"))
    except _RaggedError:
        # A stray quote may be what made the row too long.
        found = (is_whole("plain") if tabs else None) or is_whole("stray")
        if found is None:
            raise
    spans = [note for note in found.notes if isinstance(note, _Span)]
    if tabs and spans and (plain := is_whole("plain")) is not None:
        return plain
    return _read(styled("stray")) if any(span.lines >= _SWALLOWED for span in spans) else found


def _delimiter(header: str, promised: str) -> str:
    if promised in header:
        return promised
    return next((other for other in ",;\t|" if other in header), promised)


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Names of columns as pandas makes them of a header: what has none is numbered, and so is one that occurs again."""
    unique: list[str] = []
    for place, name in enumerate(names):
        base = name.strip() or f"Unnamed: {place}"
        number = sum(other.strip() == base for other in names[:place])
        unique.append(f"{base}.{number}" if number else base)
    return tuple(unique)


class _QuoteError(ValueError):
    """A file that is not quoted by the rules of CSV."""


class _RaggedError(ValueError):
    """A row with more fields than there are columns."""


class _Span(str):
    """A note on a quoted field over several lines that are whole rows by themselves."""

    __slots__ = ("lines",)
    lines: int


@dataclass(slots=True)
class _Tally:
    """Rows with fewer fields than columns: how many, and the line of the first."""

    short: int = 0
    first: int = 0


@dataclass(slots=True)
class _Lines:
    """Lines of a file one by one; `taken` are those since it was last emptied."""

    file: IO[str]
    taken: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.taken.append(line)
            yield line


def _read(found: Survey) -> Survey:
    """The same with kinds, number of rows and notes."""
    kinds = [Kind.EMPTY] * len(found.names)
    num_rows, tally, spans = 0, _Tally(), list[_Span]()
    for table in _texts(found, tally, spans.append):
        num_rows += len(table)
        for place, kind in enumerate(kinds):
            if kind is not Kind.TEXT:
                kinds[place] = kind | kind_of(table.column(place).combine_chunks())
    notes: list[str] = list(spans[:1])
    if tally.short:
        s, have = ("", "has") if tally.short == 1 else ("s", "have")
        notes.append(f"{tally.short} row{s} {have} fewer fields than columns (the first is in line {tally.first})")
    return replace(found, kinds=tuple(kinds), num_rows=num_rows, notes=tuple(notes))


def _read_fast(found: Survey) -> Survey | None:
    """As `_read`, by Arrow's reader; None where that is not certain to read the same."""
    if found.encoding not in ("utf-8", "utf-8-sig") or len(set(found.names)) < len(found.names):
        return None
    quotes = quotes_of(found.path, found.delimiter, len(found.names))
    if quotes is None or (quotes == "paired" and found.style == "plain"):
        return None
    try:
        return _read(replace(found, quotes=quotes))
    except pa.ArrowInvalid:
        return None


def _fitted(rows: Iterator[Row], width: int, tally: _Tally) -> Iterator[Row]:
    """Rows with a field for each column: what is missing at the end is empty, and empty fields beyond it are cut."""
    for line, fields in rows:
        if len(fields) != width:
            if len(fields) < width:
                tally.first = tally.first or line
                tally.short += 1
            elif any(fields[width:]):
                raise _RaggedError(
                    f"has {len(fields)} fields in the row of line {line}, and {width} column{'s' * (width != 1)}; "
                    "quote what holds the delimiter"
                )
            fields = fields[:width] + [""] * (width - len(fields))
        yield line, fields


def _opened(path: str, encoding: str) -> IO[str]:
    return open(path, encoding=encoding, newline="")


def _rows(found: Survey, spans: Callable[[_Span], None] | None = None, *, from_header: bool = False) -> Iterator[Row]:
    """Rows of a file without empty lines, and without the header unless it is asked for."""
    with _opened(found.path, found.encoding) as file:
        if found.style == "stray":
            rows = _stray(file, found.delimiter, len(found.names))
        else:
            rows = _by_rule(file, found, spans)
        filled = ((line, fields) for line, fields in rows if len(fields) > 1 or (fields and fields[0]))
        if found.has_header and not from_header:
            next(filled, None)
        yield from filled


def _by_rule(file: IO[str], found: Survey, spans: Callable[[_Span], None] | None) -> Iterator[Row]:
    """Rows by the rules of CSV, or with quotes that are characters."""
    lines = _Lines(file)
    quoting: Any = csv.QUOTE_NONE if found.style == "plain" else csv.QUOTE_MINIMAL
    reader = csv.reader(iter(lines), delimiter=found.delimiter, quoting=quoting, strict=found.style == "quoted")
    before = 0
    try:
        for fields in reader:
            if len(lines.taken) > 1 and spans is not None:
                _note_span(lines.taken, before + 1, found, spans)
            lines.taken.clear()
            yield before + 1, fields
            before = reader.line_num
    except csv.Error as error:
        raise _QuoteError(f"the quotes of the row in line {before + 1} are not closed ({error})") from error


def _note_span(taken: Sequence[str], line: int, found: Survey, spans: Callable[[_Span], None]) -> None:
    width = len(found.names)
    if width > 1 and all(text.count(found.delimiter) == width - 1 for text in taken):
        span = _Span(
            f"one row is lines {line} to {line + len(taken) - 1}, each of which could be a row of its own; close or "
            "remove the quote that joins them if it is stray"
        )
        span.lines = len(taken)
        spans(span)


def _stray(file: IO[str], delimiter: str, width: int) -> Iterator[Row]:
    """Rows of fields that are quoted or not, where a quote that is not closed at the end of its field is a character.

    A quoted field may go over several lines only where the first of them would have too few fields without it.
    """
    part = re.escape(delimiter)
    quoted = re.compile(rf'"([^"]*+(?:""[^"]*+)*+)"(?={part}|\r?\n|\r|\Z)')
    bare = re.compile(rf"[^{part}\r\n]*")

    def split(text: str) -> tuple[list[str], bool]:
        """The fields of a row, and whether one begins with a quote that is not closed."""
        fields, start, opened = list[str](), 0, False
        while True:
            if (found := quoted.match(text, start)) is not None:
                fields.append(found[1].replace('""', '"'))
            else:
                found = bare.match(text, start)
                assert found is not None  # of nothing, if need be
                fields.append(found[0])
                opened = opened or found[0].startswith('"')
            if not text.startswith(delimiter, found.end()):
                return fields, opened
            start = found.end() + 1

    number, waiting = 0, list[str]()

    def taken() -> str:
        return waiting.pop(0) if waiting else file.readline()

    while text := taken():
        first, more = number + 1, list[str]()
        fields, opened = split(text)
        while opened and len(fields) < width and len(more) < _LINES_OF_FIELD and (line := taken()):
            more.append(line)
            fields, opened = split(text + "".join(more))
        if opened and more:  # and not closed: the lines are rows of their own
            waiting[:0] = more
            more = []
            fields, _ = split(text)
        number += 1 + len(more)
        yield first, [] if not text.strip("\r\n") else fields


def named(path: str, base: str) -> str:
    """A file as an error names it: by its path within the data set."""
    place = Path(path)
    return place.relative_to(base).as_posix() if base and place.is_relative_to(base) else place.name
