"""Dividing one data set among clients: drawn by the partitioners of flwr-datasets, or as a column says."""

import heapq
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from itertools import chain
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from fedkd_flwr.core.protocols import CommonAnswer, DataReport
from fedkd_flwr.tasks.rare_labels import RareLabelsPartition, with_rare_labels

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

FEWEST_EXAMPLES = 2  # of a client: one to learn from, one to score on

_NAMED_CLIENTS = 5  # in a note about more


class IidPartition(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Equal shares, drawn at random."""

    name: Literal["iid"] = "iid"


class DirichletPartition(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Label skew: each client's share of each label is drawn from Dirichlet(alpha); smaller alpha, more skew."""

    name: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(0.5, gt=0)
    min_examples: int = Field(
        10, ge=FEWEST_EXAMPLES, description="a draw that leaves a client with fewer is drawn again"
    )


class PathologicalPartition(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Label skew: each client has a few classes only, and those who have a class have equal shares of it."""

    name: Literal["pathological"] = "pathological"
    classes_per_client: int = Field(2, ge=1)


class SizePartition(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Size skew: the n-th client's share is as n, n squared or exp(n), its rows drawn at random."""

    name: Literal["size"] = "size"
    growth: Literal["linear", "square", "exponential"] = "linear"


class NaturalPartition(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Clients as the data has them.

    Attributes:
        column: tells rows of one origin (a user, a document) from those of others.
        grouped: false makes each distinct value a client, in sorted order; true deals the values out whole to any
            number of clients, drawn by the seed, so that they have nearly as many examples each.
    """

    name: Literal["natural"] = "natural"
    column: str = Field(min_length=1)
    grouped: bool = False


class OwnPartition(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Nothing to divide: every node brings its data (`data-path` of its configuration), the server has a test split."""

    name: Literal["own"] = "own"


class WholePartition(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """All rows for whichever client: what a node makes of data that is its own. No experiment names it.

    Attributes:
        group_column: rows with one value in it stay together when some are held out; null where the experiment groups
            none, or its partition does without.
    """

    name: Literal["whole"] = "whole"
    group_column: str | None = None


Rows = np.ndarray[Any, np.dtype[np.int64]]
Partition = Annotated[
    IidPartition | DirichletPartition | PathologicalPartition | SizePartition | RareLabelsPartition,
    Field(discriminator="name"),
]
TablePartition = Annotated[
    IidPartition
    | DirichletPartition
    | PathologicalPartition
    | SizePartition
    | RareLabelsPartition
    | NaturalPartition
    | OwnPartition,
    Field(discriminator="name"),
]
AnyPartition = TablePartition | WholePartition


def partition_indices(labels: Sequence[int], partition: Partition, num_clients: int, seed: int) -> list[list[int]]:
    """Rows of each client: disjoint, together all rows but those that the partition leaves out, at least two each.

    The same for the same seed.

    Args:
        labels: the label of each row.
        partition: how to divide.
        num_clients: at least 1.
        seed: any integer; partitioners take its low 32 bits.

    Raises:
        ValueError: if there are fewer rows than the clients need, or the data can't be divided so.
    """
    needed = num_clients * (partition.min_examples if isinstance(partition, DirichletPartition) else FEWEST_EXAMPLES)
    if needed > len(labels):
        or_less = " or task.partition.min_examples" if isinstance(partition, DirichletPartition) else ""
        raise ValueError(
            f"num_clients: {num_clients} clients need at least {needed} training examples, the data has {len(labels)}; "
            f"lower num_clients{or_less}"
        )
    # Imported here: it takes seconds, and a node with data of its own divides nothing.
    from datasets import Dataset

    # A shuffle first: some partitioners take rows as they come.
    drawn = np.random.default_rng(seed)
    order = drawn.permutation(len(labels))
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    if isinstance(partition, PathologicalPartition):
        _require_every_class_used(partition, num_clients, len(classes))
        codes = drawn.permutation(len(classes))[codes]  # which classes go together is the seed's choice too
    partitioner = _partitioner(partition, num_clients, len(classes), seed % 2**32)
    partitioner.dataset = Dataset.from_dict({"row": order, "label": codes[order]})
    refusal = f"task.partition{_refusal(partition, num_clients, np.bincount(codes))}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each draw that was not good enough
            # [:] first: a column on its own is read value by value.
            parts = [partitioner.load_partition(part)[:]["row"] for part in range(partitioner.num_partitions)]
    except ValueError as error:
        raise ValueError(refusal) from error
    per_client = len(parts) // num_clients
    clients = [sorted(chain.from_iterable(parts[i : i + per_client])) for i in range(0, len(parts), per_client)]
    if isinstance(partition, RareLabelsPartition):
        clients = with_rare_labels(clients, codes, partition, drawn)
    if min(map(len, clients)) < FEWEST_EXAMPLES:
        raise ValueError(refusal)
    return clients


def _partitioner(partition: Partition, num_clients: int, num_classes: int, seed: int) -> "Partitioner":
    """What draws: one part for each client, or several for each, which follow one another and are to be joined."""
    from flwr_datasets import partitioner as of_flower

    if isinstance(partition, IidPartition | RareLabelsPartition):
        return of_flower.IidPartitioner(num_partitions=num_clients)
    if isinstance(partition, SizePartition):
        growths = {
            "linear": of_flower.LinearPartitioner,
            "square": of_flower.SquarePartitioner,
            "exponential": of_flower.ExponentialPartitioner,
        }
        return growths[partition.growth](num_partitions=num_clients)
    if isinstance(partition, PathologicalPartition):
        # Client n has classes n, n + 1, .., so that clients overlap in part. Where so few clients would not reach the
        # last class, they are dealt the classes one by one instead, which reaches as many as can be reached.
        num_parts, in_each = num_clients, partition.classes_per_client
        if num_parts + in_each - 1 < num_classes:
            num_parts, in_each = num_parts * in_each, 1
        return of_flower.PathologicalPartitioner(
            num_partitions=num_parts,
            partition_by="label",
            num_classes_per_partition=in_each,
            class_assignment_mode="deterministic",
            shuffle=False,
        )
    return of_flower.DirichletPartitioner(
        num_partitions=num_clients,
        partition_by="label",
        alpha=partition.alpha,
        min_partition_size=partition.min_examples,
        self_balancing=False,
        shuffle=True,
        seed=seed,
    )


def _require_every_class_used(partition: PathologicalPartition, num_clients: int, num_classes: int) -> None:
    per_client, key = partition.classes_per_client, "task.partition.classes_per_client"
    if per_client > num_classes:
        raise ValueError(f"{key}: must be at most {num_classes}, the classes of the training data, got {per_client}")
    if (unused := num_classes - num_clients * per_client) > 0:
        raise ValueError(
            f"{key}: {num_clients} clients of {per_client} would leave {unused} of {num_classes} classes to nobody, "
            f"and their examples unused; raise it to {-(-num_classes // num_clients)} or num_clients to "
            f"{-(-num_classes // per_client)} at least"
        )


def _refusal(partition: Partition, num_clients: int, examples_by_class: Rows) -> str:
    """What to say where clients can't have enough examples, from the key on."""
    if isinstance(partition, PathologicalPartition):
        return (
            f".classes_per_client: {num_clients} clients of {partition.classes_per_client} cut the "
            f"{len(examples_by_class)} classes into more parts than they have examples for, the smallest has "
            f"{examples_by_class.min()}; lower num_clients or classes_per_client"
        )
    if isinstance(partition, SizePartition):
        slower = "" if partition.growth == "linear" else ", or let them grow more slowly"
        return (
            f".growth: {partition.growth} shares of {examples_by_class.sum()} training examples leave some of "
            f"{num_clients} clients fewer than {FEWEST_EXAMPLES}; lower num_clients{slower}"
        )
    return (
        f": no Dirichlet draw gave each of {num_clients} clients enough examples; "
        "raise alpha, or lower num_clients or min_examples"
    )


def origin(value: Any) -> Any:
    """A value of a natural partition's column; None where it says nothing: no number, no end of numbers, blanks."""
    if isinstance(value, str):
        return value if value.strip() else None
    return None if isinstance(value, float | Decimal) and not isfinite(value) else value


def natural_indices(
    train: Sequence[Any],
    test: Sequence[Any],
    partition: NaturalPartition,
    num_clients: int,
    seed: int,
    names: Callable[[int], str] = "row {}".format,
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of each client in the training split and in the test split.

    Args:
        train: the column's value in each row of the training split.
        test: the same of the test split, empty where that has no such column. Rows with a value that no row of the
            training split has are nobody's.
        partition: names the column, and says whether its values are the clients or are grouped.
        num_clients: as many as there are values, or at most that where they are grouped.
        seed: any integer; it decides which values are grouped.
        names: what a row of `train` is called in an error.

    Raises:
        ValueError: if a row of the training split has no value, the data has another number of clients or too few
            values, or they can't be put in order.
    """
    if empty := [row for row, value in enumerate(train) if origin(value) is None]:
        raise ValueError(
            f"task.partition.column: {partition.column!r} names no origin in {len(empty)} of {len(train)} rows (the "
            f"first is {names(empty[0])}); it must hold a number or a text in every row: fill it, or remove these rows"
        )
    try:
        values = sorted(set(train))
    except TypeError:
        raise ValueError(
            f"task.partition.column: {partition.column!r} must hold a number in every row, or a text in every row"
        ) from None
    if partition.grouped:
        if len(values) < num_clients:
            raise ValueError(
                f"num_clients: must be at most {len(values)}, the number of distinct values of column "
                f"{partition.column!r}, got {num_clients}"
            )
        clients = _grouped(values, Counter(train), num_clients, seed)
    else:
        if len(values) != num_clients:
            raise ValueError(
                f"num_clients: must be {len(values)}, the number of distinct values of column {partition.column!r}, "
                f"got {num_clients}"
            )
        clients = {value: client for client, value in enumerate(values)}
    return _rows_by_client(train, clients, num_clients), _rows_by_client(test, clients, num_clients)


def _grouped(values: list[Any], num_rows: Counter[Any], num_clients: int, seed: int) -> dict[Any, int]:
    """The client of each value: large values first, each to a client that has the fewest rows yet."""
    drawn = np.random.default_rng(seed)
    # Largest first to within a factor of two only: sizes that all differ would leave nothing to the seed.
    shuffled = sorted(drawn.permutation(len(values)).tolist(), key=lambda i: -num_rows[values[i]].bit_length())
    loads = [(0, int(tie_break), client) for client, tie_break in enumerate(drawn.permutation(num_clients))]
    heapq.heapify(loads)
    clients = {}
    for index in shuffled:
        load, tie_break, client = loads[0]
        clients[values[index]] = client
        heapq.heapreplace(loads, (load + num_rows[values[index]], tie_break, client))
    return clients


def _rows_by_client(values: Sequence[Any], clients: dict[Any, int], num_clients: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(num_clients)]
    for row, value in enumerate(values):
        if value in clients:
            rows[clients[value]].append(row)
    return rows


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """A client's rows as those it learns from and those it scores on, drawn by `seed`.

    Neither is empty where there are two rows or more; a single row is to learn from.
    """
    num_test = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    shuffled = np.random.default_rng(seed).permutation(rows)
    return shuffled[num_test:], shuffled[:num_test]


def hold_out_groups(rows: Rows, groups: Sequence[Any], fraction: float, seed: int) -> tuple[Rows, Rows]:
    """As `hold_out`, but rows of one group (a document) stay together, so that none lies on both sides.

    Args:
        rows: of one client.
        groups: the group of each of these rows.
        fraction: of the rows to hold out; as many groups are drawn as fit in it, or else the smallest.
        seed: decides which groups.

    Returns:
        Rows to learn from and rows to score on, in their order here. Neither is empty where there are two groups or
        more; a single group is to learn from.
    """
    sizes = Counter(groups)
    if len(sizes) < 2:
        return rows, rows[:0]
    # Counter keeps the order of first appearance, which the same rows always have.
    names = list(sizes)
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    left = min(round(len(rows) * fraction), len(rows) - 1)
    held_out = set()
    for name in shuffled:
        if sizes[name] <= left:
            held_out.add(name)
            left -= sizes[name]
    held_out = held_out or {min(shuffled, key=sizes.__getitem__)}
    to_score = np.array([group in held_out for group in groups])
    return rows[~to_score], rows[to_score]


def label_counts(
    labels: Sequence[int] | Rows, rows_by_client: Sequence[Sequence[int] | Rows], num_classes: int
) -> tuple[tuple[int, ...], ...]:
    """How many labels of each class each client has.

    Args:
        labels: the label of each row, in [0, num_classes).
        rows_by_client: of each client.
        num_classes: length of each client's counts.
    """
    of_row = np.asarray(labels, np.int64)
    counts = (np.bincount(of_row[np.asarray(rows, np.int64)], minlength=num_classes) for rows in rows_by_client)
    return tuple(tuple(int(count) for count in mine) for mine in counts)


def client_notes(counts: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """What makes some clients hard to learn from, one line for each reason, empty where there is none.

    Args:
        counts: labels of each class of each client; see `label_counts`.
    """
    of_one_class = [client for client, mine in enumerate(counts) if sum(count > 0 for count in mine) == 1]
    if not of_one_class or len(counts[0]) < 2:
        return ()
    named = ", ".join(map(str, of_one_class[:_NAMED_CLIENTS]))
    more = f" and {len(of_one_class) - _NAMED_CLIENTS} more" if len(of_one_class) > _NAMED_CLIENTS else ""
    who = f"client {named} has" if len(of_one_class) == 1 else f"clients {named}{more} have"
    return (f"{who} training examples of one class only ({len(of_one_class)} of {len(counts)} clients)",)


def largest_class(report: DataReport) -> CommonAnswer | None:
    """The class that most training labels have; None where the counts are not of all, or there is but one class."""
    totals = [sum(of_class) for of_class in zip(*report.label_counts, strict=True)]
    if not report.of_all or len(totals) < 2 or not any(totals):
        return None
    label = totals.index(max(totals))
    return CommonAnswer(label, report.label_names[label], totals[label] / sum(totals), len(totals))


def require_client(partition_id: int, num_clients: int) -> None:
    """Check a partition's number.

    Raises:
        ValueError: if there is no such client.
    """
    if not 0 <= partition_id < num_clients:
        raise ValueError(f"partition-id must be in [0, {num_clients - 1}], got {partition_id}")
