"""FedProx: FedAvg whose clients pay for leaving the shared model.

Li et al., "Federated optimization in heterogeneous networks", MLSys 2020, https://arxiv.org/abs/1812.06127: the local
loss plus (mu / 2) * ||w - w_shared||^2.
"""

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd_flwr.algorithms.base import Algorithm, AlgorithmOptions, MeanUpdateServer, SharedModel, Width, num_parameters
from fedkd_flwr.algorithms.fedavg import FedAvgClient, common_model
from fedkd_flwr.algorithms.loop import LocalTraining, OptimizerOptions, Penalty, fine_tuned, require_counts
from fedkd_flwr.core.protocols import Task


class FedProxOptions(AlgorithmOptions):
    """Options of FedProx.

    Attributes:
        model: which of the task's models is shared.
        proximal_mu: weight mu of the penalty; 0 is FedAvg.
        local: how a client trains in a round.
        optimizer: the client's.
        keep_moments: go on with the optimiser's moments of a client's last round; off, each round begins afresh.
        logit_adjustment: strength of logit adjustment on each client; see `FedKDOptions`.
    """

    learns_by_acting: ClassVar[bool] = True
    name: Literal["fedprox"] = "fedprox"
    model: Literal["teacher", "student"] = "teacher"
    proximal_mu: float = Field(0.1, ge=0)
    local: LocalTraining = LocalTraining()
    optimizer: OptimizerOptions = OptimizerOptions()
    keep_moments: bool = False
    logit_adjustment: float = Field(0.0, ge=0)

    def for_widths(self, teacher: Width | None, student: Width | None) -> Self:
        """The optimiser of fine-tuning for a model with loaded weights; see `AlgorithmOptions.for_widths`."""
        return fine_tuned(self, self.model, teacher, student)

    def build(self, task: Task, seed: int) -> Algorithm:
        """FedProx of the chosen model.

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
            lambda module: proximal_penalty(module, self.proximal_mu),
            keep_moments=self.keep_moments,
            logit_adjustment=self.logit_adjustment,
        )
        leaves = f"the update of the {self.model}"
        return Algorithm("updates", shared, client, MeanUpdateServer(shared), *num_parameters(models), leaves=leaves)


def proximal_penalty(module: nn.Module, mu: float) -> Penalty:
    """The function w -> (mu / 2) * ||w - w_0||^2, where w_0 are the trainable parameters of `module` now."""
    anchors = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    def penalty(moved: nn.Module) -> Tensor:
        squares = [((p - anchors[name]) ** 2).sum() for name, p in moved.named_parameters() if name in anchors]
        return mu / 2 * torch.stack(squares).sum()

    return penalty
