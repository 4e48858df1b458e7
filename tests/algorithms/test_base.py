from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ViTForImageClassification

from fedkd_flwr.algorithms.base import MeanUpdateServer, SharedModel, num_parameters
from fedkd_flwr.compressors.identity import IdentityOptions
from fedkd_flwr.core.arrays import RunningMean
from fedkd_flwr.core.modules import read_arrays
from fedkd_flwr.core.protocols import Task, score_of
from tests.algorithms.conftest import FIRST, SEED, copied, same


def partly_frozen() -> nn.Module:
    """A trainable layer, a frozen one, and a BatchNorm with its two floating buffers and its integer one."""
    module = nn.ModuleDict({"free": nn.Linear(3, 3), "frozen": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    module["frozen"].requires_grad_(False)
    return module


def step(module: nn.Module) -> None:
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    out = module["norm"](module["frozen"](module["free"](inputs)))
    (out**3).sum().backward()
    torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1).step()


def test_the_update_after_a_step_is_what_moved_and_never_zero(task: Task) -> None:
    module = partly_frozen()
    shared = SharedModel(task, module)
    before = copied(read_arrays(module))
    step(module)
    after = read_arrays(module)
    update = shared.update(shared.initial())
    assert all(value.any() for value in update.values())
    assert all(np.array_equal(value, after[name] - before[name]) for name, value in update.items())


def test_the_update_has_trainable_tensors_and_floating_buffers_only(task: Task) -> None:
    module = partly_frozen()
    shared = SharedModel(task, module)
    step(module)
    update = shared.update(shared.initial())
    parameters = {"free.weight", "free.bias", "norm.weight", "norm.bias"}
    assert update.keys() == parameters | {"norm.running_mean", "norm.running_var"}


def test_version_0_has_every_tensor_and_is_no_view_of_live_weights(task: Task) -> None:
    module = partly_frozen()
    shared = SharedModel(task, module)
    kept = copied(shared.initial())
    step(module)
    assert shared.initial().keys() == module.state_dict().keys()
    assert same(shared.initial(), kept)


def test_the_update_applied_to_what_it_is_relative_to_is_the_trained_model(task: Task) -> None:
    module = partly_frozen()
    shared = SharedModel(task, module)
    step(module)
    moved = shared.apply(shared.initial(), shared.update(shared.initial()))
    trained = read_arrays(module)
    assert moved.keys() == trained.keys()
    # The integer buffer is not exchanged; all else arrives to rounding.
    for name in trained.keys() - {"norm.num_batches_tracked"}:
        np.testing.assert_allclose(moved[name], trained[name], rtol=0, atol=1e-6)
    assert moved["norm.num_batches_tracked"] == 0


def test_applying_an_update_leaves_both_arguments_alone(task: Task) -> None:
    module = partly_frozen()
    shared = SharedModel(task, module)
    step(module)
    update = shared.update(shared.initial())
    before, update_before = copied(shared.initial()), copied(update)
    moved = shared.apply(shared.initial(), update)
    assert not same(moved, before)
    assert same(shared.initial(), before)
    assert same(update, update_before)


def test_loading_arrays_sets_the_module_to_them(task: Task) -> None:
    module = partly_frozen()
    shared = SharedModel(task, module)
    step(module)
    shared.load(shared.initial())
    assert same(read_arrays(module), shared.initial())


def test_the_users_codec_serves_both_directions_for_exactly_the_updates_tensors(task: Task) -> None:
    module = partly_frozen()
    shared = SharedModel(task, module)
    wires = shared.wires(lambda spec, direction: IdentityOptions().build(spec))
    assert wires is not None
    step(module)
    update = shared.update(shared.initial())
    payload, _ = wires.uplink.encode(update, wires.uplink.initial_state(), progress=0.0, seed=0)
    decoded, _ = wires.downlink.decode(payload, wires.downlink.initial_state())
    assert same(decoded, update)


@pytest.mark.parametrize("weight", [1.0, 37.0])
def test_the_mean_of_one_upload_goes_out_as_it_came_in(task: Task, weight: float) -> None:
    shared = SharedModel(task, task.build_models(SEED).student)
    rng = np.random.default_rng(0)
    upload = {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in _spec(shared)}
    mean = RunningMean()
    mean.add(upload, weight)
    broadcast = MeanUpdateServer(shared).broadcast(mean.result(), shared.initial(), FIRST)
    assert same(broadcast, upload)


def test_the_broadcast_is_the_aggregate_itself(task: Task) -> None:
    shared = SharedModel(task, task.build_models(SEED).student)
    aggregate = {"x": np.ones(2, np.float32)}
    assert MeanUpdateServer(shared).broadcast(aggregate, shared.initial(), FIRST) is aggregate


def test_the_server_scores_the_arrays_it_is_given_and_not_the_scratch_module(task: Task) -> None:
    models = task.build_models(SEED)
    expected = score_of(task, models.student, task.test_data())
    shared = SharedModel(task, models.student)
    with torch.no_grad():
        models.student.classifier.weight.zero_()
    assert MeanUpdateServer(shared).evaluate(shared.initial(), task.test_data()) == expected


def test_the_server_exports_the_arrays_it_is_given_and_not_the_scratch_module(task: Task, tmp_path: Path) -> None:
    models = task.build_models(SEED)
    shared = SharedModel(task, models.student)
    with torch.no_grad():
        models.student.classifier.weight.zero_()
    assert MeanUpdateServer(shared).export_shared(shared.initial(), tmp_path / "student") is True
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "student")
    assert same(read_arrays(loaded), shared.initial())


def test_parameters_are_counted_without_frozen_ones_and_buffers(task: Task) -> None:
    models = task.build_models(SEED)
    teacher, student = (sum(p.numel() for p in m.parameters()) for m in (models.teacher, models.student))
    assert num_parameters(models) == (teacher, student)
    models.teacher.classifier.requires_grad_(False)
    assert num_parameters(models) == (teacher - 16 * 10 - 10, student)


def _spec(shared: SharedModel) -> tuple:
    wires = shared.wires(lambda spec, direction: IdentityOptions().build(spec))
    assert wires is not None
    return wires.uplink.spec
