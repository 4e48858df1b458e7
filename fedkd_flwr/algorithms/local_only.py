"""Every client trains alone: what a site reaches without the others. Nothing is exchanged."""

from typing import ClassVar, Literal, Self

from fedkd_flwr.algorithms.base import (
    Algorithm,
    Assignment,
    MakeCodec,
    Trained,
    Width,
    Wires,
    num_parameters,
)
from fedkd_flwr.algorithms.loop import fine_tuned, train_supervised
from fedkd_flwr.algorithms.own_models import NoModelServer, OwnModelClient, OwnModelOptions
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.protocols import ClientData, Task


class LocalOnlyOptions(OwnModelOptions):
    """Options of local training; see `OwnModelOptions`."""

    learns_by_acting: ClassVar[bool] = True
    name: Literal["local_only"] = "local_only"

    def for_widths(self, teacher: Width | None, student: Width | None) -> Self:
        """The optimiser of fine-tuning for a model with loaded weights; see `AlgorithmOptions.for_widths`."""
        return fine_tuned(self, self.model, teacher, student)

    def build(self, task: Task, seed: int) -> Algorithm:
        """Local training of the chosen model, which may be another on each client."""
        models = task.build_models(seed)
        client = LocalOnlyClient(task, models, self)
        return Algorithm(
            "nothing",
            NothingShared(),
            client,
            NoModelServer(),
            *num_parameters(models),
            leaves="no model and no update of one",
            stays=f"the {self.model}",
        )


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


class LocalOnlyClient(OwnModelClient):
    """Client half: one model, its optimiser, its data."""

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """Go on from the last round."""
        module = self._own.load(private, data)
        optimizer = self._own.optimizer(module, private)
        metrics = train_supervised(self._task, module, optimizer, data.train, self._options.local, assignment)
        return Trained(None, self._own.kept(module, optimizer), metrics)
