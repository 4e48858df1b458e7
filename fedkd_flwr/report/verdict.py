"""Whether distillation pays: runs of FedKD beside what the same clients reach without it, in words."""

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev
from typing import Any

from scipy.special import stdtrit

from fedkd_flwr.algorithms import Baseline
from fedkd_flwr.experiment import CONFIG_FILE, ConfigError, Experiment, baselines_of, load
from fedkd_flwr.report.runs import RunResult

# What a client may predict with: how it is called here, and where its score on the client's own data stands.
LOCAL = {
    "student": ("the shared student", "shared_local"),
    "teacher": ("the private teachers", "private_local"),
    "ensemble": ("both together", "ensemble_local"),
}
MARGIN = 0.001  # nobody should choose by less
CONFIDENCE = 0.95

Known = tuple[RunResult, Experiment]


def verdict(runs: Sequence[RunResult]) -> list[str]:
    """What runs say of distillation, a line each; none where no run of them distils.

    A run is held against its baselines (`AlgorithmOptions.baselines`) where they are among the other runs: of the same
    seed, and in nothing else than the baseline says unlike it. One line for each baseline of an experiment, on the mean
    of the differences over its seeds.
    """
    known = [
        (run, experiment)
        for run in runs
        if run.summary["status"] == "completed" and not run.summary["stopped_early"] and (experiment := _read(run))
    ]
    lines: list[str] = []
    groups: dict[str, list[Known]] = {}
    for run, experiment in known:
        if experiment.algorithm.baselines():
            groups.setdefault(_conditions(experiment, seed=False), []).append((run, experiment))
    for group in groups.values():
        lines += [line for run, experiment in group for line in _own_data(run, experiment)]
        for baseline, _ in baselines_of(group[0][1]):
            lines += _compared(group, baseline, known)
    return lines


def _read(run: RunResult) -> Experiment | None:
    try:
        return load(run.directory / CONFIG_FILE)
    except ConfigError:
        return None  # lost, or of another version of this project


def _conditions(experiment: Experiment, *, seed: bool) -> str:
    """All that decides what a run comes to, as one text; with or without the seed."""
    left_out: dict[str, Any] = dict.fromkeys(("name", "output_dir", "network"), True)
    left_out["server"] = {"round_timeout_seconds", "connect_timeout_seconds", "keep_checkpoints"}
    if not seed:
        left_out["seed"] = True
    if experiment.algorithm.name == "local_only":
        left_out["compressor"] = True  # nothing is sent
    return experiment.model_dump_json(exclude=left_out)


def _own_data(run: RunResult, experiment: Experiment) -> list[str]:
    """Which of its models serves a run's clients best."""
    scores = {who: score for who, (_, scope) in LOCAL.items() if (score := run.score(scope)) is not None}
    if len(scores) < len(LOCAL):
        return []
    sign = _sign(run.metric)
    chosen, best = _predict_with(experiment), max(scores, key=lambda who: sign * scores[who])
    line = f"{run.label}: {run.metric} on the clients' own test data: " + ", ".join(
        f"{LOCAL[who][0]} {score:.3f}" for who, score in scores.items()
    )
    better = sign * (scores[best] - scores[chosen]) > MARGIN
    return [f"{line}; best on it: predict_with {best}, this run has {chosen}" if better else line]


def _compared(group: Sequence[Known], baseline: Baseline, known: Sequence[Known]) -> list[str]:
    """One line on the mean of the differences to a baseline; none where no seed has both."""
    others = {_conditions(experiment, seed=True): run for run, experiment in known}
    pairs: dict[int, tuple[float, float]] = {}
    for run, experiment in group:
        wanted = next(of for each, of in baselines_of(experiment) if each.name == baseline.name)
        other = others.get(_conditions(wanted, seed=True))
        if other is None or other.metric != run.metric:
            continue
        if baseline.against == "shared":
            ours, theirs = run.last_rounds(), other.last_rounds()
        else:
            ours = run.score(LOCAL[_predict_with(experiment)][1])
            shared = other.score("shared_local")
            theirs = other.score("private_local") if shared is None else shared
        if ours is not None and theirs is not None:
            pairs[experiment.seed] = (ours, theirs)
    if not pairs:
        return []
    run, experiment = group[0]
    what = "the shared student" if baseline.against == "shared" else f"{LOCAL[_predict_with(experiment)][0]}, own data"
    gaps = [a - b for a, b in pairs.values()]
    ours, theirs = (mean(side) for side in zip(*pairs.values(), strict=True))
    found, says = _judged(gaps, _sign(run.metric))
    return [f"{experiment.name}: {what}: {run.metric} {ours:.3f}, {baseline.words} {theirs:.3f}: {found}: {says}"]


def _judged(gaps: Sequence[float], sign: int) -> tuple[str, str]:
    """The mean difference in words, and what follows from it."""
    gap = mean(gaps)
    if len(gaps) == 1:
        return f"{gap:+.3f}, one seed", "run other seeds before you believe it"
    half = float(stdtrit(len(gaps) - 1, (1 + CONFIDENCE) / 2)) * stdev(gaps) / sqrt(len(gaps))
    found = f"{gap:+.3f} +- {half:.3f} over {len(gaps)} seeds"
    if abs(gap) <= max(half, MARGIN):
        return found, "no difference that can be told"
    return found, "distillation pays" if sign * gap > 0 else "distillation does not pay"


def _predict_with(experiment: Experiment) -> str:
    return str(getattr(experiment.algorithm, "predict_with", "teacher"))


def _sign(metric: str) -> int:
    """1 where more is better, -1 where less is."""
    return -1 if metric == "loss" else 1
