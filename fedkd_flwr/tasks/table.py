"""A table with two splits, divided among clients: its classes, the rows that can be used, and who has which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from torch import Tensor, float32, tensor

from fedkd_flwr.core.protocols import DataElsewhereError, DataReport
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.tasks.partition import (
    AnyPartition,
    NaturalPartition,
    OwnPartition,
    Rows,
    WholePartition,
    client_notes,
    hold_out,
    hold_out_groups,
    label_counts,
    natural_indices,
    partition_indices,
    require_client,
)
from fedkd_flwr.tasks.source import DataSource, column_values

if TYPE_CHECKING:
    from datasets import Dataset

MISSING = -1  # in the place of a label that a row does not have

_NAMED_CLASSES = 5  # in a note about more
_NO_ROWS = np.zeros(0, np.int64)


def _checked_weights(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Weights of classes, or one error: the library's own would have a line for each kind of value that is allowed."""
    allowed = "must be 'balanced', null, or one number >= 0 for each class, at least one of them > 0"
    try:
        weights = check(value)
    except ValidationError as error:
        raise ValueError(f"{allowed}, got {error.errors()[-1]['input']!r}") from None
    if isinstance(weights, tuple) and not any(weights):
        raise ValueError(f"{allowed}, got {'0 for all' if weights else 'an empty list'}")
    return weights


ClassWeights = Annotated[
    Literal["balanced"] | tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None,
    WrapValidator(_checked_weights),
]


@dataclass(frozen=True, slots=True)
class Labels:
    """The classes of a table, and the class of each row of both splits, `MISSING` where a row has none."""

    names: tuple[str, ...]
    train: Rows
    test: Rows


def read_labels(
    train: "Dataset", test: "Dataset", column: str, names: Sequence[str] | None, *, renamed: bool = True
) -> Labels:
    """The label of each row, from a column of whole numbers, of texts, or of the library's ClassLabel.

    Where names are numbers, as those of grades are, a whole number is the class of that name, so that it makes no
    difference whether a file holds text or numbers; else it is a class's place in the order, from 0. A truth value is
    the class called true or false, if there is one, else 1 or 0.

    Args:
        train: the training split.
        test: the test split.
        column: holds the labels.
        names: of the classes, in order; None takes those that the table names, or that the training split has. The
            names of a ClassLabel may be put into another order; other names take the place of its own, one by one.
        renamed: whether they may. Where a node brings its data, its names must be among them instead, truth values
            included.

    Raises:
        ValueError: if the column is something else, or a label is none of the classes.
    """
    of_train, of_test = (
        [_whole(value) for value in column_values(table, column, "task.data.columns.label")] for table in (train, test)
    )
    classes = tuple(names) if names is not None else _classes(train.features[column], of_train, column)
    if len(classes) < 2:
        raise ValueError(f"task.data.columns.label: {column!r} has one class only; name another column")
    if twice := [name for name in classes if classes.count(name) > 1]:
        raise ValueError(f"task.label_names: names {twice[0]!r} twice; give each class a name of its own")
    own = getattr(train.features[column], "names", None)
    if own is not None and not renamed and (unknown := sorted(set(own) - set(classes))):
        raise ValueError(
            f"task.data.columns.label: {column!r} has the class {unknown[0]!r}; task.label_names has "
            f"{', '.join(classes)}; rename it, or map it to one of them"
        )
    if own is not None and tuple(own) != classes and (set(own) == set(classes) or not renamed):
        of_train, of_test = ([_named(value, own) for value in values] for values in (of_train, of_test))
    if own is None:
        of_train, of_test = (_by_name(values, classes, column, renamed) for values in (of_train, of_test))
    of_both = ((of_train, train), (of_test, test))
    return Labels(classes, *(_indices(values, classes, column, str(table.split)) for values, table in of_both))


def _whole(value: Any) -> Any:
    """A label as it was before a table with empty cells made floating-point numbers of whole ones."""
    if not isinstance(value, float):
        return value
    return None if isnan(value) else int(value) if value.is_integer() else value


def _named(value: Any, names: Sequence[str]) -> Any:
    """A number of a ClassLabel by its name; what is none of them stays, and is refused later."""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _by_name(values: Sequence[Any], classes: Sequence[str], column: str, renamed: bool) -> list[Any]:
    """Numbers and truth values by the names that they have among the classes; all else, and other numbers, as it is."""
    numbers = {name for place, name in enumerate(classes) if name.isdecimal() and name != str(place)}
    truths = {name.casefold(): name for name in classes}
    all_numbers = all(name.isdecimal() for name in classes)
    named = []
    for value in values:
        if isinstance(value, bool):
            if str(value).casefold() not in truths and not renamed:
                raise ValueError(
                    f"task.data.columns.label: {column!r} has the truth value {value}; task.label_names has "
                    f"{', '.join(classes)}; store these names, or numbers from 0 in this order"
                )
            named.append(truths.get(str(value).casefold(), int(value)))
        elif isinstance(value, int) and numbers:
            if not all_numbers and str(value) in numbers:
                raise ValueError(
                    f"task.data.columns.label: {column!r} has {value}, which may be the class called {value} or the "
                    f"class in place {value} of {', '.join(classes)}; name all classes by numbers, or none"
                )
            named.append(str(value) if all_numbers else value)
        else:
            named.append(value)
    return named


