from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.algorithms.loop import LocalTraining, OptimizerOptions
from fedkd_flwr.core.arrays import Array, Arrays
from fedkd_flwr.core.predictions import Predictions
from fedkd_flwr.core.protocols import Batch, ClientData, DataReport, Examples, Models, Outputs, Range, Task
from fedkd_flwr.tasks.digits import DigitsOptions, VitOptions
from fedkd_flwr.tasks.partition import IidPartition
from fedkd_flwr.tasks.scores import predict

SEED = 11
FIRST = Assignment(progress=0.0, seed=101)
SECOND = Assignment(progress=0.5, seed=202)
# Several steps and a smaller last batch in an epoch; 128 more than the 115 images of a client: one step.
LOCAL = LocalTraining(num_epochs=1, batch_size=32)
ONE_STEP = LocalTraining(num_epochs=1, batch_size=128)
SGD = OptimizerOptions(name="sgd", learning_rate=0.05)


def vit(num_layers: int, hidden_size: int = 16, num_heads: int = 2) -> VitOptions:
    return VitOptions(num_layers=num_layers, hidden_size=hidden_size, num_heads=num_heads, intermediate_size=16)


def digits(teacher: VitOptions | None = None, student: VitOptions | None = None) -> Task:
    options = DigitsOptions(partition=IidPartition(), teacher=teacher or vit(2), student=student or vit(1))
    return options.build(10, 0)


@pytest.fixture(scope="session")
def task() -> Task:
    return digits()


@pytest.fixture(scope="session")
def narrow_student() -> Task:
    return digits(student=vit(1, hidden_size=8))


@pytest.fixture(scope="session")
def data(task: Task) -> ClientData:
    return task.client_data(0)


@pytest.fixture(scope="session")
def other_data(task: Task) -> ClientData:
    return task.client_data(1)


def same(a: Arrays, b: Arrays) -> bool:
    """Equal names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


def copied(arrays: Arrays) -> dict[str, Array]:
    return {name: np.array(value, copy=True) for name, value in arrays.items()}


def under(prefix: str, arrays: Arrays) -> dict[str, Array]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def norm(arrays: Arrays) -> float:
    return float(np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in arrays.values())))


class Without:
    """A task whose models hide what `Outputs` may carry, as transformers' default attention hides its maps."""

    def __init__(self, task: Task, **hidden: object) -> None:
        self._task = task
        self._hidden = hidden

    @property
    def counts_labels(self) -> bool:
        return self._task.counts_labels

    @property
    def metrics(self) -> Mapping[str, Range]:
        return self._task.metrics

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        out = self._task.forward(model, batch, hidden_states=hidden_states, attentions=attentions)
        return replace(out, **self._hidden)

    def client_data(self, partition_id: int) -> ClientData:
        return self._task.client_data(partition_id)

    def test_data(self) -> Examples:
        return self._task.test_data()

    def data_report(self) -> DataReport:
        return self._task.data_report()

    def build_models(self, seed: int) -> Models:
        return self._task.build_models(seed)

    def example_batch(self) -> Batch:
        return self._task.example_batch()

    def predict(self, model: nn.Module, examples: Examples) -> Predictions:
        return self._task.predict(model, examples)

    def score(self, predictions: Predictions, examples: Examples) -> Mapping[str, float]:
        return self._task.score(predictions, examples)

    def export(self, model: nn.Module, directory: Path) -> None:
        self._task.export(model, directory)


class Counting(Without):
    """A task that counts how often each model runs, and what it was asked to return."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.calls: list[tuple[int, bool, bool]] = []

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        self.calls.append((id(model), hidden_states, attentions))
        return super().forward(model, batch, hidden_states=hidden_states, attentions=attentions)

    def predict(self, model: nn.Module, examples: Examples) -> Predictions:
        return predict(self, model, examples)
