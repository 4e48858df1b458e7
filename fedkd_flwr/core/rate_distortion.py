"""What a quantiser with one step makes of Gaussian numbers: bits for each, and the error that is left.

By reverse water-filling (Cover and Thomas, Elements of Information Theory, section 10.3.3) the least total error at a
number of bits is the same for every component that is sent, and a component smaller than that is not sent at all. One
quantiser step for all of them comes close to it, once the integers are entropy coded (Gish and Pierce 1968).
"""

from functools import cache
from math import pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]

DEAD_ZONE = 0.58  # a number below this many steps becomes 0; a plain quantiser has 0.5
# Error that one byte takes away, in squared steps: the slope of the curve that this file tabulates.
ERROR_PER_BYTE = 1.1
_LOWEST, _PER_OCTAVE, _NUM_POINTS = -5, 4, 77  # of the table, over log2 of the standard deviation


def quantise(values: NDArray[Any], step: float) -> Ints:
    """The nearest multiples of a step, with small ones drawn towards zero, where a number costs the fewest bits.

    The caller sees to it that they fit 32 bits.
    """
    scaled = values / step
    sizes = np.floor(np.abs(scaled) + (1.0 - DEAD_ZONE))
    integers: Ints = np.copysign(sizes, scaled).astype(np.int32)
    return integers


def quantised(log2_deviation: Floats) -> tuple[Floats, Floats]:
    """What becomes of Gaussian numbers.

    Args:
        log2_deviation: of their standard deviation in steps, any shape.

    Returns:
        Bits for each number, and the share of its energy that is kept, in [0, 1].
    """
    # Linear between the points of an even grid; np.interp would search for each.
    at = np.clip((log2_deviation - _LOWEST) * _PER_OCTAVE, 0.0, _NUM_POINTS - 1.001)
    index = at.astype(np.int64)
    weight = at - index
    bits, kept = _tables()
    return (
        bits[index] * (1.0 - weight) + bits[index + 1] * weight,
        kept[index] * (1.0 - weight) + kept[index + 1] * weight,
    )


@cache
def _tables() -> tuple[Floats, Floats]:
    """By numeric integration, on the grid; the integers are scaled by the best factor, as the codec does."""
    bits, kept = [], []
    for deviation in 2.0 ** (_LOWEST + np.arange(_NUM_POINTS) / _PER_OCTAVE):
        values = np.linspace(-6.0, 6.0, 4001) * deviation
        density = np.exp(-0.5 * (values / deviation) ** 2) / np.sqrt(2 * pi) / deviation
        weights = density * (values[1] - values[0])
        integers = quantise(values, 1.0)
        sizes = np.abs(integers)
        probabilities = np.bincount(sizes, weights)
        probabilities = probabilities[probabilities > 1e-12]
        signs = weights[sizes > 0].sum()
        bits.append(float(-(probabilities * np.log2(probabilities)).sum() + signs))
        power, cross = (weights * integers**2).sum(), (weights * integers * values).sum()
        kept.append(float(cross**2 / power / deviation**2) if power > 1e-9 else 0.0)
    return np.array(bits), np.clip(np.array(kept), 0.0, 1.0)
