"""Whether distillation pays: FedKD beside what the same clients reach without it, in words."""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

import yaml

from fedkd_flwr.report.runs import RunResult

CONFIG_FILE = "config.yaml"
FEDKD = ("fedkd", "fedkd_paper")
# What a client may predict with: how it is called here, and where its score on the client's own data stands.
LOCAL = {
    "student": ("the shared student", "shared_local"),
    "teacher": ("the private teachers", "private_local"),
    "ensemble": ("both together", "ensemble_local"),
}
# What two runs must have in common, so that what is between them is the method.
CONDITIONS = ("seed", "num_clients", "num_rounds", "server", "task")

Config = dict[str, Any]
Score = Callable[[RunResult, Config], float | None]


def verdict(runs: Sequence[RunResult]) -> list[str]:
    """What runs say of distillation, a line each; none where no run of them is FedKD's.

    Each FedKD run is compared, on the same clients and seed, with FedAvg of the same student under the same compressor;
    and what its clients predict with, with a teacher that trains alone and with FedAvg of the teacher.
    """
    known = [(run, config) for run in runs if (config := _config(run))]
    fedkd = [(run, config) for run, config in known if config["algorithm"]["name"] in FEDKD]
    lines = [line for run, config in fedkd for line in _own_data(run, config)]
    alone = _named(known, "fedavg", "student")
    lines += _compared("the shared student", fedkd, _shared, "FedAvg of it", alone, _shared, ("compressor",))
    here = "on the clients' own data, what FedKD predicts with"
    teacher_alone, teacher = _named(known, "local_only", "teacher"), _named(known, "fedavg", "teacher")
    lines += _compared(here, fedkd, _predicted, "teachers that train alone", teacher_alone, _local("private_local"))
    lines += _compared(here, fedkd, _predicted, "FedAvg of the teacher", teacher, _local("shared_local"))
    return lines


def _config(run: RunResult) -> Config | None:
    path = run.directory / CONFIG_FILE
    found: Config | None = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found


def _named(known: Iterable[tuple[RunResult, Config]], name: str, model: str) -> list[tuple[RunResult, Config]]:
    """Runs of one algorithm on one of the task's models."""
    wanted = {"name": name, "model": model}
    return [(run, config) for run, config in known if config["algorithm"].items() >= wanted.items()]


def _own_data(run: RunResult, config: Config) -> list[str]:
    """Which of its models serves a FedKD run's clients best."""
    scores = {who: score for who, (_, scope) in LOCAL.items() if (score := run.score(scope)) is not None}
    if not scores:
        return []
    best = (min if run.metric == "loss" else max)(scores, key=lambda who: scores[who])
    each = ", ".join(f"{LOCAL[who][0]} {score:.3f}" for who, score in scores.items())
    line = f"{run.label}: {run.metric} on the clients' own data: {each}"
    chosen = config["algorithm"].get("predict_with", "teacher")
    return [line if best == chosen else f"{line}; best: predict_with {best}, this run has {chosen}"]


def _shared(run: RunResult, config: Config) -> float | None:
    return run.last_rounds()


def _local(scope: str) -> Score:
    return lambda run, config: run.score(scope)


def _predicted(run: RunResult, config: Config) -> float | None:
    return run.score(LOCAL[config["algorithm"].get("predict_with", "teacher")][1])


def _compared(
    what: str,
    fedkd: Sequence[tuple[RunResult, Config]],
    ours: Score,
    than: str,
    others: Sequence[tuple[RunResult, Config]],
    theirs: Score,
    more_conditions: tuple[str, ...] = (),
) -> list[str]:
    """One line on the mean of the differences between runs of the same conditions; none where there is no such pair."""
    pairs = [
        (a, b)
        for run, config in fedkd
        for other, of_other in others
        if all(config[key] == of_other[key] for key in (*CONDITIONS, *more_conditions))
        and (a := ours(run, config)) is not None
        and (b := theirs(other, of_other)) is not None
    ]
    if not pairs:
        return []
    metric = fedkd[0][0].metric
    gap = mean(a - b for a, b in pairs)
    # Below a thousandth nobody would choose by it.
    says = "no different from" if abs(gap) < 5e-4 else "above" if gap > 0 else "below"
    pays = (gap < 0) == (metric == "loss") and abs(gap) >= 5e-4
    wins = sum((a < b) if metric == "loss" else (a > b) for a, b in pairs)
    scores = f"{mean(a for a, _ in pairs):.3f} and {mean(b for _, b in pairs):.3f}, better in {wins} of {len(pairs)}"
    so = "distillation pays" if pays else "distillation does not pay"
    return [f"{what}: {metric} {abs(gap):.3f} {says} {than} ({scores}): {so}"]
