"""The one epoch and batch loop, and the optimisers that run in it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from fedkd_flwr.core.arrays import Array, Arrays
from fedkd_flwr.core.losses import cross_entropy
from fedkd_flwr.core.protocols import Batch, Examples, Task
from fedkd_flwr.core.seeds import derive_seed

Step = Callable[[Batch], Mapping[str, float]]


class LocalTraining(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """How long and in what portions a client trains in one round."""

    num_epochs: int = Field(2, ge=1)
    batch_size: int = Field(16, ge=1)


class OptimizerOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """An optimiser of torch. `max_grad_norm` clips the gradient's norm over all parameters; null leaves it."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    max_grad_norm: float | None = Field(None, gt=0)


class Optimizer:
    """An optimiser over named parameters, of which there may be none; its state can leave torch as named arrays."""

    def __init__(self, options: OptimizerOptions, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._named = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self._max_grad_norm = options.max_grad_norm
        for parameter in self._named.values():
            parameter.grad = None  # a step that failed may have left one
        self._optimizer = _build(options, list(self._named.values())) if self._named else None

    def step(self) -> None:
        """Clip where asked, step, and forget the gradients."""
        if self._optimizer is None:
            return
        if self._max_grad_norm is not None:
            clip_grad_norm_(self._named.values(), self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def read_state(self, prefix: str) -> dict[str, Array]:
        """Moments and step counts as `prefix` + parameter + "/" + key."""
        arrays: dict[str, Array] = {}
        if self._optimizer is None:
            return arrays
        for name, parameter in self._named.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    arrays[f"{prefix}{name}/{key}"] = np.array(value.detach().cpu().numpy(), copy=True)
        return arrays

    def write_state(self, prefix: str, arrays: Arrays) -> None:
        """Take up the state that `read_state` gave; parameters without one start afresh."""
        for name, parameter in self._named.items():
            start = f"{prefix}{name}/"
            found = {key[len(start) :]: value for key, value in arrays.items() if key.startswith(start)}
            if found and self._optimizer is not None:
                self._optimizer.state[parameter] = {key: torch.tensor(value) for key, value in found.items()}


def _build(options: OptimizerOptions, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate, decay = options.learning_rate, options.weight_decay
    if options.name == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=options.momentum)
    kind = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=rate, weight_decay=decay)


def run_epochs(examples: Examples, local: LocalTraining, seed: int, step: Step) -> dict[str, list[float]]:
    """Call `step` on every batch of every epoch.

    Args:
        examples: what to learn from.
        local: epochs and batch size.
        seed: decides the order of examples; each epoch has its own.
        step: trains on one batch and returns what it measured.

    Returns:
        Each measure at every step, in order.
    """
    measures: dict[str, list[float]] = defaultdict(list)
    for epoch in range(local.num_epochs):
        for batch in examples.batches(local.batch_size, derive_seed(seed, "batches", epoch)):
            for name, value in step(batch).items():
                measures[name].append(value)
    return dict(measures)


Penalty = Callable[[nn.Module], Tensor]


def train_supervised(
    task: Task,
    module: nn.Module,
    optimizer: Optimizer,
    examples: Examples,
    local: LocalTraining,
    seed: int,
    penalty: Penalty | None = None,
) -> dict[str, float]:
    """Minimise the task loss, plus a penalty on the module where one is given.

    Returns:
        `train_loss`, the mean task loss in nats.
    """

    def step(batch: Batch) -> Mapping[str, float]:
        out = task.forward(module, batch, hidden_states=False, attentions=False)
        loss = cross_entropy(out.logits, out.labels)
        total = loss if penalty is None else loss + penalty(module)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return {"train_loss": float(loss.detach())}

    module.train()
    return {name: float(np.mean(values)) for name, values in run_epochs(examples, local, seed, step).items()}
