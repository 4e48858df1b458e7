"""What runs of a distilling algorithm come to beside the same experiment without it, in words.

The first line is the comparison that decides: the shared student beside dense FedAvg of the teacher. Every line names
the rounds that its scores are of and the bytes of both sides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Any, Literal

from scipy.special import stdtrit

from fedkd_flwr.algorithms import Baseline
from fedkd_flwr.experiment import CONFIG_FILE, ConfigError, Experiment, baselines_of, load
from fedkd_flwr.report.runs import MEGABYTE, RunResult, shown_path

# What a client may predict with: how it is called here, and where its score on the client's own data stands.
LOCAL = {
    "student": ("the shared student", "shared_local"),
    "teacher": ("the private teachers", "private_local"),
    "ensemble": ("both together", "ensemble_local"),
}
MARGIN = 0.001  # nobody should choose by less
CONFIDENCE = 0.95
SAME_BYTES = 0.1  # counts that differ by a larger share are no equal budget
UNTOLD = "no difference that can be told"
CONCLUSIONS = {"better": "better: distillation pays", "worse": "worse: distillation does not pay"}

Known = tuple[RunResult, Experiment]
Against = Literal["shared", "local"]


@dataclass(frozen=True, slots=True)
class Side:
    """One run's part of a comparison. Attributes: `score`; `num_bytes` for each client over the run; `rounds` of it."""

    score: float
    num_bytes: int
    rounds: str


Pair = tuple[Side, Side]


