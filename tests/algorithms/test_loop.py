from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from fedkd_flwr.algorithms.loop import LocalTraining, Optimizer, OptimizerOptions, run_epochs, train_supervised
from fedkd_flwr.core.protocols import Batch, ClientData, Task
from fedkd_flwr.tasks.base import TensorExamples
from tests.algorithms.conftest import SGD, copied, same

NUM_EXAMPLES = 10
KINDS = [
    OptimizerOptions(name="adam", learning_rate=0.1),
    OptimizerOptions(name="adam", learning_rate=0.1, weight_decay=0.1),
    OptimizerOptions(name="adamw", learning_rate=0.1, weight_decay=0.1),
    OptimizerOptions(name="sgd", learning_rate=0.1, momentum=0.9),
    OptimizerOptions(name="sgd", learning_rate=0.1),
    OptimizerOptions(name="adam", learning_rate=0.1, max_grad_norm=0.5),
]


def epochs(num_epochs: int, seed: int, batch_size: int = 4) -> list[list[int]]:
    """The examples that each epoch's steps saw, in order."""
    seen: list[int] = []

    def step(batch: Batch) -> Mapping[str, float]:
        seen.extend(batch["id"].tolist())
        return {}

    examples = TensorExamples({"id": torch.arange(NUM_EXAMPLES)})
    run_epochs(examples, LocalTraining(num_epochs=num_epochs, batch_size=batch_size), seed, step)
    return [seen[start : start + NUM_EXAMPLES] for start in range(0, len(seen), NUM_EXAMPLES)]


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def descend(module: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        (module(inputs) ** 2).mean().backward()
        optimizer.step()


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in module.named_parameters()}


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_every_epoch_sees_every_example_once(batch_size: int) -> None:
    found = epochs(3, seed=0, batch_size=batch_size)
    assert len(found) == 3
    assert all(sorted(epoch) == list(range(NUM_EXAMPLES)) for epoch in found)


def test_every_epoch_has_an_order_of_its_own() -> None:
    orders = {tuple(epoch) for epoch in epochs(5, seed=0)}
    assert len(orders) == 5
    assert tuple(range(NUM_EXAMPLES)) not in orders


def test_the_seed_decides_the_orders() -> None:
    assert epochs(2, seed=7) == epochs(2, seed=7)
    assert epochs(2, seed=7) != epochs(2, seed=8)


def test_a_longer_training_begins_like_a_shorter_one() -> None:
    assert epochs(4, seed=7)[:2] == epochs(2, seed=7)


def test_what_each_step_measured_comes_back_in_order() -> None:
    sizes = iter(range(100))

    def step(batch: Batch) -> Mapping[str, float]:
        return {"step": next(sizes), "size": len(batch["id"])}

    measures = run_epochs(TensorExamples({"id": torch.arange(5)}), LocalTraining(num_epochs=2, batch_size=2), 0, step)
    assert measures == {"step": [0, 1, 2, 3, 4, 5], "size": [2, 2, 1, 2, 2, 1]}


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_training_with_state_carried_over_is_uninterrupted_training_bit_for_bit(options: OptimizerOptions) -> None:
    whole = network()
    descend(whole, Optimizer(options, whole.named_parameters()), range(6))

    parted = network()
    before = Optimizer(options, parted.named_parameters())
    descend(parted, before, range(3))
    state = before.read_state("kept/")
    after = Optimizer(options, parted.named_parameters())
    after.write_state("kept/", state)
    descend(parted, after, range(3, 6))
    assert same(weights(parted), weights(whole))


def test_an_optimizer_begun_afresh_goes_another_way() -> None:
    # Else the test above could not fail.
    whole, parted = network(), network()
    descend(whole, Optimizer(KINDS[0], whole.named_parameters()), range(6))
    descend(parted, Optimizer(KINDS[0], parted.named_parameters()), range(3))
    descend(parted, Optimizer(KINDS[0], parted.named_parameters()), range(3, 6))
    assert not same(weights(parted), weights(whole))


