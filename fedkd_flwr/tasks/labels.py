"""The classes of a table in their order, and the class of each row: decided here for every task with such labels.

The order is that of `task.label_names`, or else of the names that the data's files give to numbers (the library's
ClassLabel), or else of the labels that the training split has: numbers by value, texts by the alphabet. A number is a
class of that name, never a count of classes: -1 and 1 are two classes, 10115 and 80331 are two, 0 to n - 1 are n.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedkd_flwr.tasks.class_names import (
    AmbiguousLabelError,
    Classes,
    Label,
    by_name,
    listed,
    near_equal_notes,
    number_of,
    plain,
    shown,
)
from fedkd_flwr.tasks.partition import Rows
from fedkd_flwr.tasks.source import column_values
from fedkd_flwr.tasks.stored_names import Names

if TYPE_CHECKING:
    from datasets import Dataset

MISSING = -1  # in the place of a label that a row does not have

# What is counted, measured or numbered through is no class. More classes than this are named by 0 to n - 1 or by texts;
# and of so few rows each nothing is learned.
_MOST_OTHER_NUMBERS = 1000
_FEW_CLASSES, _ROWS_EACH = 20, 2

_KEY = "task.data.columns.label"
_WHOLE = re.compile(r"([+-]?[0-9]+)\.0+")


@dataclass(frozen=True, slots=True)
class Labels:
    """The classes of a table, and the class of each row of both splits, `MISSING` where a row has none.

    Attributes:
        names: of the classes, in order.
        train: of the training split, [rows].
        test: of the test split, [rows].
        notes: what is worth knowing of how they were read, one line each.
    """

    names: tuple[str, ...]
    train: Rows
    test: Rows
    notes: tuple[str, ...] = ()


def read_labels(
    train: "Dataset",
    test: "Dataset",
    column: str,
    names: Sequence[str] | None,
    *,
    renamed: bool = True,
    stored: tuple[Names | None, Names | None] = (None, None),
) -> Labels:
    """The label of each row, from a column of numbers, texts, truth values, dates, or of the library's ClassLabel.

    Which class a label is says `Classes.place`. Numbers of a ClassLabel mean what their own file calls them.

    Args:
        train: the training split.
        test: the test split.
        column: holds the labels.
        names: of the classes, in order; None takes those that the table names, or that the training split has. The
            names of a ClassLabel may be put into another order, case aside; as many names, none of which is one of
            its own, take their place one by one.
        renamed: whether they may. Where a node brings its data, its names must be among them instead, truth values
            included.
        stored: what each split's files call the numbers of a ClassLabel, see `stored_names`; None stands for what the
            table says.

    Raises:
        ValueError: if the column is something else, or a label is none of the classes.
    """
    if names is not None and (twice := [name for name, times in Counter(names).items() if times > 1]):
        raise ValueError(f"task.label_names: names {twice[0]!r} twice; give each class a name of its own")
    own = tuple(_own_names(table, column, of) for table, of in zip((train, test), stored, strict=True))
    if names is not None and not renamed:
        for of_file in own:
            _require_known(of_file or (), names, column)
    renaming = _renaming(own[0] or own[1], names, column)
    values = [
        _named(_plain_values(table, column), of_file, renaming)
        for table, of_file in zip((train, test), own, strict=True)
    ]
    chosen = tuple(names) if names is not None else own[0] or (own[1] if _all_whole(values[0]) else None)
    found, notes = (chosen, ()) if chosen is not None else _present(values[0], column, train)
    if len(found) < 2:
        sliced = f"{str(train.split)!r} is a slice: shuffle rows that are sorted by class first, or "
        raise ValueError(
            f"{_KEY}: {column!r} has one class only; {sliced if '[' in str(train.split) else ''}name another column"
        )
    classes = Classes(found)
    reader = _Reader(classes, column, given=names is not None, places=renamed)
    rows = [reader.places(of_split, str(table.split)) for of_split, table in zip(values, (train, test), strict=True)]
    return Labels(classes.names, rows[0], rows[1], (*notes, *near_equal_notes(classes.names)))


def _own_names(table: "Dataset", column: str, stored: Names | None) -> Names | None:
    """What numbers of a split's labels are called: by its own files, or else by the table."""
    column_names = getattr(table.features.get(column), "names", None)
    return stored or (None if column_names is None else tuple(column_names))


def _require_known(own: Names | tuple[()], names: Sequence[str], column: str) -> None:
    known = by_name(own, names)
    if unknown := [name for name in own if name not in known]:
        raise ValueError(
            f"{_KEY}: {column!r} has the class {shown(unknown[0])}; task.label_names has {listed(names)}; "
            "rename it, or map it to one of them"
        )


def _renaming(own: Names | None, names: Sequence[str] | None, column: str) -> Mapping[str, str]:
    """The class of each name that the data gives to a number."""
    if own is None or names is None:
        return {}
    if known := by_name(own, names):
        return known
    if len(own) != len(names):
        raise ValueError(
            f"task.label_names: {column!r} has {len(own)} classes called {listed(own)}, and {len(names)} names are "
            "given, none of which is one of these; give these names, in any order, or one for each of them"
        )
    return dict(zip(own, names, strict=True))


