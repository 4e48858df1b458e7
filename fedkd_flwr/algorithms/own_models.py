"""Clients that keep a model of their own and share none: options, and the client half that all of them have."""

from pathlib import Path
from typing import Literal

from torch import nn

from fedkd_flwr.algorithms.base import AlgorithmOptions, Assignment, Metrics
from fedkd_flwr.algorithms.loop import LocalTraining, Optimizer, OptimizerOptions
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.modules import prefixed, read_arrays, write_arrays
from fedkd_flwr.core.protocols import ClientData, Examples, Models, Task, score_of

_MODEL = "model/"
_OPTIMIZER = "optimizer/"


class OwnModelOptions(AlgorithmOptions):
    """Options of a client with a model of its own.

    Attributes:
        model: which of the task's models each client trains.
        local: how a client trains in a round.
        optimizer: the client's.
        keep_moments: go on with the optimiser's moments of the last round, so that rounds make no difference.
    """

    model: Literal["teacher", "student"] = "teacher"
    local: LocalTraining = LocalTraining()
    optimizer: OptimizerOptions = OptimizerOptions()
    keep_moments: bool = True


class OwnModels:
    """The models of clients: one module of each kind, scratch space for whichever client is at work.

    What training can change comes from a client's arrays each time, and the frozen rest is of version 0 for good.
    """

    def __init__(self, task: Task, models: Models, options: OwnModelOptions) -> None:
        self._task = task
        self._options = options
        teachers = (models.teacher, *models.other_teachers)
        self._modules = teachers if options.model == "teacher" else (models.student,)
        self._initial = [read_arrays(module, frozen=False) for module in self._modules]
        options.local.place(*self._modules)

    def initial(self, data: ClientData) -> Arrays:
        """Version 0 of a client's model, without what is frozen in it."""
        return prefixed(_MODEL, self._initial[self._which(data)])

    def load(self, private: Arrays, data: ClientData) -> nn.Module:
        """The module of a client's kind, set to its arrays."""
        module = self._modules[self._which(data)]
        write_arrays(module, private, _MODEL, frozen=False)
        return module

    def optimizer(self, module: nn.Module, private: Arrays) -> Optimizer:
        """The client's optimiser, where it was after the last round if that is asked for."""
        optimizer = Optimizer(self._options.optimizer, module.named_parameters())
        if self._options.keep_moments:
            optimizer.write_state(_OPTIMIZER, private)
        return optimizer

    def kept(self, module: nn.Module, optimizer: Optimizer) -> Arrays:
        """What a client keeps of both for its next round."""
        kept = prefixed(_MODEL, read_arrays(module, frozen=False))
        return kept | optimizer.read_state(_OPTIMIZER) if self._options.keep_moments else kept

    def _which(self, data: ClientData) -> int:
        return data.teacher if self._options.model == "teacher" else 0


class OwnModelClient:
    """What every client half with a model of its own does apart from training."""

    def __init__(self, task: Task, models: Models, options: OwnModelOptions) -> None:
        self._task = task
        self._options = options
        self._own = OwnModels(task, models, options)

    def initial_private(self, data: ClientData) -> Arrays:
        """The model's version 0."""
        return self._own.initial(data)

    def model(self, private: Arrays, data: ClientData) -> nn.Module:
        """The client's own model; the module is set anew for the next client."""
        return self._own.load(private, data)

    def evaluate(self, shared: Arrays, private: Arrays, data: ClientData) -> dict[str, Metrics]:
        """Score of the client's own model."""
        return {"private": score_of(self._task, self._own.load(private, data), data.test)}

    def export_private(self, shared: Arrays, private: Arrays, data: ClientData, directory: Path) -> bool:
        """Write the client's own model."""
        self._task.export(self._own.load(private, data), directory)
        return True


class NoModelServer:
    """What every server half without a shared model does: nothing is scored, nothing exported."""

    def broadcast(self, aggregate: Arrays, shared: Arrays, assignment: Assignment) -> Arrays:
        """The aggregate itself."""
        return aggregate

    def evaluate(self, shared: Arrays, examples: Examples) -> Metrics | None:
        """There is no shared model."""
        return None

    def export_shared(self, shared: Arrays, directory: Path) -> bool:
        """There is no shared model."""
        return False
