import pytest
import torch
from torch import nn

from fedkd_flwr.algorithms.base import Trained
from fedkd_flwr.algorithms.fedavg import FedAvgOptions
from fedkd_flwr.algorithms.fedprox import FedProxOptions, proximal_penalty
from fedkd_flwr.algorithms.loop import LocalTraining, OptimizerOptions
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.protocols import ClientData, Task
from tests.algorithms.conftest import FIRST, LOCAL, ONE_STEP, SEED, SGD, norm, same


def upload(options: FedAvgOptions | FedProxOptions, task: Task, data: ClientData) -> Arrays:
    algorithm = options.build(task, SEED)
    trained: Trained = algorithm.client.train(algorithm.shared.initial(), {}, data, FIRST)
    assert trained.upload is not None
    return trained.upload


@pytest.mark.parametrize("optimizer", [OptimizerOptions(), SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_without_a_penalty_it_is_fedavg_bit_for_bit(
    task: Task, data: ClientData, model: str, optimizer: OptimizerOptions
) -> None:
    options = {"model": model, "local": LOCAL, "optimizer": optimizer}
    fedavg = upload(FedAvgOptions.model_validate(options), task, data)
    assert same(upload(FedProxOptions.model_validate({**options, "proximal_mu": 0.0}), task, data), fedavg)


def test_a_larger_penalty_moves_less(task: Task, data: ClientData) -> None:
    local = LocalTraining(num_epochs=2, batch_size=16)
    norms = [
        norm(upload(FedProxOptions(model="student", proximal_mu=mu, local=local, optimizer=SGD), task, data))
        for mu in (0.0, 1.0, 5.0, 15.0)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 0.7 * norms[0]


def test_the_first_step_is_free(task: Task, data: ClientData) -> None:
    # The penalty's gradient is zero at the shared model itself, so the anchor must be what was received.
    fedprox = FedProxOptions(model="student", proximal_mu=10.0, local=ONE_STEP, optimizer=SGD)
    fedavg = FedAvgOptions(model="student", local=ONE_STEP, optimizer=SGD)
    assert same(upload(fedprox, task, data), upload(fedavg, task, data))


def test_the_anchor_is_the_model_of_this_round_and_not_version_0(task: Task, data: ClientData) -> None:
    fedprox = FedProxOptions(model="student", proximal_mu=10.0, local=ONE_STEP, optimizer=SGD).build(task, SEED)
    fedavg = FedAvgOptions(model="student", local=ONE_STEP, optimizer=SGD).build(task, SEED)
    version_0 = fedavg.shared.initial()
    first = fedavg.client.train(version_0, {}, data, FIRST).upload
    assert first is not None
    version_1 = fedavg.shared.apply(version_0, first)
    uploads = [algorithm.client.train(version_1, {}, data, FIRST).upload for algorithm in (fedprox, fedavg)]
    assert uploads[0] is not None
    assert uploads[1] is not None
    assert same(uploads[0], uploads[1])


def line(weights: list[float], bias: float) -> nn.Linear:
    layer = nn.Linear(len(weights), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights]))
        layer.bias.fill_(bias)
    return layer


def test_the_penalty_is_half_mu_times_the_squared_distance() -> None:
    layer = line([1.0, 2.0], bias=0.5)
    penalty = proximal_penalty(layer, mu=0.4)
    assert float(penalty(layer).detach()) == 0.0
    value = penalty(line([1.0, 5.0], bias=-1.5))
    assert float(value.detach()) == pytest.approx(0.4 / 2 * (0.0 + 9.0 + 4.0))


def test_the_gradient_of_the_penalty_is_mu_times_the_displacement() -> None:
    penalty = proximal_penalty(line([1.0, 2.0], bias=0.5), mu=0.4)
    moved = line([1.0, 5.0], bias=-1.5)
    penalty(moved).backward()
    torch.testing.assert_close(moved.weight.grad, torch.tensor([[0.0, 0.4 * 3.0]]))
    torch.testing.assert_close(moved.bias.grad, torch.tensor([0.4 * -2.0]))


def test_the_anchor_stays_while_the_model_moves() -> None:
    layer = line([1.0, 2.0], bias=0.0)
    penalty = proximal_penalty(layer, mu=2.0)
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert float(penalty(layer).detach()) == pytest.approx(2.0)


def test_a_frozen_parameter_costs_nothing() -> None:
    layer = line([1.0, 2.0], bias=0.0)
    layer.bias.requires_grad_(False)
    penalty = proximal_penalty(layer, mu=2.0)
    moved = line([1.0, 3.0], bias=7.0)
    assert float(penalty(moved).detach()) == pytest.approx(1.0)
