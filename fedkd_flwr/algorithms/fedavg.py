"""Federated averaging of one model.

McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017,
https://arxiv.org/abs/1602.05629, with the update instead of the weights on the wire, so that any compressor applies.
"""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field
from torch import nn

from fedkd_flwr.algorithms.base import (
    Algorithm,
    AlgorithmOptions,
    Assignment,
    MeanUpdateServer,
    Metrics,
    SharedModel,
    Trained,
    Width,
    num_parameters,
)
from fedkd_flwr.algorithms.loop import (
    LocalTraining,
    Optimizer,
    OptimizerOptions,
    Penalty,
    fine_tuned,
    prior_of,
    require_counts,
    train_supervised,
)
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.protocols import ClientData, Models, Task

_OPTIMIZER = "optimizer/"


class FedAvgOptions(AlgorithmOptions):
    """Options of FedAvg.

    Attributes:
        model: which of the task's models is shared.
        local: how a client trains in a round.
        optimizer: the client's.
        keep_moments: go on with the optimiser's moments of a client's last round; off, each round begins afresh,
            because the weights jump in between. Left out, it is on where the model's weights are loaded.
        logit_adjustment: strength of logit adjustment on each client; see `FedKDOptions`.
    """

    learns_by_acting: ClassVar[bool] = True
    name: Literal["fedavg"] = "fedavg"
    model: Literal["teacher", "student"] = "teacher"
    local: LocalTraining = LocalTraining()
    optimizer: OptimizerOptions = OptimizerOptions()
    keep_moments: bool = False
    logit_adjustment: float = Field(0.0, ge=0)

    def for_widths(self, teacher: Width | None, student: Width | None) -> Self:
        """The optimiser of fine-tuning for a model with loaded weights; see `AlgorithmOptions.for_widths`."""
        return fine_tuned(self, self.model, teacher, student)

    def build(self, task: Task, seed: int) -> Algorithm:
        """FedAvg of the chosen model.

        Raises:
            ValueError: if clients have different ones, or logits are to be adjusted and labels are not counted.
        """
        require_counts(task, self.logit_adjustment)
        models = task.build_models(seed)
        shared = SharedModel(task, common_model(models, self.model))
        client = FedAvgClient(
            task,
            shared,
            self.local,
            self.optimizer,
            keep_moments=self.keep_moments,
            logit_adjustment=self.logit_adjustment,
        )
        leaves = f"the update of the {self.model}"
        return Algorithm("updates", shared, client, MeanUpdateServer(shared), *num_parameters(models), leaves=leaves)


def common_model(models: Models, which: Literal["teacher", "student"]) -> nn.Module:
    """The chosen model, which must be the same on all clients.

    Raises:
        ValueError: if it is not.
    """
    if which == "student":
        return models.student
    if models.other_teachers:
        raise ValueError(
            "algorithm.model: clients have different teachers, whose updates can't be averaged; set model to student"
        )
    return models.teacher


class FedAvgClient:
    """Client half: training from the shared model, plus a penalty on leaving it where one is given.

    Args:
        task: what is learned.
        shared: the model.
        local: how a client trains in a round.
        optimizer: the client's.
        make_penalty: called with the module as received; returns what to add to the loss at every step.
        keep_moments: whether the optimiser goes on where it was after the client's last round.
        logit_adjustment: strength of logit adjustment on each client, >= 0.
    """

    def __init__(
        self,
        task: Task,
        shared: SharedModel,
        local: LocalTraining,
        optimizer: OptimizerOptions,
        make_penalty: Callable[[nn.Module], Penalty] | None = None,
        *,
        keep_moments: bool = False,
        logit_adjustment: float = 0.0,
    ) -> None:
        local.place(shared.module)
        self._task = task
        self._shared = shared
        self._local = local
        self._optimizer = optimizer
        self._make_penalty = make_penalty
        self._keep_moments = keep_moments
        self._logit_adjustment = logit_adjustment

    def initial_private(self, data: ClientData) -> Arrays:
        """Nothing is on a client at first."""
        return {}

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """Train from `shared`; upload the difference, and keep the moments where asked."""
        self._shared.load(shared)
        module = self._shared.module
        optimizer = Optimizer(self._optimizer, module.named_parameters())
        if self._keep_moments:
            optimizer.write_state(_OPTIMIZER, private)
        penalty = self._make_penalty(module) if self._make_penalty else None
        prior = prior_of(data, self._logit_adjustment)
        metrics = train_supervised(self._task, module, optimizer, data.train, self._local, assignment, penalty, prior)
        kept = optimizer.read_state(_OPTIMIZER) if self._keep_moments else {}
        return Trained(self._shared.update(shared), kept, metrics)

    def evaluate(self, shared: Arrays, private: Arrays, data: ClientData) -> dict[str, Metrics]:
        """Score of the shared model."""
        return {"shared": self._shared.score(shared, data.test)}

    def export_private(self, shared: Arrays, private: Arrays, data: ClientData, directory: Path) -> bool:
        """There is no private model."""
        return False