def _classes(feature: Any, values: Sequence[Any], column: str) -> tuple[str, ...]:
    if (named := getattr(feature, "names", None)) is not None:
        return tuple(named)
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, str) for value in present):
        return tuple(sorted(set(present)))
    if not present or not all(isinstance(value, int) for value in present):
        raise ValueError(
            f"task.data.columns.label: {column!r} must hold whole numbers from 0, or texts, its type is {feature}; "
            "name another column"
        )
    return tuple(str(label) for label in range(int(max(present)) + 1))


def _indices(values: Sequence[Any], classes: tuple[str, ...], column: str, split: str) -> Rows:
    numbers: dict[Any, int] = {name: label for label, name in enumerate(classes)}
    indices = np.empty(len(values), np.int64)
    for row, value in enumerate(values):
        label = MISSING if value is None else numbers.get(value, value) if isinstance(value, str) else value
        if value is not None and not (isinstance(label, int) and 0 <= label < len(classes)):
            known = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
            raise ValueError(
                f"task.data.columns.label: {column!r} has {value!r} in row {row} of split {split!r}; "
                f"labels must be 0 to {len(classes) - 1} or one of {known}; "
                "set task.label_names, or name another column or split"
            )
        indices[row] = label
    return indices


def class_weights(chosen: ClassWeights, labels: Rows, num_classes: int) -> Tensor | None:
    """How much each class counts in the task loss: [classes], or None where all count alike.

    "balanced" is num_labels / (num_classes * count of the class) over the training split, so that every class has the
    same weight in all; a class without examples counts 1.

    Raises:
        ValueError: if there are not as many weights as classes.
    """
    if chosen is None:
        return None
    if chosen == "balanced":
        counts = np.bincount(labels[labels >= 0], minlength=num_classes)
        balanced = counts.sum() / (num_classes * np.maximum(counts, 1))
        return tensor(np.where(counts > 0, balanced, 1.0), dtype=float32)
    if len(chosen) != num_classes:
        raise ValueError(f"task.class_weights must be {num_classes} numbers, one for each class, got {len(chosen)}")
    return tensor(chosen, dtype=float32)


def left_out(split: str, reasons: Mapping[str, Rows], num_rows: int) -> tuple[Rows, tuple[str, ...]]:
    """Rows of a split that can be used, and a note on those that can't.

    Args:
        split: its name.
        reasons: why rows can't be used, each with a mask of [rows]; a row counts under its first reason.
        num_rows: of the split.

    Raises:
        ValueError: if no row is left.
    """
    unusable = np.zeros(num_rows, bool)
    counted = []
    for reason, mask in reasons.items():
        new = mask & ~unusable
        if new.any():
            counted.append(f"{int(new.sum())} {reason} (the first is row {int(np.flatnonzero(new)[0])})")
        unusable |= mask
    if unusable.all():
        raise ValueError(f"task.data: no row of split {split!r} can be used: {', '.join(counted) or 'it is empty'}")
    kept = np.flatnonzero(~unusable)
    note = f"split {split!r}: {int(unusable.sum())} of {num_rows} rows are left out: {', '.join(counted)}"
    return kept, (note,) if counted else ()


def load_tables(data: DataSource, partition: AnyPartition) -> "tuple[Dataset, Dataset]":
    """Training and test split, as far as they are where this runs.

    Of data that is a node's own the training split stands for a test split that the node does not have. A server whose
    clients bring theirs has a test split alone, which stands for both.

    Raises:
        ValueError: see `DataSource.load`.
    """
    if isinstance(partition, OwnPartition):
        test = data.load_test()
        return test, test
    if isinstance(partition, WholePartition):
        train, own_test = data.load_train()
        return train, train if own_test is None else own_test
    return data.load()


