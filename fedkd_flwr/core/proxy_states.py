"""Proxy states: a grid over what an agent can observe, so that agents can speak of the same states.

A cell of the grid is a cluster of states and its centre is their proxy. Both ends build the grid from options, so that
it never travels. What lies beyond the bounds belongs to the outermost cell.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ProxyGrid:
    """Cells of equal size along each axis of the observations.

    Args:
        bounds: of each axis, (lowest, highest).
        cells: along each axis, >= 1.
    """

    def __init__(self, bounds: Sequence[tuple[float, float]], cells: Sequence[int]) -> None:
        self._cells = tuple(cells)
        self._low = torch.tensor([low for low, _ in bounds], dtype=torch.float64)
        self._width = torch.tensor(
            [(high - low) / count for (low, high), count in zip(bounds, cells, strict=True)], dtype=torch.float64
        )
        self._strides = torch.tensor([int(np.prod(self._cells[axis + 1 :])) for axis in range(len(self._cells))])
        places = torch.cartesian_prod(*(torch.arange(count) for count in self._cells)).reshape(-1, len(self._cells))
        self.centres: Tensor = (self._low + (places + 0.5) * self._width).float()
        self._neighbours = self._pairs(places)

    def __len__(self) -> int:
        """Number of proxy states, K."""
        return len(self.centres)

    def nearest(self, states: Tensor) -> Tensor:
        """Number of the proxy of each state: [N, axes] to int64 [N]."""
        places = ((states.double() - self._low) / self._width).floor().long()
        last = torch.tensor(self._cells) - 1
        return (torch.minimum(places.clamp(min=0), last) * self._strides).sum(dim=1)

    def neighbours(self, present: Tensor) -> Tensor:
        """Pairs of adjacent cells, one step apart along one axis, that are both present.

        Args:
            present: [K], which proxies are.

        Returns:
            int64 [pairs, 2], each pair once.
        """
        return self._neighbours[present[self._neighbours].all(dim=1)]

    def _pairs(self, places: Tensor) -> Tensor:
        numbers = torch.arange(len(places))
        found = [
            torch.stack([numbers, numbers + self._strides[axis]], dim=1)[places[:, axis] < count - 1]
            for axis, count in enumerate(self._cells)
        ]
        return torch.cat(found)
