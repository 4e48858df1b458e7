from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedkd_flwr.algorithms.fedavg import FedAvgOptions
from fedkd_flwr.core.modules import read_arrays
from fedkd_flwr.core.protocols import ClientData, Task
from tests.algorithms.conftest import FIRST, LOCAL, ONE_STEP, SECOND, SEED, SGD, copied, same

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
    trained = algorithm.client.train(shared, algorithm.client.initial_private(), data, FIRST)
    assert same(shared, kept)
    assert trained.private == {}


def test_evaluation_scores_the_shared_model_on_the_clients_test_images(task: Task, data: ClientData) -> None:
    algorithm = FedAvgOptions(model="student", local=LOCAL).build(task, SEED)
    algorithm.client.train(algorithm.shared.initial(), {}, data, FIRST)
    scores = algorithm.client.evaluate(algorithm.shared.initial(), {}, data)
    assert scores == {"shared": task.score(task.build_models(SEED).student, data.test)}


def test_a_client_has_no_model_of_its_own_to_export(task: Task, tmp_path: Path) -> None:
    algorithm = FedAvgOptions(model="student").build(task, SEED)
    assert algorithm.client.export_private({}, tmp_path / "private") is False
    assert not (tmp_path / "private").exists()
