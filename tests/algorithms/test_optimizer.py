from itertools import pairwise
from math import cos, pi

import numpy as np
import pytest
import torch
from torch import nn

from fedkd_flwr.algorithms.optimizer import Optimizer, OptimizerOptions, RateSchedule
from tests.algorithms.conftest import SGD, copied, same

KINDS = [
    OptimizerOptions(name="adam", learning_rate=0.1),
    OptimizerOptions(name="adam", learning_rate=0.1, weight_decay=0.1),
    OptimizerOptions(name="adamw", learning_rate=0.1, weight_decay=0.1),
    OptimizerOptions(name="sgd", learning_rate=0.1, momentum=0.9),
    OptimizerOptions(name="sgd", learning_rate=0.1),
    OptimizerOptions(name="adam", learning_rate=0.1, max_grad_norm=0.5),
]


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


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_parameter_whose_memory_is_strided_moves_as_any_other(options: OptimizerOptions) -> None:
    def moved(*, strided: bool) -> np.ndarray:
        start = torch.linspace(-1, 1, 12).reshape(4, 3)
        parameter = nn.Parameter(start.t().contiguous().t() if strided else start.clone())
        assert parameter.is_contiguous() is not strided
        state: dict[str, np.ndarray] = {}
        for begin in (0, 3):
            optimizer = Optimizer(options, [("w", parameter)])
            optimizer.write_state("kept/", state)
            for step in range(begin, begin + 3):
                ((parameter * torch.arange(12.0).reshape(4, 3) + step) ** 2).sum().backward()
                optimizer.step()
            state = optimizer.read_state("kept/")
        return parameter.detach().numpy().copy()

    np.testing.assert_allclose(moved(strided=True), moved(strided=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_parameter_may_get_its_first_gradient_later_than_others(options: OptimizerOptions) -> None:
    early, late = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = Optimizer(options, [("early", early), ("late", late)])
    (early**2).sum().backward()
    optimizer.step()
    assert torch.equal(late, torch.ones(2, 2))
    (early**2 + late**2).sum().backward()
    optimizer.step()
    assert (late < 1).all()


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


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_weight_decay_is_for_parameters_with_two_axes_or_more(name: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(1, 2, 3))
    before = weights(module)
    options = OptimizerOptions.model_validate({"name": name, "learning_rate": 0.1, "weight_decay": 0.5})
    optimizer = Optimizer(options, module.named_parameters())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {name for name, value in weights(module).items() if not np.array_equal(value, before[name])}
    assert changed == {"0.weight", "2.weight"}
    if name != "adam":  # which divides the decay by its own size
        np.testing.assert_allclose(weights(module)["0.weight"], (1 - 0.1 * 0.5) * before["0.weight"], rtol=1e-6)


# The learning rate over the run


def factors(schedule: RateSchedule, num_rounds: int, num_steps: int) -> list[float]:
    """The factor of every step of a run of equal rounds."""
    total = num_rounds * num_steps
    return [schedule.factor(step / total, (step + 1) / total) for step in range(total)]


def test_without_a_schedule_every_step_has_the_chosen_rate() -> None:
    assert factors(RateSchedule(), 3, 2) == [1.0] * 6


def test_the_warm_up_is_a_share_of_the_whole_run_and_its_first_step_counts() -> None:
    assert factors(RateSchedule(warmup=0.5), 2, 4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_a_linear_decay_by_hand() -> None:
    assert factors(RateSchedule(decay="linear"), 2, 2) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert factors(RateSchedule(decay="linear", final=0.2), 2, 2) == pytest.approx([1, 0.8, 0.6, 0.4])


def test_a_cosine_decay_by_hand() -> None:
    expected = [(1 + cos(pi * t)) / 2 for t in (0, 0.25, 0.5, 0.75)]
    assert factors(RateSchedule(decay="cosine"), 2, 2) == pytest.approx(expected)
    schedule = RateSchedule(decay="cosine", final=0.5)
    assert [schedule.factor(t, 1.0) for t in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.75, 0.5])


def test_the_decay_begins_where_the_warm_up_ends() -> None:
    # Ten steps: two of warm-up, then eight from 1 down to where 0 would be next.
    expected = [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert factors(RateSchedule(warmup=0.2, decay="linear"), 5, 2) == pytest.approx(expected)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize(("num_rounds", "num_steps"), [(1, 1), (1, 2), (3, 1), (7, 5)])
def test_no_step_of_a_run_is_without_effect(decay: str, num_rounds: int, num_steps: int) -> None:
    schedule = RateSchedule.model_validate({"warmup": 0.3, "decay": decay})
    assert all(0 < factor <= 1 for factor in factors(schedule, num_rounds, num_steps))


def test_a_run_of_one_round_and_one_of_many_have_the_same_rates() -> None:
    schedule = RateSchedule(warmup=0.25, decay="cosine")
    assert factors(schedule, 12, 1) == pytest.approx(factors(schedule, 3, 4))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_step_moves_by_the_rate_of_its_place_in_the_run(name: str) -> None:
    def moved(schedule: RateSchedule, before: float, after: float) -> float:
        module = nn.Linear(1, 1, bias=False)
        start = float(module.weight.detach())
        options = OptimizerOptions.model_validate({"name": name, "learning_rate": 0.1, "schedule": schedule})
        optimizer = Optimizer(options, module.named_parameters())
        module.weight.grad = torch.ones(1, 1)
        optimizer.step(before, after)
        return start - float(module.weight.detach())

    assert moved(RateSchedule(), 0.9, 1.0) == pytest.approx(0.1, rel=1e-4)
    assert moved(RateSchedule(decay="linear"), 0.9, 1.0) == pytest.approx(0.01, rel=1e-4)
    assert moved(RateSchedule(warmup=0.5), 0.0, 0.1) == pytest.approx(0.02, rel=1e-4)


def test_the_rate_of_one_step_is_not_that_of_the_next() -> None:
    module = nn.Linear(1, 1, bias=False)
    optimizer = Optimizer(
        OptimizerOptions(name="sgd", learning_rate=1.0, schedule=RateSchedule(decay="linear")),
        module.named_parameters(),
    )
    places = []
    for before, after in ((0.0, 0.5), (0.5, 1.0)):
        places.append(float(module.weight.detach()))
        module.weight.grad = torch.ones(1, 1)
        optimizer.step(before, after)
    places.append(float(module.weight.detach()))
    assert [a - b for a, b in pairwise(places)] == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("wrong", [{"warmup": 1.0}, {"warmup": -0.1}, {"final": 1.1}, {"decay": "step"}, {"hold": 1}])
def test_a_schedule_that_can_not_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        RateSchedule.model_validate(wrong)
