"""Whether distillation pays, in words, from runs that differ in nothing but the method."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedkd_flwr.report.runs import RunResult
from fedkd_flwr.report.verdict import verdict

FEDKD = {"name": "fedkd", "predict_with": "teacher"}
STUDENT_ALONE = {"name": "fedavg", "model": "student"}
TEACHER_ALONE = {"name": "local_only", "model": "teacher"}
FEDAVG = {"name": "fedavg", "model": "teacher"}
CODEC = {"name": "transform_coding"}
DENSE = {"name": "identity"}


class Runs:
    """Finished runs, made up: what they score, and the configuration that lies beside their ledger."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(
        self,
        algorithm: dict[str, Any],
        shared: float | None = None,
        *,
        seed: int = 0,
        compressor: dict[str, Any] = CODEC,
        metric: str = "accuracy",
        task: str = "digits",
        **local: float,
    ) -> RunResult:
        directory = self._directory / str(len(list(self._directory.iterdir())))
        directory.mkdir()
        config = {
            "seed": seed,
            "num_clients": 3,
            "num_rounds": 1,
            "server": {},
            "task": {"name": task},
            "algorithm": algorithm,
            "compressor": compressor,
        }
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        scores = {scope: {metric: local[scope]} if scope in local else None for scope in SCOPES}
        scores["shared_global"] = None if shared is None else {metric: shared}
        row = {"kind": "round", "round": 1, "metrics": scores}
        return RunResult(directory, {"experiment": "x", "seed": seed, "metrics": scores}, (row,))


SCOPES = ("shared_global", "shared_local", "private_local", "ensemble_local")


@pytest.fixture
def made(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_without_fedkd_there_is_nothing_to_say(made: Runs) -> None:
    assert verdict([made(STUDENT_ALONE, 0.9), made(TEACHER_ALONE, private_local=0.8)]) == []


def test_a_student_above_fedavg_of_it_pays(made: Runs) -> None:
    lines = verdict([made(FEDKD, 0.92), made(STUDENT_ALONE, 0.9)])
    assert lines == [
        "the shared student: accuracy 0.020 above FedAvg of it (0.920 and 0.900, better in 1 of 1): distillation pays"
    ]


def test_a_student_below_it_does_not_and_seeds_are_paired(made: Runs) -> None:
    fedkd = [made(FEDKD, score, seed=seed) for seed, score in enumerate((0.90, 0.80))]
    alone = [made(STUDENT_ALONE, score, seed=seed) for seed, score in enumerate((0.89, 0.85))]
    lines = verdict([*fedkd, *alone])
    assert lines == [
        "the shared student: accuracy 0.020 below FedAvg of it (0.850 and 0.870, better in 1 of 2): "
        "distillation does not pay"
    ]


def test_a_difference_below_a_thousandth_is_none(made: Runs) -> None:
    (line,) = verdict([made(FEDKD, 0.9002), made(STUDENT_ALONE, 0.9)])
    assert "no different from" in line and line.endswith("does not pay")


def test_a_lower_loss_is_better(made: Runs) -> None:
    (line,) = verdict([made(FEDKD, 0.5, metric="loss"), made(STUDENT_ALONE, 0.7, metric="loss")])
    assert "0.200 below" in line and "better in 1 of 1" in line and line.endswith("distillation pays")


@pytest.mark.parametrize("other", [{"seed": 1}, {"compressor": DENSE}, {"task": "mnist"}], ids=str)
def test_a_student_alone_under_other_conditions_is_not_compared(made: Runs, other: dict[str, Any]) -> None:
    assert verdict([made(FEDKD, 0.92), made(STUDENT_ALONE, 0.9, **other)]) == []


def test_what_clients_predict_with_is_held_against_both_ways_to_have_a_teacher(made: Runs) -> None:
    fedkd = made(FEDKD | {"predict_with": "ensemble"}, shared_local=0.8, private_local=0.7, ensemble_local=0.85)
    alone, fedavg = made(TEACHER_ALONE, private_local=0.75), made(FEDAVG, shared_local=0.9, compressor=DENSE)
    of_models, than_alone, than_fedavg = verdict([fedkd, alone, fedavg])
    assert of_models == (
        "x (seed 0): accuracy on the clients' own data: the shared student 0.800, the private teachers 0.700, "
        "both together 0.850"
    )
    assert "0.100 above teachers that train alone (0.850 and 0.750" in than_alone
    assert "0.050 below FedAvg of the teacher (0.850 and 0.900" in than_fedavg


@pytest.mark.parametrize(("chosen", "best"), [("teacher", "student"), ("student", "student"), ("ensemble", "student")])
def test_a_better_choice_of_what_to_predict_with_is_named(made: Runs, chosen: str, best: str) -> None:
    run = made(FEDKD | {"predict_with": chosen}, shared_local=0.9, private_local=0.7, ensemble_local=0.85)
    (line,) = verdict([run])
    assert line.endswith(f"best: predict_with {best}, this run has {chosen}") == (chosen != best)


def test_a_run_whose_configuration_is_lost_is_left_out(made: Runs) -> None:
    run = made(FEDKD, 0.9)
    (run.directory / "config.yaml").unlink()
    assert verdict([run, made(STUDENT_ALONE, 0.8)]) == []
