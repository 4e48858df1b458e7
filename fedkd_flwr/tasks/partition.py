"""Dividing one data set among clients: drawn by the partitioners of flwr-datasets, or as a column says."""

import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner
from pydantic import BaseModel, Field


class IidPartition(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Equal shares, drawn at random."""

    name: Literal["iid"] = "iid"


class DirichletPartition(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Label skew: each client's share of each label is drawn from Dirichlet(alpha); smaller alpha, more skew."""

    name: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(0.5, gt=0)
    min_examples: int = Field(10, ge=2, description="a draw that leaves a client with fewer is drawn again")


class NaturalPartition(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Clients as the data has them: each distinct value of a column is one, in sorted order."""

    name: Literal["natural"] = "natural"
    column: str = Field(min_length=1)


Rows = np.ndarray[Any, np.dtype[np.int64]]
Partition = Annotated[IidPartition | DirichletPartition, Field(discriminator="name")]
TablePartition = Annotated[IidPartition | DirichletPartition | NaturalPartition, Field(discriminator="name")]


def partition_indices(labels: list[int], partition: Partition, num_clients: int, seed: int) -> list[list[int]]:
    """Rows of each client: disjoint, together all rows, the same for the same seed.

    Args:
        labels: the label of each row.
        partition: how to divide.
        num_clients: at least 1.
        seed: any integer; partitioners take its low 32 bits.

    Raises:
        ValueError: if there are fewer rows than the clients need, or no draw gave every client enough.
    """
    needed = num_clients * (partition.min_examples if isinstance(partition, DirichletPartition) else 2)
    if needed > len(labels):
        or_less = " or task.partition.min_examples" if isinstance(partition, DirichletPartition) else ""
        raise ValueError(
            f"num_clients: {num_clients} clients need at least {needed} training examples, the data has {len(labels)}; "
            f"lower num_clients{or_less}"
        )
    # A shuffle first: IidPartitioner takes every n-th row as it comes.
    order = np.random.default_rng(seed).permutation(len(labels))
    rows = Dataset.from_dict({"row": order.tolist(), "label": [labels[row] for row in order]})
    partitioner = _partitioner(partition, num_clients, seed % 2**32)
    partitioner.dataset = rows
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each draw that was not good enough
            # [:] first: a column on its own is read value by value.
            return [sorted(partitioner.load_partition(client)[:]["row"]) for client in range(num_clients)]
    except ValueError as error:
        raise ValueError(
            f"task.partition: no Dirichlet draw gave each of {num_clients} clients enough examples; "
            "raise alpha, or lower num_clients or min_examples"
        ) from error


def natural_indices(
    train: Sequence[Any], test: Sequence[Any], partition: NaturalPartition, num_clients: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of each client in the training split and in the test split.

    Args:
        train: the column's value in each row of the training split; its distinct values are the clients.
        test: the same of the test split, empty where that has no such column. Rows of others are nobody's.
        partition: names the column.
        num_clients: must be the number of clients that the data has.

    Raises:
        ValueError: if it is another number, or the column's values can't be put in order.
    """
    try:
        clients = {value: client for client, value in enumerate(sorted(set(train)))}
    except TypeError:
        raise ValueError(
            f"task.partition.column: {partition.column!r} must hold a number or a text in every row, "
            "and nothing that is empty"
        ) from None
    if len(clients) != num_clients:
        raise ValueError(
            f"num_clients: must be {len(clients)}, the number of distinct values of column {partition.column!r}, "
            f"got {num_clients}"
        )
    return _rows_by_client(train, clients), _rows_by_client(test, clients)


def _rows_by_client(values: Sequence[Any], clients: dict[Any, int]) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in clients]
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


def require_client(partition_id: int, num_clients: int) -> None:
    """Check a partition's number.

    Raises:
        ValueError: if there is no such client.
    """
    if not 0 <= partition_id < num_clients:
        raise ValueError(f"partition-id must be in [0, {num_clients - 1}], got {partition_id}")


def _partitioner(partition: Partition, num_clients: int, seed: int) -> Partitioner:
    if isinstance(partition, IidPartition):
        return IidPartitioner(num_partitions=num_clients)
    return DirichletPartitioner(
        num_partitions=num_clients,
        partition_by="label",
        alpha=partition.alpha,
        min_partition_size=partition.min_examples,
        self_balancing=False,
        shuffle=True,
        seed=seed,
    )
