"""What models say of examples, and what several say together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Predictions:
    """What one model, or several together, say of some examples.

    Attributes:
        log_probabilities: for each example [classes], [positions, classes] where it has several labels, [candidates]
            where one of several is chosen.
        labels: for each example its label or labels, an array of those axes without the last; of candidates, 1 where
            one is right.
    """

    log_probabilities: Sequence[Numbers]
    labels: Sequence[Numbers]


def ensemble(*of_models: Predictions) -> Predictions:
    """What several models say together: the mean of their probabilities.

    Args:
        of_models: at least one, all of the same examples.
    """
    each = zip(*(predictions.log_probabilities for predictions in of_models), strict=True)
    together = [np.logaddexp.reduce(of_one) - np.log(len(of_models)) for of_one in each]
    return Predictions(together, of_models[0].labels)
