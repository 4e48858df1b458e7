"""Metrics over clients and over rounds."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Scores = Mapping[str, float]

# The shared model on the server's test set; it, a client's own model, and both together on the client's own test data.
SCOPES = ("shared_global", "shared_local", "private_local", "ensemble_local")


def weighted_scores(scores: Iterable[tuple[Scores, float]]) -> dict[str, float] | None:
    """Mean of each metric over clients, weighted, and the least of those named min_...; None where there are none.

    Args:
        scores: metrics by name, and the weight of the client, > 0 (its number of test examples).
    """
    totals: dict[str, float] = {}
    weights: dict[str, float] = {}
    least: dict[str, float] = {}
    names: list[tuple[str, ...]] = []
    for metrics, weight in scores:
        names.append(tuple(metrics))
        for name, value in metrics.items():
            if name.startswith("min_"):
                least[name] = min(value, least.get(name, value))
                continue
            totals[name] = totals.get(name, 0.0) + weight * value
            weights[name] = weights.get(name, 0.0) + weight
    # In the order of whoever has the most: a client without a positive example lacks the metric that comes first.
    order = max(names, key=len, default=())
    means = {name: totals[name] / weights[name] for name in dict.fromkeys((*order, *totals)) if name in totals}
    return means | least or None


def spread_of(scores: Iterable[Scores]) -> dict[str, dict[str, float]] | None:
    """Tenth percentile, median and ninetieth of each metric over clients, every client alike; None without clients.

    A mean weighted by examples hides whom a model fails. Percentiles are interpolated between clients.
    """
    values: dict[str, list[float]] = {}
    for metrics in scores:
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    spread = {}
    for name, of_clients in values.items():
        low, middle, high = np.percentile(of_clients, (10, 50, 90))
        spread[name] = {"p10": float(low), "median": float(middle), "p90": float(high)}
    return spread or None


MOST_AVERAGED = 3
SHARE_AVERAGED = 4  # of so many rounds one is averaged: the mean of a short run would be mostly of its climb


def num_averaged(num_rounds: int) -> int:
    """How many of a run's last rounds its score is the mean over: a quarter of them, at least 1 and at most 3."""
    return min(MOST_AVERAGED, max(1, num_rounds // SHARE_AVERAGED))


def last_mean(values: Sequence[float], count: int = 3) -> float | None:
    """Mean of the last `count` values: steadier than the last one alone. None where there are none."""
    tail = values[-count:]
    return sum(tail) / len(tail) if tail else None
