from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.algorithms.loop import LocalTraining, forward, run_epochs, train_supervised
from fedkd_flwr.algorithms.optimizer import Optimizer, OptimizerOptions
from fedkd_flwr.core.protocols import Batch, ClientData, Outputs, Task, score_of
from fedkd_flwr.tasks.base import TensorExamples
from tests.algorithms.conftest import SGD, same
from tests.algorithms.little import Little

NUM_EXAMPLES = 10


def of(seed: int) -> Assignment:
    return Assignment(progress=0.0, seed=seed)


def nothing() -> Tensor:
    """A loss that no parameter is part of."""
    return torch.zeros((), requires_grad=True)


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in module.named_parameters()}


def epochs(num_epochs: int, seed: int, batch_size: int = 4) -> list[list[int]]:
    """The examples that each epoch's steps saw, in order."""
    seen: list[int] = []

    def loss_of(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        seen.extend(batch["id"].tolist())
        return nothing(), {}

    examples = TensorExamples({"id": torch.arange(NUM_EXAMPLES)})
    run_epochs(examples, LocalTraining(num_epochs=num_epochs, batch_size=batch_size), of(seed), [], loss_of)
    return [seen[start : start + NUM_EXAMPLES] for start in range(0, len(seen), NUM_EXAMPLES)]


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

    def loss_of(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        return nothing(), {"step": torch.tensor(next(sizes)), "size": torch.tensor(len(batch["id"]))}

    local = LocalTraining(num_epochs=2, batch_size=2)
    measures = run_epochs(TensorExamples({"id": torch.arange(5)}), local, of(0), [], loss_of)
    assert measures == {"step": [0, 1, 2, 3, 4, 5], "size": [2, 2, 1, 2, 2, 1]}


def test_supervised_training_lowers_the_loss_and_reports_its_mean(task: Task, data: ClientData) -> None:
    module = task.build_models(0).student
    before = score_of(task, module, data.train)["loss"]
    options = OptimizerOptions(learning_rate=0.01)
    local = LocalTraining(num_epochs=3, batch_size=16)
    metrics = train_supervised(task, module, Optimizer(options, module.named_parameters()), data.train, local, of(0))
    after = score_of(task, module, data.train)["loss"]
    assert metrics.keys() == {"train_loss"}
    assert after < metrics["train_loss"] < before


def test_a_penalty_moves_the_model_but_is_not_part_of_the_reported_loss(task: Task, data: ClientData) -> None:
    def trained(penalty: float | None) -> tuple[dict[str, np.ndarray], float]:
        module = task.build_models(0).student
        local = LocalTraining(num_epochs=1, batch_size=len(data.train))
        optimizer = Optimizer(SGD, module.named_parameters())
        added = None if penalty is None else lambda m: penalty * m.classifier.bias.sum()
        metrics = train_supervised(task, module, optimizer, data.train, local, of(0), added)
        return weights(module), metrics["train_loss"]

    (plain, loss), (pushed, loss_of_pushed) = trained(None), trained(3.0)
    assert loss_of_pushed == loss
    moved = pushed["classifier.bias"] - plain["classifier.bias"]
    np.testing.assert_allclose(moved, np.full(10, -0.05 * 3.0), rtol=1e-5)
    assert np.array_equal(pushed["classifier.weight"], plain["classifier.weight"])


# Several batches for one step


def moved_by(local: LocalTraining, num_examples: int, optimizer: OptimizerOptions = SGD) -> dict[str, np.ndarray]:
    """Weights of a linear model after training on the same examples in the same order."""
    generator = torch.Generator().manual_seed(3)
    examples = TensorExamples(
        {
            "x": torch.randn(num_examples, 4, generator=generator),
            "labels": torch.randint(3, (num_examples,), generator=generator),
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Linear(4, 3)
    train_supervised(LINES, module, Optimizer(optimizer, module.named_parameters()), examples, local, of(5))
    return weights(module)


class Lines:
    """As much of a task as training needs."""

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        return Outputs(model(batch["x"]), batch["labels"], class_weights=CLASS_WEIGHTS.get("now"))


LINES: Task = Lines()  # type: ignore[assignment]
CLASS_WEIGHTS: dict[str, Tensor] = {}


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "accumulate"),
    [(16, 8, 2), (32, 4, 4), (21, 8, 2), (27, 8, 2), (5, 8, 2), (11, 1, 4)],
    ids=str,
)
def test_accumulated_batches_are_one_larger_batch(num_examples: int, batch_size: int, accumulate: int) -> None:
    parted = moved_by(LocalTraining(num_epochs=2, batch_size=batch_size, accumulate=accumulate), num_examples)
    whole = moved_by(LocalTraining(num_epochs=2, batch_size=batch_size * accumulate), num_examples)
    for name, value in whole.items():
        np.testing.assert_allclose(parted[name], value, atol=1e-6)
    apart = moved_by(LocalTraining(num_epochs=2, batch_size=batch_size), num_examples)
    if num_examples > batch_size:
        assert any(not np.allclose(parted[name], value, atol=1e-6) for name, value in apart.items())


@pytest.mark.parametrize(("num_examples", "expected"), [(16, 2), (17, 4), (32, 4), (33, 6), (1, 2)])
def test_the_steps_of_a_round_are_counted_with_what_is_left_of_an_epoch(num_examples: int, expected: int) -> None:
    local = LocalTraining(num_epochs=2, batch_size=8, accumulate=2)
    taken: list[tuple[float, float]] = []

    class Counter(Optimizer):
        def step(self, before: float = 0.0, after: float = 1.0) -> None:
            taken.append((before, after))

    counter = Counter(SGD, [])
    examples = TensorExamples({"id": torch.arange(num_examples)})
    assignment = Assignment(0.0, 0, begin=0.25, end=0.5)
    run_epochs(examples, local, assignment, [counter], lambda batch: (nothing(), {}))
    assert len(taken) == expected == local.num_steps(num_examples)
    # The steps lie end to end between the beginning and the end of the round.
    assert taken[0][0] == 0.25
    assert taken[-1][1] == 0.5
    assert [after for _, after in taken[:-1]] == [before for before, _ in taken[1:]]


def test_batches_beyond_those_that_were_expected_stay_within_the_round() -> None:
    class Singly(TensorExamples):
        def batches(self, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
            return super().batches(1, seed)

    places: list[float] = []

    class Counter(Optimizer):
        def step(self, before: float = 0.0, after: float = 1.0) -> None:
            places.append(after)

    run_epochs(
        Singly({"id": torch.arange(4)}),
        LocalTraining(num_epochs=1, batch_size=2),
        Assignment(0.0, 0, begin=0.0, end=0.5),
        [Counter(SGD, [])],
        lambda batch: (nothing(), {}),
    )
    assert places == [0.25, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(("number", "place"), [(1, (0.0, 0.25)), (4, (0.75, 1.0)), (5, (1.0, 1.0)), (9, (1.0, 1.0))])
def test_a_round_has_its_place_in_the_run(number: int, place: tuple[float, float]) -> None:
    assignment = Assignment.of_round(number, 4, progress=0.5, seed=1)
    assert (assignment.begin, assignment.end) == place


# What it runs on


def test_the_loss_of_training_counts_each_label_by_the_weight_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    local = LocalTraining(num_epochs=1, batch_size=8)
    plain = moved_by(local, 8)
    monkeypatch.setitem(CLASS_WEIGHTS, "now", torch.tensor([2.0, 2.0, 2.0]))
    alike = moved_by(local, 8)
    monkeypatch.setitem(CLASS_WEIGHTS, "now", torch.tensor([5.0, 1.0, 1.0]))
    weighted = moved_by(local, 8)
    for name, value in plain.items():
        np.testing.assert_allclose(alike[name], value, atol=1e-6)
    assert not np.allclose(weighted["weight"], plain["weight"], atol=1e-4)


def test_bfloat16_trains_and_leaves_parameters_of_float32(task: Task, data: ClientData) -> None:
    def trained(precision: str) -> tuple[nn.Module, float]:
        module = task.build_models(0).student
        local = LocalTraining.model_validate({"num_epochs": 3, "batch_size": 16, "precision": precision})
        optimizer = Optimizer(OptimizerOptions(learning_rate=0.01), module.named_parameters())
        train_supervised(task, module, optimizer, data.train, local, of(0))
        state = optimizer.read_state("")
        assert {value.dtype for name, value in state.items() if not name.endswith("/step")} == {np.dtype(np.float32)}
        return module, score_of(task, module, data.train)["loss"]

    before = score_of(task, task.build_models(0).student, data.train)["loss"]
    (half, loss_of_half), (whole, loss_of_whole) = trained("bfloat16"), trained("float32")
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert not same(weights(half), weights(whole))
    assert loss_of_half < 0.95 * before
    assert loss_of_half == pytest.approx(loss_of_whole, rel=0.1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_a_forward_pass_returns_is_float32_in_any_precision(precision: str) -> None:
    little = Little()
    module, seen = little.build_models(0).student, []
    module.classifier.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    local = LocalTraining.model_validate({"precision": precision})
    batch = next(little.test_data().batches(4))
    out = forward(little, module, batch, local, hidden_states=True, attentions=True)
    assert seen == [getattr(torch, precision)]
    assert {t.dtype for t in (out.logits, *(out.hidden_states or ()), *(out.attentions or ()))} == {torch.float32}
    nothing_asked = forward(little, module, batch, local)
    assert (nothing_asked.hidden_states, nothing_asked.attentions) == (None, None)


def test_a_model_is_compiled_once_before_it_trains_and_keeps_its_names() -> None:
    local, module = LocalTraining(compile=True), nn.Linear(2, 2).eval()
    names = list(module.state_dict())
    calls: list[object] = []
    compiled = nn.Module.compile

    def counted(self: nn.Module, *args: object, **kwargs: object) -> None:
        calls.append(self)
        compiled(self, *args, backend="eager", **kwargs)  # without a C++ compiler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", counted)
        local.place(module)
        assert calls == []
        local.prepare(module)
        local.prepare(module)
    assert len(calls) == 1
    assert module.training
    assert list(module.state_dict()) == names
    expected = module.weight.sum() + module.bias.sum()
    torch.testing.assert_close(module(torch.ones(1, 2)).sum(), expected)


def test_a_gpu_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = nn.Linear(2, 2)
    for device in ("auto", "cpu"):
        LocalTraining.model_validate({"device": device}).place(module)
        assert module.weight.device.type == "cpu"
    with pytest.raises(ValueError, match=r"^algorithm\.local\.device: cuda was asked for.*use auto or cpu$"):
        LocalTraining(device="cuda").place(module)


@pytest.mark.parametrize(("device", "expected"), [("auto", ["cuda"]), ("cuda", ["cuda"]), ("cpu", ["cpu"])])
def test_a_gpu_is_used_where_there_is_one(device: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module, places = nn.Linear(2, 2), []
    monkeypatch.setattr(module, "to", lambda place: places.append(place.type))
    LocalTraining.model_validate({"device": device}).place(module)
    assert places == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_moments_go_on_on_a_gpu(precision: str) -> None:
    local = LocalTraining.model_validate({"precision": precision})
    module = nn.Linear(4, 3)
    local.place(module)
    state: dict[str, np.ndarray] = {}
    for _ in range(2):
        optimizer = Optimizer(OptimizerOptions(), module.named_parameters())
        optimizer.write_state("", state)
        module(torch.ones(2, 4, device="cuda")).sum().backward()
        optimizer.step()
        state = optimizer.read_state("")
    assert state["weight/step"] == 2
