"""Federated averaging of one model.

McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017,
https://arxiv.org/abs/1602.05629, with the update instead of the weights on the wire, so that any compressor applies.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from torch import nn

from fedkd_flwr.algorithms.base import (
    Algorithm,
    AlgorithmOptions,
    Assignment,
    MeanUpdateServer,
    Metrics,
    SharedModel,
    Trained,
    num_parameters,
)
from fedkd_flwr.algorithms.loop import LocalTraining, Optimizer, OptimizerOptions, Penalty, train_supervised
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.protocols import ClientData, Task


class FedAvgOptions(AlgorithmOptions):
    """Options of FedAvg.

    Attributes:
        model: which of the task's models is shared.
        local: epochs and batch size of a client's round.
        optimizer: the client's, begun afresh each round.
    """

    name: Literal["fedavg"] = "fedavg"
    model: Literal["teacher", "student"] = "teacher"
    local: LocalTraining = LocalTraining()
    optimizer: OptimizerOptions = OptimizerOptions()

    def build(self, task: Task, seed: int) -> Algorithm:
        """FedAvg of the chosen model."""
        models = task.build_models(seed)
        shared = SharedModel(task, models.teacher if self.model == "teacher" else models.student)
        client = FedAvgClient(task, shared, self.local, self.optimizer)
        return Algorithm("updates", shared, client, MeanUpdateServer(shared), *num_parameters(models))


class FedAvgClient:
    """Client half: training from the shared model, plus a penalty on leaving it where one is given.

    Args:
        task: what is learned.
        shared: the model.
        local: epochs and batch size.
        optimizer: begun afresh each round.
        make_penalty: called with the module as received; returns what to add to the loss at every step.
    """

    def __init__(
        self,
        task: Task,
        shared: SharedModel,
        local: LocalTraining,
        optimizer: OptimizerOptions,
        make_penalty: Callable[[nn.Module], Penalty] | None = None,
    ) -> None:
        self._task = task
        self._shared = shared
        self._local = local
        self._optimizer = optimizer
        self._make_penalty = make_penalty

    def initial_private(self) -> Arrays:
        """Nothing stays on a client."""
        return {}

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """Train from `shared`; upload the difference."""
        self._shared.load(shared)
        module = self._shared.module
        optimizer = Optimizer(self._optimizer, module.named_parameters())
        penalty = self._make_penalty(module) if self._make_penalty else None
        metrics = train_supervised(self._task, module, optimizer, data.train, self._local, assignment.seed, penalty)
        return Trained(self._shared.update(shared), private, metrics)

    def evaluate(self, shared: Arrays, private: Arrays, data: ClientData) -> dict[str, Metrics]:
        """Score of the shared model."""
        return {"shared": self._shared.score(shared, data.test)}

    def export_private(self, private: Arrays, directory: Path) -> bool:
        """There is no private model."""
        return False
