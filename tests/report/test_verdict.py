"""Whether distillation pays, in words, from runs that differ in nothing but the method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedkd_flwr.experiment import CONFIG_FILE, Experiment, baselines_of
from fedkd_flwr.report.runs import RunResult
from fedkd_flwr.report.verdict import verdict
from tests.conftest import small

SCOPES = ("shared_global", "shared_local", "private_local", "ensemble_local")


class Runs:
    """Finished runs, made up: what they score, and the configuration that lies beside their ledger."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(
        self,
        experiment: Experiment,
        shared: float | None = None,
        *,
        metric: str = "accuracy",
        status: str = "completed",
        stopped_early: str | None = None,
        num_bytes: int = 400_000,
        earlier: Sequence[float] = (),
        **local: float,
    ) -> RunResult:
        directory = self._directory / str(len(list(self._directory.iterdir())))
        directory.mkdir()
        (directory / CONFIG_FILE).write_text(experiment.to_yaml())
        scores: dict[str, Any] = {scope: {metric: local[scope]} if scope in local else None for scope in SCOPES}
        scores["shared_global"] = None if shared is None else {metric: shared}
        before = [scores | {"shared_global": {metric: score}} for score in earlier]
        rows = [{"kind": "round", "round": n, "metrics": each} for n, each in enumerate([*before, scores], 1)]
        facts = {"experiment": experiment.name, "seed": experiment.seed, "status": status}
        facts |= {"stopped_early": stopped_early, "bytes": {"per_client": num_bytes}}
        return RunResult(directory, {**facts, "metrics": scores}, tuple(rows))


