"""Bits and error of one quantiser step, against quantising Gaussian numbers."""

import numpy as np
import pytest
from numpy.typing import NDArray

from fedkd_flwr.core.rate_distortion import DEAD_ZONE, quantise, quantised

DEVIATIONS = [0.3, 0.6, 1.0, 2.5, 8.0, 100.0]


def gaussian_integers(deviation: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    values = np.random.default_rng(0).standard_normal(200_000) * deviation
    return values, quantise(values, 1.0)


def test_small_numbers_are_drawn_towards_zero() -> None:
    values = np.array([0.0, DEAD_ZONE - 0.01, 0.01 - DEAD_ZONE, DEAD_ZONE + 0.01, -0.01 - DEAD_ZONE, 1.5, 1.7, -7.0])
    assert quantise(values, 1.0).tolist() == [0, 0, 0, 1, -1, 1, 2, -7]
    assert quantise(values * 4, 4.0).tolist() == quantise(values, 1.0).tolist()


def test_no_number_moves_by_more_than_the_dead_zone() -> None:
    values = np.random.default_rng(0).uniform(-20, 20, 10_000)
    assert np.abs(values - 0.25 * quantise(values, 0.25)).max() <= 0.25 * DEAD_ZONE + 1e-12


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_bits_are_the_entropy_of_the_integers(deviation: float) -> None:
    _, integers = gaussian_integers(deviation)
    shares = np.unique(integers, return_counts=True)[1] / integers.size
    entropy = -(shares * np.log2(shares)).sum()
    assert float(quantised(np.log2([deviation]))[0][0]) == pytest.approx(entropy, rel=0.02, abs=0.01)


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_energy_kept_is_what_the_best_scaled_integers_do_not_miss(deviation: float) -> None:
    values, integers = gaussian_integers(deviation)
    best = (values * integers).sum() / np.square(integers).sum()
    missed = np.square(values - best * integers).sum() / np.square(values).sum()
    assert float(quantised(np.log2([deviation]))[1][0]) == pytest.approx(1 - missed, abs=0.005)


def test_bits_and_energy_kept_rise_with_the_spread() -> None:
    bits, kept = quantised(np.arange(-8.0, 18.0, 0.1))
    assert (np.diff(bits) >= -1e-9).all()
    assert (np.diff(kept) >= -1e-9).all()
    assert (kept <= 1).all()
    assert (bits[0], kept[0]) == pytest.approx((0.0, 0.0), abs=1e-6)
