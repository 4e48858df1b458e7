"""A table with two splits, divided among clients: the rows that can be used, and who has which."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from torch import Tensor, float32, tensor

from fedkd_flwr.core.protocols import DataElsewhereError, DataReport
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.tasks.data_notes import class_notes
from fedkd_flwr.tasks.labels import Labels
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
    origin,
    partition_indices,
    require_client,
)
from fedkd_flwr.tasks.source import DataSource, Reading, RowNames, column_values

if TYPE_CHECKING:
    from datasets import Dataset

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


def left_out(
    split: str, reasons: Mapping[str, Rows], num_rows: int, names: RowNames | None = None
) -> tuple[Rows, tuple[str, ...]]:
    """Rows of a split that can be used, and notes on its files and on those that can't.

    Args:
        split: its name.
        reasons: why rows can't be used, from a verb in the plural on ("have no label"), each with a mask of [rows]; a
            row counts under its first reason.
        num_rows: of the split.
        names: what its rows are called, and notes on its files; None numbers them.

    Raises:
        ValueError: if no row is left.
    """
    unusable = np.zeros(num_rows, bool)
    counted = []
    for reason, mask in reasons.items():
        new = mask & ~unusable
        if new.any():
            first = int(np.flatnonzero(new)[0])
            where = f"row {first}" if names is None else names(first)
            counted.append(f"{agreeing(int(new.sum()), reason)} (the first is {where})")
        unusable |= mask
    if unusable.all():
        raise ValueError(f"task.data: no row of split {split!r} can be used: {', '.join(counted) or 'it is empty'}")
    kept = np.flatnonzero(~unusable)
    number = int(unusable.sum())
    note = f"split {split!r}: {number} of {num_rows} rows {verb(number, 'are')} left out: {', '.join(counted)}"
    return kept, (*(names.notes if names is not None else ()), *((note,) if counted else ()))


def verb(number: int, plural: str) -> str:
    """A verb as it goes with a number of things."""
    irregular = {"are": "is", "have": "has", "reach": "reaches"}
    return plural if number != 1 else irregular.get(plural, f"{plural}s")


def agreeing(number: int, predicate: str) -> str:
    """A number of things with what they do: "2 have no label", "1 has no label"."""
    first, _, rest = predicate.partition(" ")
    return f"{number} {verb(number, first)} {rest}"


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
        notes: what is odd about who has which, one line each.

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
        self._usable_test = usable[1]
        self._splits = (str(tables[0].split), str(tables[1].split))
        self._fraction = test_fraction
        self._elsewhere = isinstance(partition, OwnPartition)
        self._divided = not isinstance(partition, OwnPartition | WholePartition)
        self._groups: list[Any] | None = None
        self.notes: tuple[str, ...] = ()
        drawn = derive_seed(seed, "partition")
        if isinstance(partition, OwnPartition):
            self.train = self._test = [_NO_ROWS] * num_clients
        elif isinstance(partition, WholePartition):
            # For whichever number the node has: that decides about its teacher.
            self.train = [usable[0]] * num_clients
            self._test = [_NO_ROWS if tables[0] is tables[1] else usable[1]] * num_clients
            if (name := partition.group_column) in tables[0].column_names:
                self._groups = _origins_of(tables[0], str(name))
        elif isinstance(partition, NaturalPartition):
            of_train, of_test = _origins(tables, partition.column)
            mine, theirs = [of_train[row] for row in usable[0]], [of_test[row] for row in usable[1]] if of_test else []
            names = RowNames(tables[0])
            rows, test_rows = natural_indices(
                mine, theirs, partition, num_clients, drawn, lambda place: names(int(usable[0][place]))
            )
            self.train, self._test = _taken(usable[0], rows), _taken(usable[1], test_rows)
            self._groups = of_train if partition.grouped else None
            nobodys = len(theirs) - sum(map(len, test_rows))
            if nobodys and not partition.grouped:  # documents of two splits are rightly others
                self.notes = (
                    f"split {self._splits[1]!r}: {nobodys} of {len(theirs)} rows {verb(nobodys, 'have')} a value of "
                    f"{partition.column!r} that no training row has, so no client scores on them, the server does",
                )
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

    def learned(self, rows_of: Callable[[int], tuple[Rows, Rows]]) -> list[Rows]:
        """Rows that each client learns from, without those that it keeps to score on.

        A node's own data stands for every client, of which none is drawn: all of it is given for each, the same object.

        Args:
            rows_of: gives rows that a client learns from and rows that it scores on: `of`, or what a task makes of it.
        """
        return [rows_of(client)[0] for client in range(len(self))] if self._divided else self.train

    def report(
        self,
        labels: Labels,
        notes: Sequence[str],
        remedy: str = "task.class_weights",
        rows_of: Callable[[int], tuple[Rows, Rows]] | None = None,
    ) -> DataReport:
        """How the labels that clients learn from lie among them, and what is odd about the rows; see `DataReport`.

        Args:
            labels: of the table.
            notes: on its rows, which come first.
            remedy: the options to look at where one class has nearly all rows.
            rows_of: see `learned`.
        """
        learned = self.learned(rows_of or self.of)
        # A node's own data stands for each client: it is counted once.
        distinct = {id(rows): rows for rows in learned}
        of_each = label_counts(labels.train, [rows.tolist() for rows in distinct.values()], len(labels.names))
        counted = dict(zip(distinct, of_each, strict=True))
        counts = tuple(counted[id(rows)] for rows in learned)
        if not self._elsewhere:
            mine = np.concatenate(list({id(rows): rows for rows in self.train}.values()))
            of_classes = class_notes(labels, (mine, self._usable_test), self._splits, remedy)
            notes = (*labels.notes, *notes, *self.notes, *of_classes, *client_notes(counts))
        return DataReport(labels.names, counts, tuple(notes), of_all=self._divided)


def _origins(tables: "tuple[Dataset, Dataset]", column: str) -> tuple[list[Any], list[Any]]:
    """A natural partition's column in both splits; the second is empty where the test split has no such column."""
    of_train = _origins_of(tables[0], column)
    return of_train, _origins_of(tables[1], column) if column in tables[1].column_names else []


def _origins_of(table: "Dataset", column: str) -> list[Any]:
    """What each row says of its origin, None where it says nothing."""
    values = map(origin, column_values(table, column, "task.partition.column"))
    if (names := getattr(table.features[column], "names", None)) is None:
        return list(values)
    reading = Reading.of(table)
    own = None if reading is None else reading.classes.get(str(table.split).partition("[")[0], {}).get(column)
    if own == []:
        raise ValueError(
            f"task.partition.column: files of split {str(table.split)!r} number the names of {column!r} differently; "
            "write all of them with the same names in the same order"
        )
    # By the first file's numbers; what it does not name comes after. A number below 0 stands for none.
    places = {
        place: names.index(name) if name in names else len(names) + place for place, name in enumerate(own or names)
    }
    return [None if value is None else places.get(value) for value in values]


def _taken(rows: Rows, places: Sequence[Sequence[int]]) -> list[Rows]:
    """Of some rows, those at each client's places."""
    return [rows[np.array(of_client, np.int64)] for of_client in places]
