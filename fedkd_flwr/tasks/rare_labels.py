"""Clients that have next to nothing of some labels."""

from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

Rows = np.ndarray[Any, np.dtype[np.int64]]


class RareLabelsPartition(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Each client lacks nearly all examples of a few labels, drawn for it, as in Jeong et al. 2018 (FD, FAug).

    Attributes:
        num_rare: labels of a client that are rare.
        num_kept: examples that it keeps of each of them; the others are left out of the experiment.
        examples_per_client: a client's examples before that, drawn at random; null: an equal share of all.
    """

    name: Literal["rare_labels"] = "rare_labels"
    num_rare: int = Field(3, ge=1)
    num_kept: int = Field(5, ge=0)
    examples_per_client: int | None = Field(None, ge=2)


def with_rare_labels(
    clients: list[list[int]], codes: Rows, partition: RareLabelsPartition, drawn: np.random.Generator
) -> list[list[int]]:
    """Equal shares, cut down to what the partition leaves of them.

    Args:
        clients: rows of each client.
        codes: the label of every row, from 0.
        partition: how to cut.
        drawn: what draws.

    Raises:
        ValueError: if there are too few labels or examples.
    """
    num_labels, wanted = int(codes.max()) + 1, partition.examples_per_client
    if partition.num_rare >= num_labels:
        raise ValueError(
            f"task.partition.num_rare: must be below {num_labels}, the labels of the training data, "
            f"got {partition.num_rare}"
        )
    if wanted is not None and wanted > (most := min(map(len, clients))):
        raise ValueError(
            f"task.partition.examples_per_client: {len(clients)} clients can have {most} examples each, got {wanted}"
        )
    found = []
    for rows in clients:
        order = drawn.permutation(rows)[:wanted]
        rare = set(drawn.choice(num_labels, partition.num_rare, replace=False).tolist())
        left = dict.fromkeys(rare, partition.num_kept)
        kept = []
        for row in order.tolist():
            if (label := int(codes[row])) in rare:
                left[label] -= 1
                if left[label] < 0:
                    continue
            kept.append(row)
        found.append(sorted(kept))
    return found
