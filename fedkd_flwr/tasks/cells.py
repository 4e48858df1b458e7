"""Cells of delimited text: what kind of values a column of them has, and the values."""

import re
from contextlib import suppress
from enum import Enum

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"  # what 64 bits hold whatever the digits are
_NUMBER = re.compile(r"-?[0-9][-+.e0-9]*")
_TRUTHS = ("True", "true", "TRUE", "False", "false", "FALSE")
_FIRST = 100  # cells that are looked at one by one before a column is looked at as a whole


class Kind(Enum):
    """What the cells of a column are, as far as they were read."""

    EMPTY = "empty"
    TRUTH = "truth values"
    INTEGER = "whole numbers"
    NUMBER = "numbers"
    TEXT = "text"

    def __or__(self, other: "Kind") -> "Kind":
        """What cells of both kinds are together."""
        if self is other or other is Kind.EMPTY:
            return self
        if self is Kind.EMPTY:
            return other
        return Kind.NUMBER if {self, other} == {Kind.INTEGER, Kind.NUMBER} else Kind.TEXT

    @property
    def type(self) -> pa.DataType:
        """Arrow's type of such a column."""
        types = {Kind.TRUTH: pa.bool_(), Kind.INTEGER: pa.int64(), Kind.NUMBER: pa.float64()}
        return types.get(self, pa.string())


def kind_of(cells: pa.Array) -> Kind:
    """The kind of some cells together.

    Numbers are numbers only as Python writes them, so that their text is not lost: "007" and "1.50" are texts. Spaces
    around them don't count.

    Args:
        cells: texts; null where a cell is empty.
    """
    kind = Kind.EMPTY
    for cell in cells[:_FIRST].to_pylist():
        kind |= _kind(cell)
    if kind is Kind.TEXT:
        return kind
    present = pc.drop_null(pc.ascii_trim(cells, " \t"))
    rest = present.filter(pc.invert(pc.match_substring_regex(present, _INTEGER)))
    if len(rest) < len(present):
        kind |= Kind.INTEGER
    if kind is Kind.NUMBER:
        with suppress(pa.ArrowInvalid):  # where something is no number: which, is found below
            rest = rest.filter(pc.not_equal(pc.cast(pc.cast(rest, pa.float64()), pa.string()), rest))
    for cell in pc.unique(rest).to_pylist():
        if kind is Kind.TEXT:
            break
        kind |= _kind(cell)
    return kind


def _kind(cell: str | None) -> Kind:
    cell = (cell or "").strip(" \t")
    if not cell:
        return Kind.EMPTY
    if re.match(_INTEGER, cell):
        return Kind.INTEGER
    if cell in _TRUTHS:
        return Kind.TRUTH
    if not _NUMBER.fullmatch(cell):
        return Kind.TEXT
    try:
        return Kind.NUMBER if repr(float(cell)) == cell else Kind.TEXT
    except ValueError:
        return Kind.TEXT


def values(cells: pa.Array, kind: Kind) -> pa.Array:
    """The values of cells, all of which are of one kind.

    Args:
        cells: texts; null where a cell is empty.
        kind: that of the column.
    """
    if kind in (Kind.TEXT, Kind.EMPTY):
        return cells
    trimmed = pc.ascii_trim(cells, " \t")
    present = pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)
    if kind is Kind.TRUTH:
        return pc.equal(pc.ascii_lower(present), "true")
    return pc.cast(present, kind.type)