class ClientRows:
    """Which rows each client learns from and which it scores on.

    Args:
        tables: training and test split.
        usable: rows of each that can be used.
        labels: of the training split's rows, for partitions by label.
        partition: how to divide.
        num_clients: among how many.
        seed: of the experiment.
        test_fraction: share of its training rows that a client scores on, unless a natural partition gives it rows of
            the test split.

    Attributes:
        train: rows of the training split that each client has, before some are held out.

    Raises:
        ValueError: if the rows can't be divided so.
    """

    def __init__(
        self,
        tables: "tuple[Dataset, Dataset]",
        usable: tuple[Rows, Rows],
        labels: Rows,
        partition: AnyPartition,
        num_clients: int,
        seed: int,
        test_fraction: float,
    ) -> None:
        self._seed = seed
        self._fraction = test_fraction
        self._elsewhere = isinstance(partition, OwnPartition)
        self._divided = not isinstance(partition, OwnPartition | WholePartition)
        self._groups: list[Any] | None = None
        drawn = derive_seed(seed, "partition")
        if isinstance(partition, OwnPartition):
            self.train = self._test = [_NO_ROWS] * num_clients
        elif isinstance(partition, WholePartition):
            # For whichever number the node has: that decides about its teacher.
            self.train = [usable[0]] * num_clients
            self._test = [_NO_ROWS if tables[0] is tables[1] else usable[1]] * num_clients
            if (name := partition.group_column) in tables[0].column_names:
                self._groups = column_values(tables[0], str(name), "task.partition.column")
        elif isinstance(partition, NaturalPartition):
            of_train, of_test = _origins(tables, partition.column)
            mine, theirs = [of_train[row] for row in usable[0]], [of_test[row] for row in usable[1]] if of_test else []
            rows, test_rows = natural_indices(mine, theirs, partition, num_clients, drawn)
            self.train, self._test = _taken(usable[0], rows), _taken(usable[1], test_rows)
            self._groups = of_train if partition.grouped else None
        else:
            of_clients = partition_indices(labels[usable[0]].tolist(), partition, num_clients, drawn)
            self.train, self._test = _taken(usable[0], of_clients), [_NO_ROWS] * num_clients
        for client in range(0 if self._elsewhere else num_clients):
            if len(self.train[client]) < 2 and not len(self._test[client]):
                raise ValueError(
                    f"task.partition: client {client} has one training example and none in the test split, "
                    "which leaves it nothing to score on; use another partition or remove the row"
                )

    def __len__(self) -> int:
        """Number of clients."""
        return len(self.train)

    def of(self, client: int) -> tuple[Rows, Rows]:
        """Rows of the training split that a client learns from, and rows that it scores on.

        The second are of the training split too, unless `scores_on_test`.

        Raises:
            DataElsewhereError: if its data is on a node of its own.
            ValueError: if there is no such client.
        """
        require_client(client, len(self))
        if self._elsewhere:
            raise DataElsewhereError(
                "task.partition: own leaves the data to the nodes, and there is none here; "
                "give nodes a data-path, or choose another partition to simulate them"
            )
        if self.scores_on_test(client):
            return self.train[client], self._test[client]
        seed = derive_seed(self._seed, "client split", client)
        if self._groups is not None:
            groups = [self._groups[row] for row in self.train[client]]
        if self._groups is not None and len(set(groups)) > 1:  # of a single document, some rows are held out
            return hold_out_groups(self.train[client], groups, self._fraction, seed)
        return hold_out(self.train[client], self._fraction, seed)

    def scores_on_test(self, client: int) -> bool:
        """Whether a client's own test rows are of the test split."""
        return bool(len(self._test[client]))

    def report(self, labels: Labels, notes: Sequence[str]) -> DataReport:
        """How the labels of the training split lie among the clients, and which classes lack any; see `DataReport`."""
        # A node's own data stands for each client: it is counted once.
        distinct = {id(rows): rows for rows in self.train}
        of_each = label_counts(labels.train, [rows.tolist() for rows in distinct.values()], len(labels.names))
        counted = dict(zip(distinct, of_each, strict=True))
        counts = tuple(counted[id(rows)] for rows in self.train)
        if not self._elsewhere:
            notes = (*notes, *_class_notes(labels.names, counts), *client_notes(counts))
        return DataReport(labels.names, counts, tuple(notes), of_all=self._divided)


def _origins(tables: "tuple[Dataset, Dataset]", column: str) -> tuple[list[Any], list[Any]]:
    """A natural partition's column in both splits; the second is empty where the test split has no such column."""
    of_train = column_values(tables[0], column, "task.partition.column")
    has = column in tables[1].column_names
    return of_train, column_values(tables[1], column, "task.partition.column") if has else []


def _taken(rows: Rows, places: Sequence[Sequence[int]]) -> list[Rows]:
    """Of some rows, those at each client's places."""
    return [rows[np.array(of_client, np.int64)] for of_client in places]


def _class_notes(names: Sequence[str], counts: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Which classes nobody can learn, in one line; empty where there is none.

    Args:
        names: of the classes.
        counts: labels of each class of each client.
    """
    empty = [repr(name) for name, of_class in zip(names, zip(*counts, strict=True), strict=True) if not any(of_class)]
    if not empty:
        return ()
    more = f" and {len(empty) - _NAMED_CLASSES} more" if len(empty) > _NAMED_CLASSES else ""
    who = f"class {empty[0]} has" if len(empty) == 1 else f"classes {', '.join(empty[:_NAMED_CLASSES])}{more} have"
    return (f"{who} no training examples",)
