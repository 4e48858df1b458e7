"""Dividing one data set among clients with the partitioners of flwr-datasets."""

import warnings
from typing import Annotated, Literal

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


Partition = Annotated[IidPartition | DirichletPartition, Field(discriminator="name")]


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
            return [sorted(partitioner.load_partition(client)["row"]) for client in range(num_clients)]
    except ValueError as error:
        raise ValueError(
            f"task.partition: no Dirichlet draw gave each of {num_clients} clients enough examples; "
            "raise alpha, or lower num_clients or min_examples"
        ) from error


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
