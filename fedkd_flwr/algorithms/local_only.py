"""Every client trains alone: what a site reaches without the others. Nothing is exchanged."""

from pathlib import Path
from typing import Literal

from torch import nn

from fedkd_flwr.algorithms.base import (
    Algorithm,
    AlgorithmOptions,
    Assignment,
    MakeCodec,
    Metrics,
    Trained,
    Wires,
    num_parameters,
)
from fedkd_flwr.algorithms.loop import LocalTraining, Optimizer, OptimizerOptions, train_supervised
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.modules import prefixed, read_arrays, write_arrays
from fedkd_flwr.core.protocols import ClientData, Examples, Task

_MODEL = "model/"
_OPTIMIZER = "optimizer/"


class LocalOnlyOptions(AlgorithmOptions):
    """Options of local training.

    Attributes:
        model: which of the task's models each client trains.
        local: epochs and batch size of a client's round.
        optimizer: the client's; its moments are kept from round to round.
    """

    name: Literal["local_only"] = "local_only"
    model: Literal["teacher", "student"] = "teacher"
    local: LocalTraining = LocalTraining()
    optimizer: OptimizerOptions = OptimizerOptions()

    def build(self, task: Task, seed: int) -> Algorithm:
        """Local training of the chosen model."""
        models = task.build_models(seed)
        module = models.teacher if self.model == "teacher" else models.student
        client = LocalOnlyClient(task, module, self.local, self.optimizer)
        return Algorithm("nothing", NothingShared(), client, LocalOnlyServer(), *num_parameters(models))


class NothingShared:
    """No arrays in common, and no wire."""

    def initial(self) -> Arrays:
        """Empty."""
        return {}

    def wires(self, make_codec: MakeCodec) -> Wires | None:
        """None."""
        return None

    def apply(self, shared: Arrays, broadcast: Arrays) -> Arrays:
        """Nothing changes."""
        return shared


class LocalOnlyClient:
    """Client half: one model, its optimiser, its data."""

    def __init__(self, task: Task, module: nn.Module, local: LocalTraining, optimizer: OptimizerOptions) -> None:
        self._task = task
        self._module = module
        self._local = local
        self._optimizer = optimizer
        self._initial = read_arrays(module)

    def initial_private(self) -> Arrays:
        """The model's version 0."""
        return prefixed(_MODEL, self._initial)

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """Go on from the last round."""
        write_arrays(self._module, private, _MODEL)
        optimizer = Optimizer(self._optimizer, self._module.named_parameters())
        optimizer.write_state(_OPTIMIZER, private)
        metrics = train_supervised(self._task, self._module, optimizer, data.train, self._local, assignment.seed)
        kept = prefixed(_MODEL, read_arrays(self._module)) | optimizer.read_state(_OPTIMIZER)
        return Trained(None, kept, metrics)

    def evaluate(self, shared: Arrays, private: Arrays, data: ClientData) -> dict[str, Metrics]:
        """Score of the client's own model."""
        write_arrays(self._module, private, _MODEL)
        return {"private": self._task.score(self._module, data.test)}

    def export_private(self, private: Arrays, directory: Path) -> bool:
        """Write the client's own model."""
        write_arrays(self._module, private, _MODEL)
        self._task.export(self._module, directory)
        return True


class LocalOnlyServer:
    """Server half: nothing to do."""

    def broadcast(self, aggregate: Arrays, shared: Arrays, assignment: Assignment) -> Arrays:
        """Nothing."""
        return {}

    def evaluate(self, shared: Arrays, examples: Examples) -> Metrics | None:
        """There is no shared model."""
        return None

    def export_shared(self, shared: Arrays, directory: Path) -> bool:
        """There is no shared model."""
        return False
