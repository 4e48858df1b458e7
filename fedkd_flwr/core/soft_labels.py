"""Soft labels: what several models say of the same examples, as one distribution for each.

The rules are those of federated distillation on public examples: FedMD (https://arxiv.org/abs/1910.03581), DS-FL
(https://arxiv.org/abs/2008.06180), SCARLET (power sharpening).
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[Any]  # [examples, classes], each row sums to 1
Weighting = Literal["uniform", "num_examples", "entropy"]

_LEAST_WEIGHT = 1e-6  # so that examples of which nobody knows anything have a mean


def softened(log_probabilities: NDArray[Any], temperature: float) -> Probabilities:
    """softmax(z / temperature) of logits z, from log-probabilities: they differ by a constant of each row."""
    return _softmax(np.asarray(log_probabilities, np.float64) / temperature)


def entropy(probabilities: Probabilities) -> NDArray[np.float64]:
    """Of each row, in nats: [examples]; 0 log 0 counts as 0."""
    p = np.asarray(probabilities, np.float64)
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1))


def weights_of(probabilities: Probabilities, num_examples: int, weighting: Weighting) -> NDArray[np.float64]:
    """How much one client counts on each example: [examples], > 0.

    Args:
        probabilities: that it sent.
        num_examples: that it trains on.
        weighting: "uniform", 1; "num_examples", as many; "entropy", 1 - H(p) / log(classes): a client that is sure
            counts, one that has no idea does not. Clients with few classes may be sure and wrong.
    """
    if weighting == "entropy":
        most = np.log(probabilities.shape[-1])
        return np.asarray(np.maximum(1.0 - entropy(probabilities) / most, 0.0) + _LEAST_WEIGHT)
    return np.full(len(probabilities), float(num_examples) if weighting == "num_examples" else 1.0)


def by_power(probabilities: Probabilities, beta: float) -> Probabilities:
    """p^beta, normalised: 1 leaves p as it is, larger ones sharpen it (enhanced entropy reduction, as in SCARLET).

    Args:
        probabilities: [examples, classes].
        beta: > 0.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(np.asarray(probabilities, np.float64))
    return _softmax(_times(logs, beta))


def by_temperature(probabilities: Probabilities, temperature: float) -> Probabilities:
    """softmax(log p / temperature): 1 leaves p as it is, and towards 0 it becomes one-hot; `by_power` of 1/temperature.

    Args:
        probabilities: [examples, classes].
        temperature: > 0.
    """
    with np.errstate(over="ignore"):
        return by_power(probabilities, float(np.divide(1.0, temperature)))


def by_entropy_reduction(probabilities: Probabilities, temperature: float) -> Probabilities:
    """softmax(p / temperature), the rule that DS-FL publishes (with 0.1). At 1 it flattens, and p never comes back.

    Args:
        probabilities: [examples, classes].
        temperature: > 0.
    """
    with np.errstate(over="ignore"):
        return _softmax(_times(np.asarray(probabilities, np.float64), float(np.divide(1.0, temperature))))


def _times(values: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    """Beside the largest of each row, which softmax can't tell: so that no factor, infinity included, gives NaN."""
    below = values - values.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(below < 0, below * factor, 0.0)


def _softmax(values: NDArray[np.float64]) -> Probabilities:
    raised = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))
