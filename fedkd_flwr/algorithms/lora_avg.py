"""Federated averaging of low-rank adapters: the backbone is frozen on every node and never sent.

The simplest federated LoRA: A and B are averaged each for itself, so the mean of the products B A is met only
approximately; `flora` meets it. What is exchanged are updates of one model, so every compressor applies.
"""

from typing import Literal

from pydantic import Field

from fedkd_flwr.algorithms.base import Algorithm, AlgorithmOptions, MeanUpdateServer, num_parameters
from fedkd_flwr.algorithms.fedavg import FedAvgClient, common_model
from fedkd_flwr.algorithms.loop import LocalTraining, OptimizerOptions, require_counts
from fedkd_flwr.algorithms.lora import LoraOptions, SharedAdapters, adapted, foundations
from fedkd_flwr.core.protocols import Task
from fedkd_flwr.core.seeds import derive_seed


class LoraAvgOptions(AlgorithmOptions):
    """Options of averaged adapters.

    Attributes:
        model: which of the task's models is the backbone.
        lora: its adapters, the same on all clients.
        local: how a client trains in a round.
        optimizer: the client's.
        keep_moments: go on with the optimiser's moments of a client's last round; off, each round begins afresh.
        logit_adjustment: strength of logit adjustment on each client; see `FedKDOptions`.
    """

    name: Literal["lora_avg"] = "lora_avg"
    model: Literal["teacher", "student"] = "teacher"
    lora: LoraOptions = LoraOptions()
    local: LocalTraining = LocalTraining()
    optimizer: OptimizerOptions = OptimizerOptions()
    keep_moments: bool = False
    logit_adjustment: float = Field(0.0, ge=0)

    def build(self, task: Task, seed: int) -> Algorithm:
        """Averaging of adapters on the chosen model.

        Raises:
            ValueError: if clients have different ones, an option names what is not there, or logits are to be adjusted
                and labels are not counted.
        """
        require_counts(task, self.logit_adjustment)
        models = task.build_models(seed)
        sizes = num_parameters(models)
        module = adapted(common_model(models, self.model), self.lora, derive_seed(seed, "adapters"))
        shared = SharedAdapters(task, module)
        client = FedAvgClient(
            task,
            shared,
            self.local,
            self.optimizer,
            keep_moments=self.keep_moments,
            logit_adjustment=self.logit_adjustment,
        )
        server = MeanUpdateServer(shared)
        return Algorithm(
            "updates",
            shared,
            client,
            server,
            *sizes,
            foundations=lambda: foundations(module),
            leaves=f"the update of the {self.model}'s adapters",
            stays="its frozen backbone",
        )
