"""Differential privacy of a client's update: clip it, add Gaussian noise, and only then encode it.

What is protected is a whole client: everything in its data at once. After McMahan et al., ICLR 2018,
https://arxiv.org/abs/1710.06963, with the noise added where the data is, so that nobody has to be trusted with a bare
update. What it adds up to is in `measure/privacy_account.py`.
"""

import math
import os
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from fedkd_flwr.core.arrays import Array, Arrays, require_finite

Adjacency = Literal["replace", "zero_out"]
RandomBytes = Callable[[int], bytes]

_GRID_BITS = 20  # the noise has so many bits below its standard deviation
_MANTISSA_BITS = 53
_WORD_BYTES = 8
_SLACK = 1 - 2.0**-40  # far more than the rounding of a float64 norm, far less than anybody would notice


class PrivacyOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """What a client does to its update before anybody else sees it.

    Attributes:
        clip_norm: length (2-norm over all parameters) that no update exceeds; a longer one is scaled down to it.
        noise_multiplier: standard deviation of the noise on every number, in units of `clip_norm`. 0 only clips, which
            promises nothing.
        delta: probability that the promise fails, for which epsilon is stated; well below one over the number of
            clients that could have taken part.
        adjacency: what an observer must not be able to tell apart: a client's data and any other data in its place
            ("replace": two updates differ by up to twice `clip_norm`), or its taking part and a reply of zeros
            ("zero_out": up to `clip_norm`, half the epsilon or less, and a weaker promise).
        max_epsilon: begin no round after which some client could have disclosed more than this to the server.
        share_metrics: send scores, losses, seconds and numbers of examples as they are. They have no noise, and
            epsilon does not cover them; by default none is sent.
    """

    clip_norm: float = Field(gt=0)
    noise_multiplier: float = Field(ge=0)
    delta: float = Field(1e-5, gt=0, lt=1)
    adjacency: Adjacency = "replace"
    max_epsilon: float | None = Field(None, gt=0)
    share_metrics: bool = False


def privatised(update: Arrays, options: PrivacyOptions, random_bytes: RandomBytes = os.urandom) -> dict[str, Array]:
    """An update that may be seen: clipped, with noise.

    Both the clipped numbers and the noise lie on one grid, a millionth of the noise's standard deviation apart. Their
    sum then is the Gaussian mechanism's answer, rounded, whatever the update was: the last bits of a float, which give
    an update away under plain addition (Mironov, CCS 2012), say nothing here.

    Args:
        update: parameters, float32.
        options: how much of each.
        random_bytes: source of the noise, so many bytes at a call; the operating system's. A seed known to the server
            would undo the noise.

    Returns:
        Arrays of the same names and shapes, float32.

    Raises:
        ValueError: if the update holds a NaN or an infinity.
    """
    deviation = options.noise_multiplier * options.clip_norm
    step = grid_step(deviation)
    noisy = {}
    for name, value in clipped_on_grid(update, options.clip_norm, step).items():
        if deviation:
            value = (value + noise_on_grid(value.shape, deviation, step, random_bytes)) * step
        noisy[name] = np.asarray(value, np.float32)
    return noisy


def grid_step(deviation: float) -> float:
    """Distance of neighbours on the grid of such noise, a power of 2; 0 where there is no noise and no grid."""
    return 2.0 ** (math.floor(math.log2(deviation)) - _GRID_BITS) if deviation else 0.0


def clipped_on_grid(update: Arrays, clip_norm: float, step: float) -> dict[str, NDArray[np.float64]]:
    """An update that is no longer than the clip norm.

    Args:
        update: parameters, float32.
        clip_norm: see `PrivacyOptions`.
        step: distance on the grid; 0 for none.

    Returns:
        Whole multiples of the step, towards zero, so that rounding makes no update longer; without a grid the numbers
        themselves.

    Raises:
        ValueError: if the update holds a NaN or an infinity.
    """
    require_finite(update)
    exact = {name: np.asarray(value, np.float64) for name, value in update.items()}
    norm = math.sqrt(sum(float(np.vdot(value, value)) for value in exact.values()))
    scale = min(1.0, clip_norm / norm * _SLACK) if norm else 1.0
    if not step:
        return {name: np.asarray(value * scale) for name, value in exact.items()}
    return {name: np.asarray(np.trunc(value * (scale / step))) for name, value in exact.items()}


def noise_on_grid(
    shape: tuple[int, ...], deviation: float, step: float, random_bytes: RandomBytes = os.urandom
) -> NDArray[np.float64]:
    """Gaussian noise of a standard deviation, in whole multiples of a step.

    Args:
        shape: of the noise.
        deviation: above 0, in the units of the step.
        step: see `grid_step`.
        random_bytes: source of the noise; see `privatised`.
    """
    noise = standard_normal(math.prod(shape), random_bytes).reshape(shape)
    return np.asarray(np.rint(noise * (deviation / step)))


def standard_normal(count: int, random_bytes: RandomBytes = os.urandom) -> NDArray[np.float64]:
    """Independent standard normal numbers, by Box and Muller's transform.

    Args:
        count: how many.
        random_bytes: source of uniform bytes.

    Returns:
        float64 [count], none beyond 8.6 in magnitude.
    """
    num_pairs = -(-count // 2)
    words = np.frombuffer(random_bytes(2 * num_pairs * _WORD_BYTES), np.uint64) >> np.uint64(64 - _MANTISSA_BITS)
    uniform = words.reshape(2, num_pairs) * 2.0**-_MANTISSA_BITS
    radius = np.sqrt(-2.0 * np.log1p(-uniform[0]))  # of 1 - u, in (0, 1]
    angle = 2.0 * np.pi * uniform[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
