"""Proxy states: which state is near which, and which are adjacent."""

import torch

from fedkd_flwr.core.proxy_states import ProxyGrid

GRID = ProxyGrid([(-1.0, 1.0), (0.0, 3.0)], [2, 3])


def test_centres_are_those_of_the_cells_in_order_of_their_numbers() -> None:
    assert GRID.centres.tolist() == [[-0.5, 0.5], [-0.5, 1.5], [-0.5, 2.5], [0.5, 0.5], [0.5, 1.5], [0.5, 2.5]]
    assert GRID.nearest(GRID.centres).tolist() == list(range(len(GRID)))


def test_a_state_beyond_the_bounds_belongs_to_the_outermost_cell() -> None:
    states = torch.tensor([[-9.0, -9.0], [9.0, 9.0], [0.1, 9.0], [1.0, 3.0]])
    assert GRID.nearest(states).tolist() == [0, 5, 5, 5]


def test_neighbours_are_one_step_apart_and_both_present() -> None:
    pairs = GRID.neighbours(torch.ones(6, dtype=torch.bool)).tolist()
    assert sorted(pairs) == [[0, 1], [0, 3], [1, 2], [1, 4], [2, 5], [3, 4], [4, 5]]
    assert GRID.neighbours(torch.tensor([True, True, False, False, True, False])).tolist() == [[1, 4], [0, 1]]


def test_an_axis_of_one_cell_has_no_neighbours() -> None:
    grid = ProxyGrid([(0.0, 1.0), (0.0, 1.0)], [1, 2])
    assert grid.neighbours(torch.ones(2, dtype=torch.bool)).tolist() == [[0, 1]]