def test_the_state_names_parameter_and_moment_under_the_prefix() -> None:
    module = network()
    optimizer = Optimizer(KINDS[0], module.named_parameters())
    descend(module, optimizer, range(1))
    names = {f"p/{name}/{key}" for name, _ in module.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")}
    assert optimizer.read_state("p/").keys() == names


def test_state_that_was_read_does_not_move_with_the_optimizer() -> None:
    module = network()
    optimizer = Optimizer(KINDS[0], module.named_parameters())
    descend(module, optimizer, range(2))
    state = optimizer.read_state("")
    kept = copied(state)
    descend(module, optimizer, range(2, 4))
    assert same(state, kept)
    assert not same(optimizer.read_state(""), kept)


def test_state_that_was_written_is_not_changed_by_later_steps() -> None:
    module = network()
    first = Optimizer(KINDS[0], module.named_parameters())
    descend(module, first, range(2))
    state = first.read_state("")
    kept = copied(state)
    second = Optimizer(KINDS[0], module.named_parameters())
    second.write_state("", state)
    descend(module, second, range(2, 4))
    assert same(state, kept)


def test_state_under_another_prefix_is_left_alone() -> None:
    module = network()
    first = Optimizer(KINDS[0], module.named_parameters())
    descend(module, first, range(2))
    second = Optimizer(KINDS[0], module.named_parameters())
    second.write_state("other/", first.read_state("kept/"))
    assert second.read_state("") == {}


def test_an_optimizer_of_nothing_does_nothing() -> None:
    module = network().requires_grad_(False)
    before = weights(module)
    optimizer = Optimizer(OptimizerOptions(max_grad_norm=1.0), module.named_parameters())
    optimizer.write_state("", {"0.weight/step": np.array(1.0)})
    optimizer.step()
    assert optimizer.read_state("") == {}
    assert same(weights(module), before)


@pytest.mark.parametrize("limit", [0.01, 0.1])
def test_the_gradient_is_clipped_to_its_norm_over_all_parameters(limit: float) -> None:
    module = network()
    before = weights(module)
    optimizer = Optimizer(
        OptimizerOptions(name="sgd", learning_rate=1.0, max_grad_norm=limit), module.named_parameters()
    )
    (module(torch.ones(1, 3)) * 100).sum().backward()
    optimizer.step()
    moved = np.concatenate([(before[name] - value).ravel() for name, value in weights(module).items()])
    assert np.linalg.norm(moved) == pytest.approx(limit, rel=1e-4)


def test_a_step_forgets_the_gradient() -> None:
    module = network()
    optimizer = Optimizer(SGD, module.named_parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert [p.grad for p in module.parameters()] == [None] * 4


def test_a_gradient_that_a_failed_round_left_behind_is_dropped() -> None:
    module, clean = network(), network()
    module(torch.ones(1, 3)).sum().backward()
    descend(module, Optimizer(SGD, module.named_parameters()), range(1))
    descend(clean, Optimizer(SGD, clean.named_parameters()), range(1))
    assert same(weights(module), weights(clean))


def test_a_frozen_parameter_stays() -> None:
    module = network()
    module[0].weight.requires_grad_(False)
    before = weights(module)
    optimizer = Optimizer(OptimizerOptions(weight_decay=0.5), module.named_parameters())
    descend(module, optimizer, range(2))
    changed = {name for name, value in weights(module).items() if not np.array_equal(value, before[name])}
    assert changed == {"0.bias", "2.weight", "2.bias"}
    assert not any(name.startswith("0.weight") for name in optimizer.read_state(""))


def test_supervised_training_lowers_the_loss_and_reports_its_mean(task: Task, data: ClientData) -> None:
    module = task.build_models(0).student
    before = task.score(module, data.train)["loss"]
    options = OptimizerOptions(learning_rate=0.01)
    local = LocalTraining(num_epochs=3, batch_size=16)
    metrics = train_supervised(task, module, Optimizer(options, module.named_parameters()), data.train, local, 0)
    after = task.score(module, data.train)["loss"]
    assert metrics.keys() == {"train_loss"}
    assert after < metrics["train_loss"] < before


def test_a_penalty_moves_the_model_but_is_not_part_of_the_reported_loss(task: Task, data: ClientData) -> None:
    def trained(penalty: float | None) -> tuple[dict[str, np.ndarray], float]:
        module = task.build_models(0).student
        local = LocalTraining(num_epochs=1, batch_size=len(data.train))
        optimizer = Optimizer(SGD, module.named_parameters())
        added = None if penalty is None else lambda m: penalty * m.classifier.bias.sum()
        metrics = train_supervised(task, module, optimizer, data.train, local, 0, added)
        return weights(module), metrics["train_loss"]

    (plain, loss), (pushed, loss_of_pushed) = trained(None), trained(3.0)
    assert loss_of_pushed == loss
    moved = pushed["classifier.bias"] - plain["classifier.bias"]
    np.testing.assert_allclose(moved, np.full(10, -0.05 * 3.0), rtol=1e-5)
    assert np.array_equal(pushed["classifier.weight"], plain["classifier.weight"])