def _plain_values(table: "Dataset", column: str) -> list[Label | None]:
    values = column_values(table, column, _KEY)
    feature = table.features[column]
    if getattr(feature, "dtype", None) in ("float16", "float32"):  # 0.1 as it was written, not as 64 bits continue it
        kind = np.dtype(feature.dtype).type
        values = [None if value is None else float(str(kind(value))) for value in values]
    try:
        return [plain(value) for value in values]
    except TypeError:
        raise ValueError(
            f"{_KEY}: {column!r} must hold numbers or texts, its type is {feature}; name another column"
        ) from None


def _named(values: list[Label | None], own: Names | None, renaming: Mapping[str, str]) -> list[Label | None]:
    """Numbers of a ClassLabel by name; -1 is how the library writes that there is none."""
    if own is None:
        return values
    called: dict[Label | None, Label | None] = {MISSING: None, str(MISSING): None}
    for number, name in enumerate(own):
        # As text, too: where another file of the data set has texts, the library makes texts of this one's numbers.
        called[number] = called[str(number)] = renaming.get(name, name)
    return [called.get(value, value) for value in values]


def _all_whole(values: Sequence[Label | None]) -> bool:
    return all(value is None or (isinstance(value, int) and not isinstance(value, bool)) for value in values)


def _present(values: Sequence[Label | None], column: str, table: "Dataset") -> tuple[Names, tuple[str, ...]]:
    """The classes that labels name themselves, in order, and a note where their numbers leave gaps.

    Raises:
        ValueError: if there are none, or they look like quantities.
    """
    present = {value for value in values if value is not None}
    if not present:
        raise ValueError(
            f"{_KEY}: {column!r} must hold numbers or texts, its type is {table.features[column]}; name another column"
        )
    names = _names_of(present)
    numbers = {name: number_of(name) for name in names}
    if None in numbers.values():
        _require_classes(len(names), len(values), f"{len(names)} distinct texts", column, quantities=False)
        return tuple(sorted(names)), ()
    sorted_names = sorted(names, key=lambda name: (numbers[name], name))
    first, last = sorted_names[0], sorted_names[-1]
    through = {*numbers.values()} == set(range(len(names)))
    said = f"{len(names)} distinct numbers up to {last}"
    _require_classes(len(names), len(values), said, column, quantities=not through)
    whole = [number for name in sorted_names if isinstance(number := numbers[name], int)]
    missing = not through and len(whole) == len(names) and whole[-1] - whole[0] >= len(names)
    note = f"{column!r} has {len(names)} distinct numbers from {first} to {last}, each a class of its own; set "
    return tuple(sorted_names), (f"{note}task.label_names if there are more classes",) if missing else ()


def _names_of(present: set[Label]) -> set[str]:
    """Labels as texts: alike whether a file holds texts or numbers."""
    if any(isinstance(value, str) for value in present):
        texts = {str(value) for value in present}
        whole = [_WHOLE.fullmatch(text) for text in texts]
        # As a program writes whole numbers in a column with empty cells.
        return {match[1] for match in whole if match} if all(whole) else texts
    floating = any(isinstance(value, float) for value in present)
    return {str(float(value) if floating else value) for value in present}


def _require_classes(num_classes: int, num_rows: int, said: str, column: str, *, quantities: bool) -> None:
    few_rows = num_classes > _FEW_CLASSES and num_classes * _ROWS_EACH > num_rows
    if few_rows or (quantities and num_classes > _MOST_OTHER_NUMBERS):
        raise ValueError(
            f"{_KEY}: {column!r} has {said} in {num_rows} rows; set task.label_names, or name another column"
        )


class _Reader:
    """Reads labels as places of classes, and says which can't be."""

    def __init__(self, classes: Classes, column: str, *, given: bool, places: bool) -> None:
        self._classes = classes
        self._column = column
        self._given = given
        self._truth_places = places

    def places(self, values: Sequence[Label | None], split: str) -> Rows:
        """The class of each row, `MISSING` where it has none; each distinct label is looked up once."""
        known: dict[Label | None, int] = {None: MISSING}
        rows = np.empty(len(values), np.int64)
        for row, value in enumerate(values):
            if value not in known:
                assert value is not None
                known[value] = self._place(value, row, split)
            rows[row] = known[value]
        return rows

    def _place(self, value: Label, row: int, split: str) -> int:
        try:
            place = self._classes.place(value, places=self._truth_places)
        except AmbiguousLabelError as error:
            raise ValueError(f"{_KEY}: {self._column!r} has {shown(value)}, {error}") from None
        if place is not None:
            return place
        if isinstance(value, bool):
            raise ValueError(
                f"{_KEY}: {self._column!r} has the truth value {value}; task.label_names has "
                f"{listed(self._classes.names)}; store these names, or numbers from 0 in this order"
            )
        remedy = (
            "correct the row, add the class to task.label_names, or name another column or split"
            if self._given
            else "set task.label_names, or name another column or split"
        )
        raise ValueError(
            f"{_KEY}: {self._column!r} has {shown(value)} in row {row} of split {split!r}; "
            f"labels must be {self._classes.allowed()}; {remedy}"
        )