@pytest.fixture
def made(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def fedkd(seed: int = 0, *overrides: str) -> Experiment:
    return small(f"seed={seed}", *overrides)


def baseline(which: str, seed: int = 0, *overrides: str) -> Experiment:
    """One of those that `fedkd` of the same arguments must beat."""
    return {each.name: of for each, of in baselines_of(fedkd(seed, *overrides))}[which]


def lines_on(what: str, lines: list[str]) -> list[str]:
    """Those of a verdict that speak of something."""
    return [line for line in lines if what in line]


ALONE = "the same student without a teacher"
DENSE = "dense FedAvg of the teacher"


def student_alone(seed: int = 0, *overrides: str) -> Experiment:
    return baseline("fedavg_student", seed, *overrides)


def test_without_fedkd_there_is_nothing_to_say(made: Runs) -> None:
    assert verdict([made(student_alone(), 0.9), made(baseline("local_only"), private_local=0.8)]) == []


def test_one_seed_gives_a_difference_and_no_verdict(made: Runs) -> None:
    assert lines_on(ALONE, verdict([made(fedkd(), 0.92), made(student_alone(), 0.9)])) == [
        "small: accuracy on the server's test set, round 1: the shared student 0.920, the same student without a "
        "teacher 0.900: +0.020 at about the same bytes (0.400 and 0.400 MB a client): better on one seed; run other "
        "seeds before you believe it"
    ]


def test_the_first_line_is_the_shared_student_beside_dense_fedavg_and_the_second_the_remedy(made: Runs) -> None:
    ours = made(fedkd(), 0.416, num_bytes=370_000, shared_local=0.8, private_local=0.7, ensemble_local=0.85)
    others = [made(student_alone(), 0.4), made(baseline("fedavg"), 0.746, num_bytes=57_930_000, shared_local=0.9)]
    first, second, *others_lines = verdict([*others, ours])
    assert first == (
        "small: accuracy on the server's test set, round 1: the shared student 0.416, dense FedAvg of the teacher "
        "0.746: -0.330 at 99.4 % fewer bytes (0.370 MB a client, not 57.93): worse on one seed; run other seeds before "
        "you believe it"
    )
    assert second.startswith("small: remedy: a student with as many layers as its teacher (task.student.num_layers, ")
    assert len(others_lines) == 3  # beside the student alone, beside dense FedAvg on own data, own data


@pytest.mark.parametrize(("ours", "is_named"), [((0.70, 0.71), True), ((0.90, 0.91), False), ((0.70, 0.95), False)])
def test_a_remedy_is_named_where_the_student_is_worse_and_only_there(
    ours: tuple[float, float], is_named: bool, made: Runs
) -> None:
    runs = [made(fedkd(seed), score) for seed, score in enumerate(ours)]
    runs += [made(baseline("fedavg", seed), 0.85 + seed / 100) for seed in (0, 1)]
    lines = verdict(runs)
    assert bool(lines_on("remedy", lines)) == is_named
    assert lines[0].endswith(": worse" if is_named else (": better", ": no difference that can be told")[ours[0] < 0.8])


def test_without_the_dense_baseline_the_first_line_says_how_to_run_it(made: Runs) -> None:
    run = made(fedkd(), 0.9)
    assert verdict([run])[0] == (
        "small: accuracy on the server's test set, round 1: the shared student 0.900; dense FedAvg of the teacher was "
        f"not run beside it: fedkd compare {run.directory / CONFIG_FILE} --baselines"
    )


def test_a_student_that_is_no_better_than_one_answer_to_everything_is_called_so(made: Runs) -> None:
    found = {"label": "fine", "share": 0.95, "num_classes": 2, "scores": {"accuracy": 0.934}}
    for score, is_said in ((0.934, True), (0.95, False)):
        run = made(fedkd(), score)
        run.summary["majority"] = found
        said = [line for line in verdict([run]) if "is no better than always 'fine' (95 %), 0.934" in line]
        assert bool(said) == is_said


def test_a_baseline_that_is_no_better_than_one_answer_to_everything_is_called_so_last(made: Runs) -> None:
    runs = [made(fedkd(), 0.95), made(baseline("fedavg"), 0.934)]
    for run in runs:
        run.summary["majority"] = {"label": "fine", "share": 0.95, "num_classes": 2, "scores": {"accuracy": 0.934}}
    (said,) = (line for line in verdict(runs) if "is no better than" in line)
    assert said == verdict(runs)[-1] and "the shared model 0.934 is no better than always 'fine'" in said


def test_means_are_over_a_quarter_of_the_rounds_which_the_line_names(made: Runs) -> None:
    runs = [made(fedkd(), 0.8, earlier=[0.1] * 6 + [0.6]), made(baseline("fedavg"), 0.9, earlier=[0.0] * 7)]
    assert (
        "mean of rounds 7 to 8: the shared student 0.700, dense FedAvg of the teacher 0.450: +0.250" in verdict(runs)[0]
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (190_000, 100_000, "at 1.9 times the bytes (0.190 MB a client, not 0.100; set compressor.bytes_per_round"),
        (105_000, 100_000, "at about the same bytes (0.105 and 0.100 MB a client)"),
        (50_000, 100_000, "at 50.0 % fewer bytes (0.050 MB a client, not 0.100; set compressor.bytes_per_round"),
    ],
)
def test_bytes_of_both_sides_are_told_and_that_they_differ(made: Runs, ours: int, theirs: int, says: str) -> None:
    codec = "compressor={name: transform_coding}"
    runs = [made(fedkd(0, codec), 0.9, num_bytes=ours), made(student_alone(0, codec), 0.9, num_bytes=theirs)]
    assert says in lines_on(ALONE, verdict(runs))[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ((0.92, 0.93, 0.94), (0.90, 0.91, 0.92), ("+0.020 +- 0.000 over 3 seeds", "better: distillation pays")),
        ((0.90, 0.91, 0.92), (0.92, 0.93, 0.94), ("-0.020 +- 0.000 over 3 seeds", "worse: distillation does not pay")),
        ((0.92, 0.90, 0.91), (0.90, 0.91, 0.91), ("over 3 seeds", "no difference that can be told")),
        ((0.9005, 0.9105, 0.9205), (0.90, 0.91, 0.92), ("over 3 seeds", "no difference that can be told")),
    ],
)
def test_seeds_are_paired_and_a_verdict_needs_more_than_their_spread(
    made: Runs, ours: tuple[float, ...], theirs: tuple[float, ...], says: tuple[str, str]
) -> None:
    runs = [made(fedkd(seed), score) for seed, score in enumerate(ours)]
    runs += [made(student_alone(seed), score) for seed, score in reversed(list(enumerate(theirs)))]
    (line,) = lines_on(ALONE, verdict(runs))
    assert says[0] in line and line.endswith(f": {says[1]}")


def test_a_lower_loss_is_better(made: Runs) -> None:
    runs = [made(fedkd(seed), 0.5 + seed / 10, metric="loss") for seed in (0, 1)]
    runs += [made(student_alone(seed), 0.7 + seed / 10, metric="loss") for seed in (0, 1)]
    (line,) = lines_on(ALONE, verdict(runs))
    assert "-0.200" in line and line.endswith("distillation pays")


