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
from fedkd_flwr.core.protocols import ClientData, Examples, Models, Task, score_of

_MODEL = "model/"
_OPTIMIZER = "optimizer/"


class LocalOnlyOptions(AlgorithmOptions):
    """Options of local training.

    Attributes:
        model: which of the task's models each client trains.
        local: how a client trains in a round.
        optimizer: the client's.
        keep_moments: go on with the optimiser's moments of the last round, so that rounds make no difference.
    """

    name: Literal["local_only"] = "local_only"
    model: Literal["teacher", "student"] = "teacher"
    local: LocalTraining = LocalTraining()
    optimizer: OptimizerOptions = OptimizerOptions()
    keep_moments: bool = True

    def build(self, task: Task, seed: int) -> Algorithm:
        """Local training of the chosen model, which may be another on each client."""
        models = task.build_models(seed)
        client = LocalOnlyClient(task, models, self)
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

    def __init__(self, task: Task, models: Models, options: LocalOnlyOptions) -> None:
        self._task = task
        self._options = options
        # Scratch space for whichever client is at work: what training can change comes from its arrays each time, and
        # the frozen rest is of version 0 for good.
        teachers = (models.teacher, *models.other_teachers)
        self._modules = teachers if options.model == "teacher" else (models.student,)
        self._initial = [read_arrays(module, frozen=False) for module in self._modules]
        options.local.place(*self._modules)

    def initial_private(self, data: ClientData) -> Arrays:
        """The model's version 0, without what is frozen in it."""
        return prefixed(_MODEL, self._initial[self._which(data)])

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """Go on from the last round."""
        options, module = self._options, self._load(private, data)
        optimizer = Optimizer(options.optimizer, module.named_parameters())
        if options.keep_moments:
            optimizer.write_state(_OPTIMIZER, private)
        metrics = train_supervised(self._task, module, optimizer, data.train, options.local, assignment)
        kept = prefixed(_MODEL, read_arrays(module, frozen=False))
        if options.keep_moments:
            kept |= optimizer.read_state(_OPTIMIZER)
        return Trained(None, kept, metrics)

    def evaluate(self, shared: Arrays, private: Arrays, data: ClientData) -> dict[str, Metrics]:
        """Score of the client's own model."""
        return {"private": score_of(self._task, self._load(private, data), data.test)}

    def export_private(self, shared: Arrays, private: Arrays, data: ClientData, directory: Path) -> bool:
        """Write the client's own model."""
        self._task.export(self._load(private, data), directory)
        return True

    def _which(self, data: ClientData) -> int:
        return data.teacher if self._options.model == "teacher" else 0

    def _load(self, private: Arrays, data: ClientData) -> nn.Module:
        module = self._modules[self._which(data)]
        write_arrays(module, private, _MODEL, frozen=False)
        return module


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
