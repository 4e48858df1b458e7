from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fedkd_flwr.core.arrays import TensorSpec, apply_update, difference
from fedkd_flwr.core.modules import (
    exchanged_spec,
    on_device_of,
    prefixed,
    read_arrays,
    without_prefix,
    write_arrays,
)


class Tied(nn.Module):
    """Input and output embedding share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


class Buffered(nn.Module):
    """One buffer of each kind."""

    steps: torch.Tensor
    scale: torch.Tensor
    positions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("positions", torch.arange(4.0), persistent=False)


def batchnorm_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def train_a_step(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    optimizer.step()


# exchanged_spec


def test_spec_lists_parameters_in_module_order_and_then_float_buffers() -> None:
    assert exchanged_spec(batchnorm_net()) == (
        TensorSpec("0.weight", (2, 1, 3, 3)),
        TensorSpec("0.bias", (2,)),
        TensorSpec("1.weight", (2,)),
        TensorSpec("1.bias", (2,)),
        TensorSpec("3.weight", (3, 8)),
        TensorSpec("3.bias", (3,)),
        TensorSpec("1.running_mean", (2,), "buffer"),
        TensorSpec("1.running_var", (2,), "buffer"),
    )


def test_spec_leaves_out_integer_and_non_persistent_buffers() -> None:
    assert [(t.name, t.shape, t.kind) for t in exchanged_spec(Buffered())] == [
        ("weight", (2,), "parameter"),
        ("scale", (), "buffer"),
    ]


def test_spec_lists_tied_weights_once() -> None:
    assert exchanged_spec(Tied()) == (TensorSpec("embedding.weight", (6, 4)),)


def test_spec_leaves_out_frozen_parameters() -> None:
    module = batchnorm_net()
    for parameter in module[0].parameters():
        parameter.requires_grad_(False)
    names = [t.name for t in exchanged_spec(module)]
    assert names == ["1.weight", "1.bias", "3.weight", "3.bias", "1.running_mean", "1.running_var"]


# read_arrays


def test_arrays_are_copies_so_that_a_training_step_is_a_non_zero_update() -> None:
    # The published code keeps a numpy view of the live weights: every update is exactly 0.
    module = batchnorm_net()
    reference = read_arrays(module)
    train_a_step(module)
    update = difference(read_arrays(module), reference, exchanged_spec(module))
    assert [name for name, value in update.items() if not value.any()] == []


def test_arrays_hold_the_live_values_of_parameters_and_persistent_buffers_frozen_ones_included() -> None:
    module = Buffered()
    module.weight.requires_grad_(False)
    arrays = read_arrays(module)
    assert sorted(arrays) == ["scale", "steps", "weight"]
    assert (arrays["weight"].tolist(), arrays["scale"].item(), arrays["steps"].item()) == ([1.0, 1.0], 0.5, 3)
    assert (arrays["scale"].shape, arrays["steps"].shape) == ((), ())
    assert arrays["steps"].dtype == np.int64


def test_arrays_own_their_memory_and_can_be_written() -> None:
    module = batchnorm_net()
    arrays = read_arrays(module)
    for value in arrays.values():
        value += 1
    for name, value in read_arrays(module).items():
        np.testing.assert_allclose(value + 1, arrays[name], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arrays_of_any_float_type_are_float32_masters(dtype: torch.dtype) -> None:
    module = nn.Linear(3, 2).to(dtype)
    arrays = read_arrays(module)
    assert {value.dtype for value in arrays.values()} == {np.dtype(np.float32)}
    assert torch.equal(torch.from_numpy(arrays["weight"]), module.weight.detach().to(torch.float32))


def test_arrays_list_tied_weights_once() -> None:
    assert list(read_arrays(Tied())) == ["embedding.weight"]


# write_arrays


@pytest.mark.parametrize("build", [batchnorm_net, Tied, Buffered])
def test_what_was_read_can_be_written_to_another_module(build: Callable[[], nn.Module]) -> None:
    source, target = build(), build()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.5)
    write_arrays(target, read_arrays(source))
    for name, value in read_arrays(target).items():
        assert np.array_equal(value, read_arrays(source)[name])


def test_writing_undoes_training_batchnorm_counters_included() -> None:
    module = batchnorm_net()
    before = read_arrays(module)
    train_a_step(module)
    assert read_arrays(module)["1.num_batches_tracked"] == 1
    write_arrays(module, before)
    after = read_arrays(module)
    assert after["1.num_batches_tracked"] == 0
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_writing_keeps_the_parameters_that_an_optimizer_holds() -> None:
    module = Tied()
    held = module.head.weight
    write_arrays(module, {"embedding.weight": np.full((6, 4), 2.0, np.float32)})
    assert module.head.weight is held is module.embedding.weight
    assert held.requires_grad
    assert (held == 2).all()


def test_writing_does_not_tie_the_module_to_the_arrays() -> None:
    module = nn.Linear(3, 2)
    arrays = read_arrays(module)
    write_arrays(module, arrays)
    arrays["weight"] += 1
    assert not np.array_equal(read_arrays(module)["weight"], arrays["weight"])


def test_writing_to_a_bfloat16_module_rounds() -> None:
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    write_arrays(module, {"weight": np.array([[1.0 + 2.0**-12]], np.float32)})
    assert module.weight.dtype == torch.bfloat16
    assert module.weight.item() == 1.0


def test_a_float32_master_keeps_what_bfloat16_would_lose() -> None:
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    write_arrays(module, {"weight": np.ones((1, 1), np.float32)})
    master = read_arrays(module)
    for _ in range(4):
        master = apply_update(master, {"weight": np.full((1, 1), 2.0**-9, np.float32)})
    write_arrays(module, master)
    assert module.weight.item() == 1.0 + 2.0**-7


def test_a_missing_tensor_is_refused_by_name() -> None:
    module = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"tensor 'bias' needs shape \(2,\), got nothing"):
        write_arrays(module, {"weight": np.zeros((2, 3), np.float32)})


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3), ()])
def test_a_tensor_of_another_shape_is_refused_by_name(shape: tuple[int, ...]) -> None:
    module = nn.Linear(3, 2, bias=False)
    with pytest.raises(ValueError, match=r"tensor 'weight' needs shape \(2, 3\), got shape"):
        write_arrays(module, {"weight": np.zeros(shape, np.float32)})


def test_writing_looks_names_up_under_the_prefix() -> None:
    module = nn.Linear(1, 1, bias=False)
    arrays = {"weight": np.array([[1.0]], np.float32), "teacher/weight": np.array([[2.0]], np.float32)}
    write_arrays(module, arrays, prefix="teacher/")
    assert module.weight.item() == 2.0


def test_prefixes_are_taken_off_as_they_were_put_on() -> None:
    arrays = {"weight": np.ones(1), "bias": np.zeros(1)}
    mixed = prefixed("teacher/", arrays) | prefixed("student/", {"weight": np.full(1, 5.0)})
    assert sorted(mixed) == ["student/weight", "teacher/bias", "teacher/weight"]
    taken = without_prefix("teacher/", mixed)
    assert taken.keys() == arrays.keys()
    assert all(taken[name] is arrays[name] for name in arrays)


# What is frozen


def partly_frozen(seed: int = 0) -> nn.Sequential:
    module = batchnorm_net(seed)
    module[0].weight.requires_grad_(False)
    return module


def test_without_frozen_parameters_all_else_is_read() -> None:
    assert read_arrays(partly_frozen(), frozen=False).keys() == read_arrays(batchnorm_net()).keys() - {"0.weight"}
    assert read_arrays(partly_frozen()).keys() == read_arrays(batchnorm_net()).keys()


def test_without_frozen_parameters_all_else_is_written() -> None:
    source, target = partly_frozen(seed=1), partly_frozen(seed=2)
    before = read_arrays(target)
    write_arrays(target, read_arrays(source, frozen=False), frozen=False)
    after = read_arrays(target)
    assert np.array_equal(after["0.weight"], before["0.weight"])
    for name, value in read_arrays(source, frozen=False).items():
        assert np.array_equal(after[name], value)


def test_a_frozen_parameter_is_not_taken_from_whoever_sends_one() -> None:
    module = partly_frozen()
    before = read_arrays(module)
    write_arrays(module, {**before, "0.weight": before["0.weight"] + 1}, frozen=False)
    assert np.array_equal(read_arrays(module)["0.weight"], before["0.weight"])


@pytest.mark.parametrize(("frozen", "missing"), [(True, "0.weight"), (False, "0.bias"), (False, "1.running_mean")])
def test_what_is_to_be_written_must_be_there(frozen: bool, missing: str) -> None:
    module = partly_frozen()
    arrays = {name: value for name, value in read_arrays(module).items() if name != missing}
    with pytest.raises(ValueError, match=f"tensor '{missing}' needs shape"):
        write_arrays(module, arrays, frozen=frozen)


# Devices


def test_a_batch_that_is_where_the_model_is_stays_as_it_is() -> None:
    batch = {"pixels": torch.ones(2, 3), "labels": torch.zeros(2)}
    moved = on_device_of(nn.Linear(3, 1), batch)
    assert moved.keys() == batch.keys()
    assert all(moved[name] is batch[name] for name in batch)
    assert on_device_of(nn.ReLU(), batch) is batch


def test_a_batch_goes_to_where_the_model_is() -> None:
    moved = on_device_of(nn.Linear(3, 1, device="meta"), {"pixels": torch.ones(2, 3), "labels": torch.zeros(2)})
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}
