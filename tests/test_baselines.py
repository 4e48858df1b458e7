"""What FedKD must beat: the same experiment without the teacher, without the others, without compression."""

from pathlib import Path

import pytest

from fedkd_flwr.algorithms.fedavg import FedAvgOptions
from fedkd_flwr.algorithms.fedkd import FedKDOptions
from fedkd_flwr.algorithms.fedprox import FedProxOptions
from fedkd_flwr.algorithms.local_only import LocalOnlyOptions
from fedkd_flwr.experiment import baselines_of, load, parse
from fedkd_flwr.report.verdict import _conditions
from tests.conftest import ROOT, SMALL, small
from tests.test_cli import fedkd as command


def test_what_changes_no_result_keeps_no_pair_apart() -> None:
    same = {
        _conditions(small(*changes), seed=True)
        for changes in (
            (),
            ("network={uplink_mbps: 1, downlink_mbps: 10}",),
            ("server.round_timeout_seconds=77",),
            ("server.keep_checkpoints=3",),
        )
    }
    assert len(same) == 1
    assert _conditions(small("server.num_train=2"), seed=True) not in same


@pytest.mark.parametrize("name", ["fedkd", "fedkd_paper"])
def test_the_baselines_are_the_student_alone_the_teacher_alone_and_dense_fedavg(name: str) -> None:
    student = "algorithm.student_optimizer={name: sgd, learning_rate: 0.3}"
    teacher = "algorithm.teacher_optimizer={name: adam, learning_rate: 0.002}"
    experiment = small(f"algorithm.name={name}", student, teacher, "algorithm.local.num_epochs=4")
    alone, local, fedavg = (of for _, of in baselines_of(experiment))
    assert isinstance(alone.algorithm, FedAvgOptions) and isinstance(fedavg.algorithm, FedAvgOptions)
    assert isinstance(local.algorithm, LocalOnlyOptions)
    assert [of.algorithm.model for of in (alone, local, fedavg)] == ["student", "teacher", "teacher"]  # type: ignore[attr-defined]
    assert [of.algorithm.optimizer.learning_rate for of in (alone, local, fedavg)] == [0.3, 0.002, 0.002]  # type: ignore[attr-defined]
    assert {of.algorithm.local.num_epochs for of in (alone, local, fedavg)} == {4}  # type: ignore[attr-defined]
    assert [of.compressor.name for of in (alone, local, fedavg)] == ["svd", "svd", "identity"]
    assert [of.name for of in (alone, local, fedavg)] == ["small_fedavg_student", "small_local_only", "small_fedavg"]
    for of in (alone, local, fedavg):
        assert (of.seed, of.num_clients, of.task, of.server) == (
            experiment.seed,
            experiment.num_clients,
            experiment.task,
            experiment.server,
        )


@pytest.mark.parametrize("keep", [False, True])
def test_the_student_alone_keeps_its_moments_where_fedkds_does(keep: bool) -> None:
    _, alone = baselines_of(small(f"algorithm.keep_student_moments={str(keep).lower()}"))[0]
    assert isinstance(alone.algorithm, FedAvgOptions)
    assert alone.algorithm.keep_moments is keep


def test_the_student_alone_keeps_what_needs_no_teacher() -> None:
    _, adjusted = baselines_of(small("algorithm.logit_adjustment=0.5"))[0]
    assert isinstance(adjusted.algorithm, FedAvgOptions)
    assert adjusted.algorithm.logit_adjustment == 0.5
    _, bound = baselines_of(small("algorithm.logit_adjustment=0.5", "algorithm.proximal_mu=0.01"))[0]
    assert isinstance(bound.algorithm, FedProxOptions)
    assert (bound.algorithm.model, bound.algorithm.proximal_mu, bound.algorithm.logit_adjustment) == (
        "student",
        0.01,
        0.5,
    )


def test_baselines_do_not_stop_early() -> None:
    stops = small("server.early_stop={metric: accuracy, target: 0.5}")
    assert stops.server.early_stop.target == 0.5
    assert all(of.server.early_stop.target is None for _, of in baselines_of(stops))


def test_clients_with_different_teachers_have_no_teacher_to_average() -> None:
    other = "task.other_teachers=[{clients: [1], model: {name: cnn, num_channels: [8], hidden_size: 16}}]"
    experiment = load(ROOT / "conf" / "mnist20_fedkd.yaml", [other])
    assert [each.name for each, _ in baselines_of(experiment)] == ["fedavg_student", "local_only"]


def test_compare_builds_everything_before_it_runs_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "small.yaml", tmp_path / "bad.yaml"
    good.write_text(SMALL)
    bad.write_text(SMALL.replace("name: fedkd", "name: fedkd\n  layer_map: [1, 2]"))
    out = tmp_path / "out"
    assert command("compare", str(good), str(bad), "--in-process", "--output-dir", str(out)) == 2
    assert "layer_map" in capsys.readouterr().err
    assert not list(out.glob("small/*"))


def test_a_baseline_resolves_to_its_own_yaml_and_not_to_fedkds() -> None:
    experiment = small()
    experiment.to_yaml()
    for _, baseline in baselines_of(experiment):
        assert parse(baseline.to_yaml(), ()) == baseline


def test_a_long_name_is_cut_to_make_room() -> None:
    assert [len(of.name) for _, of in baselines_of(small(f"name={'x' * 64}"))] == [64, 64, 64]


def test_an_algorithm_that_distils_nothing_has_none() -> None:
    assert baselines_of(small("algorithm={name: fedavg}")) == []
    assert FedKDOptions().baselines()


def test_compare_runs_the_baselines_too_and_says_whether_distillation_pays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "small.yaml"
    conf.write_text(SMALL)
    out = tmp_path / "out"
    assert command("compare", str(conf), "--baselines", "--in-process", "--output-dir", str(out)) == 0
    printed = capsys.readouterr().out
    for name in ("small", "small_fedavg_student", "small_local_only", "small_fedavg"):
        assert f"{name} (seed 1)" in printed
    first = "small: accuracy on the server's test set, round 3: the shared student 0."
    assert first in printed and "always '0' (11 %)" in printed
    assert printed.count("on one seed; run other seeds before you believe it") == 4
    (table,) = out.glob("comparison/*/table.md")
    assert f"* {first}" in table.read_text()
    assert "small: accuracy on the server" in (table.parent / "report.html").read_text()
