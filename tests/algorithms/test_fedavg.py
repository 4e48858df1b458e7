from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.algorithms.fedavg import FedAvgOptions
from fedkd_flwr.algorithms.fedprox import FedProxOptions
from fedkd_flwr.algorithms.optimizer import OptimizerOptions, RateSchedule
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.modules import read_arrays
from fedkd_flwr.core.protocols import ClientData, Task, score_of
from tests.algorithms.conftest import FIRST, LOCAL, ONE_STEP, SECOND, SEED, SGD, copied, norm, same
from tests.algorithms.little import Little, Net

WHICH_ALGORITHM = pytest.mark.parametrize("options", [FedAvgOptions, FedProxOptions], ids=["fedavg", "fedprox"])
WHICH = pytest.mark.parametrize("which", ["teacher", "student"])


@WHICH
def test_the_chosen_model_is_shared(task: Task, which: Literal["teacher", "student"]) -> None:
    algorithm = FedAvgOptions(model=which).build(task, SEED)
    expected = read_arrays(getattr(task.build_models(SEED), which))
    assert algorithm.exchanges == "updates"
    assert same(algorithm.shared.initial(), expected)


@WHICH
def test_one_step_of_sgd_uploads_minus_the_rate_times_the_gradient(
    task: Task, data: ClientData, which: Literal["teacher", "student"]
) -> None:
    algorithm = FedAvgOptions(model=which, local=ONE_STEP, optimizer=SGD).build(task, SEED)
    upload = algorithm.client.train(algorithm.shared.initial(), {}, data, FIRST).upload
    module = getattr(task.build_models(SEED), which)
    batch = next(iter(data.train.batches(len(data.train))))
    functional.cross_entropy(module(pixel_values=batch["pixel_values"]).logits, batch["labels"]).backward()
    assert upload is not None
    assert upload.keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        # The update is a difference of float32 weights of size about 1.
        np.testing.assert_allclose(upload[name], -0.05 * parameter.grad.numpy(), rtol=1e-3, atol=1e-6)


def test_the_same_seed_uploads_the_same_bytes_and_another_seed_others(task: Task, data: ClientData) -> None:
    algorithm = FedAvgOptions(model="student", local=LOCAL).build(task, SEED)
    first, again, other = (
        algorithm.client.train(algorithm.shared.initial(), {}, data, assignment).upload
        for assignment in (FIRST, FIRST, SECOND)
    )
    assert first is not None
    assert again is not None
    assert other is not None
    assert same(first, again)
    assert not same(first, other)


def test_the_global_random_state_has_no_part_in_training(task: Task, data: ClientData) -> None:
    algorithm = FedAvgOptions(model="student", local=LOCAL).build(task, SEED)
    uploads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        uploads.append(algorithm.client.train(algorithm.shared.initial(), {}, data, FIRST).upload)
    assert uploads[0] is not None
    assert uploads[1] is not None
    assert same(uploads[0], uploads[1])


def test_training_leaves_the_shared_arrays_alone_and_keeps_nothing(task: Task, data: ClientData) -> None:
    algorithm = FedAvgOptions(model="student", local=LOCAL).build(task, SEED)
    shared = algorithm.shared.initial()
    kept = copied(shared)
    trained = algorithm.client.train(shared, algorithm.client.initial_private(data), data, FIRST)
    assert same(shared, kept)
    assert trained.private == {}


def test_evaluation_scores_the_shared_model_on_the_clients_test_images(task: Task, data: ClientData) -> None:
    algorithm = FedAvgOptions(model="student", local=LOCAL).build(task, SEED)
    algorithm.client.train(algorithm.shared.initial(), {}, data, FIRST)
    scores = algorithm.client.evaluate(algorithm.shared.initial(), {}, data)
    assert scores == {"shared": score_of(task, task.build_models(SEED).student, data.test)}


def test_a_client_has_no_model_of_its_own_to_export(task: Task, data: ClientData, tmp_path: Path) -> None:
    algorithm = FedAvgOptions(model="student").build(task, SEED)
    assert algorithm.client.export_private(algorithm.shared.initial(), {}, data, tmp_path / "private") is False
    assert not (tmp_path / "private").exists()


def test_the_place_of_a_round_in_the_run_decides_its_rates(task: Task, data: ClientData) -> None:
    optimizer = OptimizerOptions(name="sgd", learning_rate=0.05, schedule=RateSchedule(warmup=0.5, decay="linear"))
    algorithm = FedAvgOptions(model="student", local=ONE_STEP, optimizer=optimizer).build(task, SEED)
    full, *uploads = (
        algorithm.client.train(algorithm.shared.initial(), {}, data, assignment).upload
        for assignment in (FIRST, *(Assignment.of_round(n, 4, progress=0.0, seed=FIRST.seed) for n in (1, 2, 3, 4)))
    )
    assert full is not None
    # A round of one step: a quarter of the run, of which the first half is warm-up. FIRST takes itself for all of it.
    for upload, factor in zip(uploads, (0.5, 1.0, 1.0, 0.5), strict=True):
        assert upload is not None
        assert norm(upload) == pytest.approx(factor * norm(full), rel=1e-3)


@WHICH_ALGORITHM
def test_moments_are_forgotten_unless_they_are_to_be_kept(options: type[FedAvgOptions | FedProxOptions]) -> None:
    little = Little()
    data = little.client_data(0)

    def second_round(keep: bool, private: Arrays | None = None) -> tuple[Arrays, Arrays]:
        algorithm = options(model="student", keep_moments=keep).build(little, SEED)
        shared = algorithm.shared.initial()
        kept = algorithm.client.train(shared, {}, data, FIRST).private if private is None else private
        trained = algorithm.client.train(shared, kept, data, SECOND)
        assert trained.upload is not None
        return trained.upload, trained.private

    forgetful, nothing = second_round(keep=False)
    lasting, kept = second_round(keep=True)
    afresh, _ = second_round(keep=True, private={})
    assert nothing == {}
    assert same(forgetful, afresh)
    assert not same(forgetful, lasting)
    assert {float(value) for name, value in kept.items() if name.endswith("/step")} == {4.0}
    assert all(name.startswith("optimizer/") for name in kept)


@WHICH_ALGORITHM
def test_different_teachers_can_not_be_averaged_but_the_student_can(
    options: type[FedAvgOptions | FedProxOptions],
) -> None:
    little = Little(teachers=(Net(), Net(width=6)))
    with pytest.raises(ValueError) as caught:
        options(model="teacher").build(little, SEED)
    assert str(caught.value) == (
        "algorithm.model: clients have different teachers, whose updates can't be averaged; set model to student"
    )
    assert options(model="student").build(little, SEED).exchanges == "updates"
