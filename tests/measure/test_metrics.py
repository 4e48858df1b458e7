import pytest

from fedkd_flwr.measure.metrics import last_mean, weighted_scores


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
