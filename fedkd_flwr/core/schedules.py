"""Schedules: functions of training progress. Nothing else knows the round."""

from collections.abc import Callable

Schedule = Callable[[float], float]


def linear(start: float, end: float) -> Schedule:
    """value(t) = start + (end - start) t, for progress t in [0, 1].

    Equation 9 of Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature
    Communications 13:2032 (2022), where the value is the energy T that a factorisation keeps.

    Example:
        >>> linear(0.95, 0.98)(0.0), linear(0.95, 0.98)(1.0)
        (0.95, 0.98)

    Raises:
        ValueError: when the returned function is called with progress outside [0, 1].
    """

    def value(progress: float) -> float:
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress must be in [0, 1], got {progress}")
        return (1.0 - progress) * start + progress * end

    return value


def progress_of(server_round: int, num_rounds: int) -> float:
    """Share of training done at a round: (round - 1) / (num_rounds - 1), and 0 when there is one round.

    Args:
        server_round: 1 to num_rounds.
        num_rounds: at least 1.
    """
    return (server_round - 1) / (num_rounds - 1) if num_rounds > 1 else 0.0
