from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import softmax

from fedkd_flwr.core.soft_labels import (
    by_entropy_reduction,
    by_power,
    by_temperature,
    entropy,
    softened,
    weights_of,
)

P = np.random.default_rng(0).dirichlet([0.5] * 5, 40)
SHARPEN = [lambda p: by_power(p, 2.0), lambda p: by_temperature(p, 0.3), lambda p: by_entropy_reduction(p, 0.1)]


def test_a_temperature_or_a_power_of_1_leaves_the_mean_as_it_is() -> None:
    np.testing.assert_allclose(by_temperature(P, 1.0), P, atol=1e-12)
    np.testing.assert_allclose(by_power(P, 1.0), P, atol=1e-12)


def test_towards_temperature_0_the_mean_becomes_one_hot() -> None:
    np.testing.assert_allclose(by_temperature(P, 1e-4), np.eye(5)[P.argmax(axis=1)], atol=1e-6)
    np.testing.assert_allclose(by_entropy_reduction(P, 1e-4), np.eye(5)[P.argmax(axis=1)], atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-300, 1e-310, 5e-324])
@pytest.mark.parametrize("sharpen", [by_temperature, by_entropy_reduction])
def test_no_temperature_is_too_low(sharpen: Callable[..., np.ndarray], temperature: float) -> None:
    rows = np.concatenate([P, [[0.0, 0.5, 0.25, 0.25, 0.0]]])
    np.testing.assert_array_equal(sharpen(rows, temperature), np.eye(5)[rows.argmax(axis=1)])


def test_a_temperature_is_the_power_of_its_inverse() -> None:
    np.testing.assert_allclose(by_temperature(P, 0.25), by_power(P, 4.0))


@pytest.mark.parametrize("sharpen", SHARPEN)
def test_reduction_keeps_order_and_sum_and_lowers_entropy(sharpen: object) -> None:
    sharp = sharpen(P)  # type: ignore[operator]
    np.testing.assert_allclose(sharp.sum(axis=1), 1)
    assert (sharp.argmax(axis=1) == P.argmax(axis=1)).all()
    assert entropy(sharp).mean() < entropy(P).mean()


def test_a_zero_stays_a_zero_under_a_power() -> None:
    np.testing.assert_allclose(by_power(np.array([[0.0, 0.2, 0.8]]), 2.0), [[0, 0.04 / 0.68, 0.64 / 0.68]])


def test_softened_log_probabilities_are_the_softened_logits() -> None:
    logits = np.random.default_rng(1).normal(size=(7, 4))
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(softened(log_p, 2.5), softmax(logits / 2.5, axis=1))


def test_entropy_is_0_of_a_certainty_and_the_logarithm_of_the_classes_at_most() -> None:
    np.testing.assert_allclose(entropy(np.array([[1.0, 0, 0], [1 / 3] * 3])), [0, np.log(3)], atol=1e-12)


def test_whoever_is_sure_counts_under_entropy_weights() -> None:
    sure, unsure = np.array([[1.0, 0, 0]]), np.full((1, 3), 1 / 3)
    assert weights_of(sure, 5, "entropy")[0] == pytest.approx(1, abs=1e-5)
    assert 0 < weights_of(unsure, 5, "entropy")[0] < 1e-5
    assert weights_of(unsure, 5, "num_examples")[0] == 5
    assert weights_of(unsure, 5, "uniform")[0] == 1
