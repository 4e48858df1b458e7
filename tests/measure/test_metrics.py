import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd_flwr.measure.metrics import last_mean, spread_of, weighted_scores


def test_metrics_are_in_the_order_of_whoever_has_the_most() -> None:
    scores = weighted_scores([({"accuracy": 0.5}, 1.0), ({"f1": 0.2, "accuracy": 1.0}, 1.0)])
    assert scores is not None
    assert list(scores) == ["f1", "accuracy"]
    assert scores == {"f1": 0.2, "accuracy": 0.75}


def test_a_score_is_the_mean_over_clients_weighted_by_examples() -> None:
    scores = [({"accuracy": 1.0, "loss": 2.0}, 1.0), ({"accuracy": 0.5, "loss": 4.0}, 3.0)]
    assert weighted_scores(scores) == {"accuracy": (1.0 + 1.5) / 4, "loss": (2.0 + 12.0) / 4}


def test_a_metric_that_some_clients_lack_is_the_mean_of_those_that_have_it() -> None:
    scores = [({"accuracy": 0.25}, 2.0), ({"accuracy": 0.75, "f1": 0.5}, 2.0), ({}, 100.0)]
    assert weighted_scores(scores) == {"accuracy": 0.5, "f1": 0.5}


def test_a_minimum_is_the_least_over_clients_whatever_they_weigh() -> None:
    scores = [({"min_divisor": 0.5, "loss": 1.0}, 1.0), ({"min_divisor": 0.25, "loss": 3.0}, 1.0), ({}, 9.0)]
    assert weighted_scores(scores) == {"min_divisor": 0.25, "loss": 2.0}


@pytest.mark.parametrize("scores", [[], [({}, 3.0)]])
def test_no_score_at_all_is_none(scores: list[tuple[dict[str, float], float]]) -> None:
    assert weighted_scores(scores) is None


def test_scores_may_come_from_a_generator() -> None:
    assert weighted_scores(({"loss": float(i)}, 1.0) for i in range(4)) == {"loss": 1.5}


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], None), ([4.0], 4.0), ([4.0, 2.0], 3.0), ([9.0, 1.0, 2.0, 6.0], 3.0)],
)
def test_the_last_mean_is_over_three_values_or_all_there_are(values: list[float], expected: float | None) -> None:
    assert last_mean(values) == expected


def test_the_last_mean_takes_the_asked_number_of_values() -> None:
    assert last_mean([8.0, 4.0, 2.0, 1.0], count=2) == 1.5


def test_a_spread_is_percentiles_interpolated_between_clients() -> None:
    assert spread_of({"loss": float(i)} for i in (4, 0, 3, 1, 2)) == {
        "loss": {"p10": pytest.approx(0.4), "median": 2.0, "p90": pytest.approx(3.6)}
    }


def test_the_spread_of_one_client_is_its_score() -> None:
    assert spread_of([{"accuracy": 0.25}]) == {"accuracy": {"p10": 0.25, "median": 0.25, "p90": 0.25}}


def test_a_metric_that_some_clients_lack_is_spread_over_those_that_have_it() -> None:
    found = spread_of([{"loss": 1.0}, {"loss": 3.0, "f1": 0.5}, {}])
    assert found is not None
    assert (found["loss"]["median"], found["f1"]["median"]) == (2.0, 0.5)


@pytest.mark.parametrize("scores", [[], [{}], [{}, {}]])
def test_no_score_has_no_spread(scores: list[dict[str, float]]) -> None:
    assert spread_of(scores) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_a_spread_is_ordered_within_the_scores_and_does_not_depend_on_their_order(values: list[float]) -> None:
    found, turned = (spread_of({"x": value} for value in order) for order in (values, values[::-1]))
    assert found is not None
    assert found == turned
    spread = found["x"]
    assert min(values) <= spread["p10"] <= spread["median"] <= spread["p90"] <= max(values)
    assert spread["median"] == pytest.approx(float(np.median(values)))
    assert all(type(value) is float for value in spread.values())


def test_a_score_that_is_no_number_is_not_hidden() -> None:
    found = spread_of([{"loss": math.nan}, {"loss": 1.0}])
    assert found is not None
    assert math.isnan(found["loss"]["median"])