@pytest.mark.parametrize(
    "other",
    [
        "num_rounds=4",
        "compressor={name: identity}",
        "algorithm.local.num_epochs=3",
        "algorithm.student_optimizer={name: sgd, learning_rate: 0.1}",
        "algorithm.keep_student_moments=true",
        "algorithm.logit_adjustment=0.5",
        "task.partition={name: dirichlet, alpha: 0.5}",
    ],
)
def test_a_student_alone_that_differs_in_more_than_the_teacher_is_not_compared(made: Runs, other: str) -> None:
    assert lines_on(ALONE, verdict([made(fedkd(), 0.92), made(student_alone(0, other), 0.9)])) == []
    assert len(lines_on(ALONE, verdict([made(fedkd(0, other), 0.92), made(student_alone(0, other), 0.9)]))) == 1


def test_another_seed_is_not_compared(made: Runs) -> None:
    assert lines_on(ALONE, verdict([made(fedkd(0), 0.92), made(student_alone(1), 0.9)])) == []


def test_each_experiment_is_judged_by_itself(made: Runs) -> None:
    paper = "algorithm={name: fedkd_paper, local: {num_epochs: 1, batch_size: 128}}"
    runs = [made(fedkd(), 0.92), made(student_alone(), 0.9)]
    runs += [made(fedkd(0, paper, "name=paper"), 0.88), made(student_alone(0, paper, "name=paper"), 0.9)]
    lines = lines_on(ALONE, verdict(runs))
    assert [line.split(":")[0] for line in lines] == ["small", "paper"]
    assert "+0.020" in lines[0] and "-0.020" in lines[1]


def test_what_clients_predict_with_is_held_against_both_ways_to_have_a_teacher(made: Runs) -> None:
    ours = made(fedkd(), shared_local=0.8, private_local=0.7, ensemble_local=0.85)
    alone = made(baseline("local_only"), private_local=0.75)
    dense = made(baseline("fedavg"), shared_local=0.9)
    than_alone, than_fedavg, of_models = verdict([ours, alone, dense])
    assert of_models == (
        "small (seed 0): accuracy on the clients' own test data, after round 1: the shared student 0.800, the private "
        "teachers 0.700, both together 0.850"
    )
    own = "accuracy on the clients' own test data, after round 1: both together 0.850"
    assert f"{own}, teachers that train alone 0.750: +0.100" in than_alone
    assert f"{own}, dense FedAvg of the teacher 0.900: -0.050" in than_fedavg


def test_a_teacher_alone_is_the_same_whatever_the_compressor(made: Runs) -> None:
    ours = made(fedkd(0, "compressor={name: identity}"), shared_local=0.8, private_local=0.7, ensemble_local=0.85)
    assert len(verdict([ours, made(baseline("local_only"), private_local=0.75)])) == 2


@pytest.mark.parametrize("chosen", ["student", "teacher", "ensemble"])
@pytest.mark.parametrize(("student", "best"), [(0.9, "student"), (0.8505, None)])
def test_a_better_choice_of_what_to_predict_with_is_named_if_it_is_better_by_more_than_nothing(
    made: Runs, chosen: str, student: float, best: str | None
) -> None:
    run = made(
        fedkd(0, f"algorithm.predict_with={chosen}"), shared_local=student, private_local=0.85, ensemble_local=0.85
    )
    (line,) = verdict([run])
    assert line.endswith(f"best on it: predict_with student, this run has {chosen}") == (
        best is not None and chosen != best
    )


@pytest.mark.parametrize(
    "state", [{"status": "unfinished"}, {"status": "failed"}, {"stopped_early": "target"}], ids=str
)
def test_a_run_that_was_not_carried_through_is_left_out(made: Runs, state: dict[str, str]) -> None:
    assert verdict([made(fedkd(), 0.9, **state), made(student_alone(), 0.8)]) == []  # type: ignore[arg-type]
    lines = verdict([made(fedkd(), 0.9), made(student_alone(), 0.8, **state)])  # type: ignore[arg-type]
    assert lines_on(ALONE, lines) == []


@pytest.mark.parametrize("text", [None, "{", "[1]", "name: x\n"], ids=["lost", "torn", "a list", "of another version"])
def test_a_run_whose_configuration_can_not_be_read_is_left_out(made: Runs, text: str | None) -> None:
    run = made(fedkd(), 0.9)
    (run.directory / CONFIG_FILE).unlink()
    if text is not None:
        (run.directory / CONFIG_FILE).write_text(text)
    assert verdict([run, made(student_alone(), 0.8)]) == []
