"""Learning from what others say of public examples, and saying something of them."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from torch import Tensor, nn

from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.algorithms.loop import LocalTraining, Optimizer, OptimizerOptions, forward, run_epochs
from fedkd_flwr.algorithms.soft_labels import SOFT_LABELS, Schedule
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.losses import kl_divergence
from fedkd_flwr.core.protocols import Batch, HasPublicExamples, PublicExamples, Task
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.core.soft_labels import softened

VERSION = "version"  # of what is known: how many broadcasts it has absorbed


class Distillation(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """How a model learns from soft labels in one round.

    Attributes:
        num_epochs: passes over them.
        batch_size: examples that are in memory together.
        num_replayed: known examples, drawn anew each time, that are learned from once more beside the new ones; null
            takes all.
        optimizer: begins afresh each time.
    """

    num_epochs: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)
    num_replayed: int | None = Field(0, ge=0)
    optimizer: OptimizerOptions = OptimizerOptions()


def public_examples_of(task: Task, algorithm: str) -> PublicExamples:
    """The task's public examples.

    Raises:
        ValueError: if it has none.
    """
    public = task.public_examples() if isinstance(task, HasPublicExamples) else None
    if public is None:
        raise ValueError(
            f"task.public: required by {algorithm}, got none; give num_examples to be taken out of the training split, "
            "or a source (text_classification, image_classification and digits can have public examples)"
        )
    return public


class Distiller:
    """Teaches models what is known of public examples, and asks them.

    Args:
        task: what is learned.
        public: the examples.
        schedule: which are asked when.
        local: precision and the like of training.
        temperature: tau, of what is said and of what is learned from it.
    """

    def __init__(
        self, task: Task, public: PublicExamples, schedule: Schedule, local: LocalTraining, temperature: float
    ) -> None:
        self._task = task
        self._public = public
        self._schedule = schedule
        self._local = local
        self._temperature = temperature

    def teach(
        self, model: nn.Module, shared: Arrays, seen: int, how: Distillation, assignment: Assignment
    ) -> dict[str, float]:
        """Let a model learn what it has not learned yet, and some of what it has.

        Args:
            model: of which what can be trained changes.
            shared: what is known.
            seen: version up to which the model has learned.
            how: epochs, batches, what is learned once more.
            assignment: its seed decides orders and draws.

        Returns:
            `distillation_loss`, the mean over all steps; nothing where nothing was learned.
        """
        positions = self._positions(int(shared[VERSION][0]), seen, how, assignment)
        if not len(positions):
            return {}
        rows = torch.from_numpy(np.asarray(shared[SOFT_LABELS], np.float32))
        targets = rows / rows.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        local = self._local.model_copy(
            update={"num_epochs": how.num_epochs, "batch_size": how.batch_size, "accumulate": 1}
        )
        tau = self._temperature

        def loss_of(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
            out = forward(self._task, model, batch, local)
            of_batch = targets[out.labels.cpu()].to(out.logits)  # a public example's label is its position
            divergence = kl_divergence((out.logits / tau).log_softmax(dim=-1), of_batch.log())
            loss = tau**2 * divergence.mean()
            return loss, {"distillation_loss": loss.detach()}

        local.prepare(model)
        optimizer = Optimizer(how.optimizer, model.named_parameters())
        seed = derive_seed(assignment.seed, "distillation")
        within = Assignment(assignment.progress, seed, assignment.begin, assignment.end)
        measures = run_epochs(self._public.select(positions.tolist()), local, within, [optimizer], loss_of)
        return {name: float(np.mean(values)) for name, values in measures.items()}

    def ask(self, model: nn.Module, shared: Arrays) -> Arrays:
        """What a model says of the examples that are asked now, one row for each in the order of the schedule."""
        positions = self._schedule.asked(int(shared[VERSION][0]))
        found = self._task.predict(model, self._public.select(positions.tolist()))
        of_position = {int(label): row for label, row in zip(found.labels, found.log_probabilities, strict=True)}
        rows = np.stack([of_position[int(position)] for position in positions])
        return {SOFT_LABELS: softened(rows, self._temperature).astype(np.float32)}

    def _positions(self, version: int, seen: int, how: Distillation, assignment: Assignment) -> NDArray[np.int64]:
        new = self._schedule.new(seen, version)
        older = np.setdiff1d(self._schedule.known(version), new)
        if how.num_replayed is not None and how.num_replayed < len(older):
            rng = np.random.default_rng(derive_seed(assignment.seed, "replayed"))
            older = rng.choice(older, how.num_replayed, replace=False)
        return np.concatenate([new, older]).astype(np.int64)