def verdict(runs: Sequence[RunResult]) -> list[str]:
    """What runs say of distillation, a line each, and then which other runs learned nothing.

    A run is held against its baselines (`AlgorithmOptions.baselines`) where they are among the other runs: of the same
    seed, and in nothing else than the baseline says unlike it. One line for each baseline of an experiment, on the mean
    of the differences over its seeds; before them that on the shared student and the dense baseline, with what to do
    where the student is worse, or with the command that runs the baseline.
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
        baselines = [baseline for baseline, _ in baselines_of(group[0][1])]
        for dense in (baseline for baseline in baselines if baseline.dense):
            lines += _headline(group, dense, known)
        lines += [line for run, _ in group for line in _learned_nothing(run, "the shared student")]
        for baseline in baselines:
            lines += _compared(group, baseline, known)
        lines += [line for run, experiment in group for line in _own_data(run, experiment)]
    others = (run for run, experiment in known if not experiment.algorithm.baselines())
    return lines + [line for run in others for line in _learned_nothing(run, "the shared model")]


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


def _learned_nothing(run: RunResult, who: str) -> list[str]:
    """That the shared model, as it is called here, is no better than one answer to everything, where it is not."""
    majority, score = run.majority, run.last_rounds()
    constant = majority.scores.get(run.metric) if majority else None
    if majority is None or score is None or constant is None or _sign(run.metric) * (score - constant) > MARGIN:
        return []
    return [
        f"{run.label}: {run.metric} on the server's test set, {run.rounds_averaged}: {who} {score:.3f} is "
        f"no better than {majority.words}, {constant:.3f}"
    ]


def _headline(group: Sequence[Known], dense: Baseline, known: Sequence[Known]) -> Iterator[str]:
    """The shared student beside the dense baseline, and what follows for the user."""
    run, experiment = group[0]
    if run.last_rounds() is None:
        return
    pairs = list(_pairs(group, dense, "shared", known))
    if not pairs:
        where = shown_path(run.directory / CONFIG_FILE)
        score = f"{run.metric} on the server's test set, {run.rounds_averaged}: the shared student "
        yield (
            f"{experiment.name}: {score}{run.last_rounds():.3f}; {dense.words} was not run beside it: "
            f"fedkd compare {where} --baselines"
        )
        return
    gap = mean(ours.score - theirs.score for ours, theirs in pairs)
    yield _line(experiment, run.metric, "the shared student", "the server's test set", dense, pairs)
    if _sign(run.metric) * gap < -MARGIN and _says(pairs, run.metric)[1] != UNTOLD:
        yield f"{experiment.name}: remedy: {_remedy(experiment)}"


def _remedy(experiment: Experiment) -> str:
    """What a user can do about a student that is worse, as far as docs/results.md has figures for it."""
    student = getattr(experiment.task, "student", None)
    layers = getattr(student, "num_layers", None)
    deeper = (
        f"a student with as many layers as its teacher (task.student.num_layers, now {layers})"
        if layers
        else "a larger student (task.student)"
    )
    return (
        f"{deeper} and 1.5 times as many rounds (num_rounds, now {experiment.num_rounds}) gave the score of dense "
        "FedAvg at 1 % of its bytes on two of two text tasks; or share the teacher itself through this codec, "
        "algorithm: {name: fedavg, model: teacher}, which was within about 3 points of dense FedAvg on four of four "
        "tasks (docs/results.md)"
    )


def _compared(group: Sequence[Known], baseline: Baseline, known: Sequence[Known]) -> list[str]:
    """One line on the mean of the differences to a baseline; none where no seed has both."""
    pairs = list(_pairs(group, baseline, baseline.against, known))
    if not pairs:
        return []
    run, experiment = group[0]
    shared = baseline.against == "shared"
    who = "the shared student" if shared else LOCAL[_predict_with(experiment)][0]
    where = "the server's test set" if shared else "the clients' own test data"
    return [_line(experiment, run.metric, who, where, baseline, pairs)]


def _pairs(group: Sequence[Known], baseline: Baseline, against: Against, known: Sequence[Known]) -> Iterator[Pair]:
    """Both sides for each seed that has both."""
    others = {_conditions(experiment, seed=True): run for run, experiment in known}
    found: dict[int, Pair] = {}
    for run, experiment in group:
        wanted = next(of for each, of in baselines_of(experiment) if each.name == baseline.name)
        other = others.get(_conditions(wanted, seed=True))
        if other is None or other.metric != run.metric:
            continue
        ours, theirs = (
            _side(run, against, LOCAL[_predict_with(experiment)][1]),
            _side(other, against, "shared_local" if other.score("shared_local") is not None else "private_local"),
        )
        if ours is not None and theirs is not None:
            found[experiment.seed] = (ours, theirs)
    yield from found.values()


def _side(run: RunResult, against: Against, scope: str) -> Side | None:
    """A run's score on the server's test set over its last rounds, or in a scope after the last round."""
    score = run.last_rounds() if against == "shared" else run.score(scope)
    rounds = run.rounds_averaged if against == "shared" else f"after round {run.last_round}"
    return None if score is None else Side(score, run.summary["bytes"]["per_client"], rounds)


def _line(experiment: Experiment, metric: str, who: str, where: str, baseline: Baseline, pairs: Sequence[Pair]) -> str:
    ours, theirs = (mean(pair[side].score for pair in pairs) for side in (0, 1))
    gap, judged = _says(pairs, metric)
    judged = judged if baseline.dense else CONCLUSIONS.get(judged, judged)
    return (
        f"{experiment.name}: {metric} on {where}, {pairs[0][0].rounds}: {who} {ours:.3f}, {baseline.words} "
        f"{theirs:.3f}: {gap} {_bytes_in_words(pairs, same_codec=_same_codec(experiment, baseline))}: {judged}"
    )


def _same_codec(experiment: Experiment, baseline: Baseline) -> bool:
    """Whether both sides send updates through one codec, without a budget of bytes that would make them alike."""
    sends = baseline.algorithm.name != "local_only" and not baseline.dense
    return sends and getattr(experiment.compressor, "bytes_per_round", ...) is None


def _bytes_in_words(pairs: Sequence[Pair], *, same_codec: bool) -> str:
    """The bytes of both sides for each client, by how much they differ, and how they would not."""
    ours, theirs = (mean(pair[side].num_bytes for pair in pairs) for side in (0, 1))
    remedy = "; set compressor.bytes_per_round to compare at equal bytes" if same_codec else ""
    both = f"({_megabytes(ours)} MB a client, not {_megabytes(theirs)}{remedy})"
    if ours <= 0 or theirs <= 0 or abs(ours - theirs) <= SAME_BYTES * theirs:
        return f"at about the same bytes ({_megabytes(ours)} and {_megabytes(theirs)} MB a client)"
    if ours < theirs:
        return f"at {100 * (1 - ours / theirs):.1f} % fewer bytes {both}"
    return f"at {ours / theirs:.2g} times the bytes {both}"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / MEGABYTE:.3f}" if num_bytes < MEGABYTE else f"{num_bytes / MEGABYTE:.2f}"


def _says(pairs: Sequence[Pair], metric: str) -> tuple[str, str]:
    """The mean difference in words, and what follows from it."""
    gaps = [ours.score - theirs.score for ours, theirs in pairs]
    gap = mean(gaps)
    better = "level" if abs(gap) <= MARGIN else "better" if _sign(metric) * gap > 0 else "worse"
    if len(gaps) == 1:
        return f"{gap:+.3f}", f"{better} on one seed; run other seeds before you believe it"
    half = float(stdtrit(len(gaps) - 1, (1 + CONFIDENCE) / 2)) * stdev(gaps) / sqrt(len(gaps))
    found = f"{gap:+.3f} +- {half:.3f} over {len(gaps)} seeds"
    return found, UNTOLD if abs(gap) <= max(half, MARGIN) else better


def _own_data(run: RunResult, experiment: Experiment) -> list[str]:
    """Which of its models serves a run's clients best."""
    scores = {who: score for who, (_, scope) in LOCAL.items() if (score := run.score(scope)) is not None}
    if len(scores) < len(LOCAL):
        return []
    sign = _sign(run.metric)
    chosen, best = _predict_with(experiment), max(scores, key=lambda who: sign * scores[who])
    line = f"{run.label}: {run.metric} on the clients' own test data, after round {run.last_round}: " + ", ".join(
        f"{LOCAL[who][0]} {score:.3f}" for who, score in scores.items()
    )
    better = sign * (scores[best] - scores[chosen]) > MARGIN
    return [f"{line}; best on it: predict_with {best}, this run has {chosen}" if better else line]


def _predict_with(experiment: Experiment) -> str:
    return str(getattr(experiment.algorithm, "predict_with", "teacher"))


def _sign(metric: str) -> int:
    """1 where more is better, -1 where less is."""
    return -1 if metric == "loss" else 1
