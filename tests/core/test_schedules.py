from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_flwr.core.schedules import linear, progress_of

VALUES = st.floats(1e-6, 1.0)
PROGRESS = st.floats(0.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(start=VALUES, end=VALUES)
def test_linear_starts_and_ends_exactly_where_it_is_told(start: float, end: float) -> None:
    schedule = linear(start, end)
    assert schedule(0.0) == start
    assert schedule(1.0) == end


@settings(max_examples=300, deadline=None)
@given(start=VALUES, end=VALUES, progress=PROGRESS)
def test_linear_follows_equation_9(start: float, end: float, progress: float) -> None:
    assert linear(start, end)(progress) == pytest.approx(start + (end - start) * progress, rel=1e-9, abs=1e-15)


@settings(max_examples=300, deadline=None)
@given(start=VALUES, end=VALUES, progress=PROGRESS)
def test_linear_between_energies_is_always_an_energy(start: float, end: float, progress: float) -> None:
    # An energy one rounding error above 1 would be refused in the middle of a run.
    assert 0.0 < linear(start, end)(progress) <= 1.0


@pytest.mark.parametrize("num_rounds", [2, 7, 100, 1000])
def test_linear_rises_with_every_round_when_it_ends_higher(num_rounds: int) -> None:
    schedule = linear(0.95, 0.98)
    values = [schedule(progress_of(server_round, num_rounds)) for server_round in range(1, num_rounds + 1)]
    assert all(earlier < later for earlier, later in pairwise(values))
    assert (values[0], values[-1]) == (0.95, 0.98)


def test_linear_falls_with_every_round_when_it_ends_lower() -> None:
    values = [linear(0.9, 0.1)(step / 50) for step in range(51)]
    assert all(earlier > later for earlier, later in pairwise(values))


@pytest.mark.parametrize("progress", [-1e-9, 1.0 + 1e-9, 2.0, float("nan"), float("inf")])
def test_linear_refuses_progress_outside_the_training(progress: float) -> None:
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got"):
        linear(0.95, 0.98)(progress)


@settings(max_examples=100, deadline=None)
@given(num_rounds=st.integers(2, 10_000), data=st.data())
def test_progress_is_the_share_of_rounds_done(num_rounds: int, data: st.DataObject) -> None:
    server_round = data.draw(st.integers(1, num_rounds))
    assert progress_of(1, num_rounds) == 0.0
    assert progress_of(num_rounds, num_rounds) == 1.0
    assert progress_of(server_round, num_rounds) * (num_rounds - 1) == pytest.approx(server_round - 1)


def test_progress_of_the_middle_round_is_a_half() -> None:
    assert progress_of(6, 11) == 0.5


def test_progress_of_the_only_round_is_zero() -> None:
    assert progress_of(1, 1) == 0.0
