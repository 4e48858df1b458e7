"""The one epoch and batch loop."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from fedkd_flwr.algorithms.base import AlgorithmOptions, Assignment, Width
from fedkd_flwr.algorithms.optimizer import Optimizer, OptimizerOptions
from fedkd_flwr.core.losses import log_prior, task_loss
from fedkd_flwr.core.modules import still_layers
from fedkd_flwr.core.protocols import Batch, ClientData, Examples, Outputs, Task
from fedkd_flwr.core.seeds import derive_seed

__all__ = [
    "LocalTraining",
    "Optimizer",
    "OptimizerOptions",
    "Penalty",
    "fine_tuned",
    "forward",
    "prior_of",
    "require_counts",
    "run_epochs",
    "train_supervised",
]

# The loss of one batch, a scalar with a graph, and what was measured on the way, scalars without.
LossOf = Callable[[Batch], tuple[Tensor, Mapping[str, Tensor]]]
Penalty = Callable[[nn.Module], Tensor]

Options = TypeVar("Options", bound=AlgorithmOptions)


class LocalTraining(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """How long, in what portions and on what a client trains in one round.

    Attributes:
        num_epochs: passes over the client's examples.
        batch_size: examples that are in memory together.
        accumulate: batches whose gradients make one step, for a batch that memory does not hold.
        precision: of the forward pass in training; parameters, losses and scores are float32 either way.
        compile: let torch compile the models, which takes minutes at first and pays off in long trainings.
        device: where the models are; auto is the GPU where there is one, each machine for itself. cuda refuses a
            machine without one, a server among them.
    """

    num_epochs: int = Field(2, ge=1)
    batch_size: int = Field(16, ge=1)
    accumulate: int = Field(1, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def place(self, *modules: nn.Module) -> None:
        """Move modules to the device, in place.

        Raises:
            ValueError: if that is a GPU and there is none.
        """
        available = torch.cuda.is_available()
        if self.device == "cuda" and not available:
            raise ValueError("algorithm.local.device: cuda was asked for, and torch finds no GPU here; use auto or cpu")
        device = torch.device("cuda" if available and self.device != "cpu" else "cpu")
        for module in modules:
            module.to(device)

    def prepare(self, *modules: nn.Module) -> None:
        """Put modules into training mode, compiled where asked.

        Here and not where they are built: a server builds them too, and never trains. Frozen layers keep their
        statistics, and so stay in evaluation mode.
        """
        for module in modules:
            module.train()
            for layer in still_layers(module).values():
                layer.training = False
            # In place, so that names of tensors stay; again would compile again.
            if self.compile and getattr(module, "_compiled_call_impl", None) is None:
                module.compile()

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps of one round."""
        num_batches = -(-num_examples // self.batch_size)
        return self.num_epochs * -(-num_batches // self.accumulate)


def forward(
    task: Task,
    module: nn.Module,
    batch: Batch,
    local: LocalTraining,
    *,
    hidden_states: bool = False,
    attentions: bool = False,
    prior: Tensor | None = None,
) -> Outputs:
    """Run a model for training. What it returns is float32 in any precision: bfloat16 has too few digits for losses.

    Args:
        task: runs it.
        module: the model.
        batch: its input.
        local: says the precision.
        hidden_states: whether these are wanted.
        attentions: likewise.
        prior: [classes], added to the logits; see `log_prior`.
    """
    out = _forward(task, module, batch, local, hidden_states=hidden_states, attentions=attentions)
    return out if prior is None else replace(out, logits=out.logits + prior.to(out.logits.device))


def _forward(
    task: Task, module: nn.Module, batch: Batch, local: LocalTraining, *, hidden_states: bool, attentions: bool
) -> Outputs:
    if local.precision == "float32":
        return task.forward(module, batch, hidden_states=hidden_states, attentions=attentions)
    parameter = next(module.parameters(), None)
    with torch.autocast("cpu" if parameter is None else parameter.device.type, dtype=torch.bfloat16):
        out = task.forward(module, batch, hidden_states=hidden_states, attentions=attentions)
    return replace(
        out,
        logits=out.logits.float(),
        hidden_states=out.hidden_states and tuple(state.float() for state in out.hidden_states),
        attentions=out.attentions and tuple(attention.float() for attention in out.attentions),
    )


def run_epochs(
    examples: Examples, local: LocalTraining, assignment: Assignment, optimizers: Sequence[Optimizer], loss_of: LossOf
) -> dict[str, list[float]]:
    """Minimise a loss over every batch of every epoch.

    The batches of one step count by their examples, so the step is that of all of them in one batch wherever the loss
    is a mean over examples. The last step of an epoch makes do with what is left.

    Args:
        examples: what to learn from.
        local: epochs, batch size, batches of a step.
        assignment: its seed decides the order of examples, and each epoch has its own; its place in the run decides
            the learning rate.
        optimizers: step together.
        loss_of: the loss of one batch and what it measured.

    Returns:
        Each measure at every batch, in order.
    """
    measures: dict[str, list[Tensor]] = defaultdict(list)
    num_steps, step = local.num_steps(len(examples)), 0
    for epoch in range(local.num_epochs):
        batches = examples.batches(local.batch_size, derive_seed(assignment.seed, "batches", epoch))
        for group in _groups(batches, local.accumulate):
            sizes = [len(next(iter(batch.values()))) for batch in group]
            for batch, size in zip(group, sizes, strict=True):
                loss, found = loss_of(batch)
                (loss * (size / sum(sizes))).backward()  # type: ignore[no-untyped-call]
                for name, value in found.items():
                    measures[name].append(value)
            before, after = (_share_done(assignment, done, num_steps) for done in (step, step + 1))
            for optimizer in optimizers:
                optimizer.step(before, after)
            step += 1
    # Read at the end: each number that is read waits until a GPU has done all it was given.
    return {name: torch.stack(values).tolist() for name, values in measures.items()}


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches in groups of `size`, the last one of what is left."""
    remaining = iter(batches)
    return iter(lambda: list(islice(remaining, size)), [])


def _share_done(assignment: Assignment, step: int, num_steps: int) -> float:
    """Share of the whole run that is done after so many steps of this round; never beyond the round's end."""
    return assignment.begin + (assignment.end - assignment.begin) * min(step / num_steps, 1.0)


def require_counts(task: Task, logit_adjustment: float) -> None:
    """Raise ValueError if logits are to be adjusted by frequencies of classes that the task does not know."""
    if logit_adjustment and not task.counts_labels:
        raise ValueError(
            "algorithm.logit_adjustment must be 0 for a task whose labels are no classes that are counted, "
            f"got {logit_adjustment:g}"
        )


def prior_of(data: ClientData, strength: float) -> Tensor | None:
    """What logit adjustment adds to the logits on a client: [classes]; None where there is nothing to add."""
    if strength == 0:
        return None
    assert data.label_counts is not None  # `require_counts`
    return strength * log_prior(data.label_counts)


def train_supervised(
    task: Task,
    module: nn.Module,
    optimizer: Optimizer,
    examples: Examples,
    local: LocalTraining,
    assignment: Assignment,
    penalty: Penalty | None = None,
    prior: Tensor | None = None,
) -> dict[str, float]:
    """Minimise the task loss, plus a penalty on the module where one is given, on logits plus a prior where one is.

    Returns:
        `train_loss`, the mean task loss in nats.
    """

    def loss_of(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss = task_loss(forward(task, module, batch, local, prior=prior))
        return loss if penalty is None else loss + penalty(module), {"train_loss": loss.detach()}

    local.prepare(module)
    measures = run_epochs(examples, local, assignment, [optimizer], loss_of)
    return {name: float(np.mean(values)) for name, values in measures.items()}


def fine_tuned(
    options: Options, model: Literal["teacher", "student"], teacher: Width | None, student: Width | None
) -> Options:
    """The options of an algorithm that trains one model, with those of its optimiser decided.

    Args:
        options: have `optimizer` and `keep_moments`.
        model: the one that is trained.
        teacher: gives the width of the teacher where its weights are loaded; None where they are drawn.
        student: likewise the student's.
    """
    width = teacher if model == "teacher" else student
    if not width:
        return options
    optimizer: OptimizerOptions = options.optimizer  # type: ignore[attr-defined]
    found: dict[str, Any] = {"optimizer": optimizer.for_loaded_weights(width, student=model == "student")}
    return options.model_copy(
        update=found if "keep_moments" in options.model_fields_set else found | {"keep_moments": True}
    )
