"""The optimisers that run in the loop: their options, their rate over the whole run, and their state as arrays."""

from collections.abc import Callable, Iterable
from math import cos, pi
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from fedkd_flwr.core.arrays import Array, Arrays

# The wider a model, the smaller a rate it is fine-tuned with. 5e-4 was measured at width 128 (docs/results.md); at 768
# the power gives 5e-5, the largest rate of Devlin et al. 2019, https://arxiv.org/abs/1810.04805, for BERT-base.
_MEASURED_WIDTH, _MEASURED_RATE, _RATE_POWER = 128, 5e-4, 1.25
_OF_STUDENT = 2.0  # a cut student has more to learn again, and learns with twice the rate


class RateSchedule(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """The learning rate over the whole run, all rounds together, as a factor of the rate that was chosen.

    Attributes:
        warmup: share of the run in which the factor grows from 0 to 1, in [0, 1).
        decay: how it falls in the rest.
        final: factor at the end of a decay, in [0, 1].
    """

    warmup: float = Field(0.0, ge=0, lt=1)
    decay: Literal["none", "linear", "cosine"] = "none"
    final: float = Field(0.0, ge=0, le=1)

    def factor(self, before: float, after: float) -> float:
        """Factor in [0, 1] of one step.

        The warm-up goes by what is done after the step and the decay by what was done before it, so that no step is
        lost: a rate of 0 would make nothing of the first step of a run, or of its last.

        Args:
            before: share of the run that is done before the step, in [0, 1].
            after: and after it, in (0, 1].
        """
        grown = min(after / self.warmup, 1.0) if self.warmup else 1.0
        fallen = max(before - self.warmup, 0.0) / (1.0 - self.warmup)
        if self.decay == "none":
            return grown
        rest = 1.0 - fallen if self.decay == "linear" else (1.0 + cos(pi * fallen)) / 2
        return grown * (self.final + (1.0 - self.final) * rest)


class OptimizerOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """An optimiser of torch. "auto", for all of it or for one key, is the same as leaving it out.

    What is left out is the default below for a model with random weights. A model whose weights are loaded is
    fine-tuned instead, by `for_loaded_weights`; the resolved configuration has the values.

    Attributes:
        name: which one.
        learning_rate: > 0, before the schedule.
        weight_decay: of parameters with two axes or more, >= 0.
        momentum: of sgd, in [0, 1).
        max_grad_norm: clips the gradient's norm over all parameters; null leaves it.
        schedule: of the learning rate.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    max_grad_norm: float | None = Field(None, gt=0)
    schedule: RateSchedule = RateSchedule()

    @model_validator(mode="before")
    @classmethod
    def _without_auto(cls, raw: object) -> object:
        if raw == "auto":
            return {}
        return {key: value for key, value in raw.items() if value != "auto"} if isinstance(raw, dict) else raw

    def for_loaded_weights(self, width: Callable[[], int], *, student: bool) -> Self:
        """The same options, with the start of fine-tuning for everything that was left out.

        AdamW, a rate that falls with the model's width, and a schedule of 10 % warm-up and linear decay.

        Args:
            width: gives that of the model's hidden states; called only where the rate was left out.
            student: whether it is the student, which has twice the rate.
        """
        name = self.name if "name" in self.model_fields_set else "adamw"
        found: dict[str, Any] = {"name": name, "schedule": RateSchedule(warmup=0.1, decay="linear")}
        if name != "sgd" and "learning_rate" not in self.model_fields_set:
            rate = _MEASURED_RATE * (_MEASURED_WIDTH / width()) ** _RATE_POWER * (_OF_STUDENT if student else 1.0)
            found["learning_rate"] = float(f"{rate:.2g}")
        return self.model_copy(update={key: found[key] for key in found.keys() - self.model_fields_set})


class Optimizer:
    """An optimiser over named parameters, of which there may be none; its state can leave torch as named arrays."""

    def __init__(self, options: OptimizerOptions, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._named = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self._options = options
        for parameter in self._named.values():
            parameter.grad = None  # a step that failed may have left one
        self._optimizer = _build(options, list(self._named.values())) if self._named else None

    def step(self, before: float = 0.0, after: float = 1.0) -> None:
        """Clip where asked, step, and forget the gradients.

        Args:
            before: share of the run that was done before this step, in [0, 1].
            after: and is done after it, in (0, 1].
        """
        if self._optimizer is None:
            return
        if self._options.max_grad_norm is not None:
            clip_grad_norm_(self._named.values(), self._options.max_grad_norm)
        rate = self._options.learning_rate * self._options.schedule.factor(before, after)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
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
                self._optimizer.state[parameter] = {key: _placed(key, v, parameter) for key, v in found.items()}


def _placed(key: str, value: Array, parameter: nn.Parameter) -> Tensor:
    """A kept value as torch has it: a count of steps on the CPU in any case, moments where and as the parameter is."""
    kept = torch.tensor(value)
    return kept if key == "step" else torch.empty_like(parameter, dtype=kept.dtype).copy_(kept)


def _build(options: OptimizerOptions, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    # Decay is for matrices and kernels, whose size is how strongly inputs are mixed. Biases and the gains of
    # normalisation have one axis: pulled to 0 they would shift or silence a layer, and gain nothing for it.
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
    spared = [parameter for parameter in parameters if parameter.ndim < 2]
    both = ((decayed, options.weight_decay), (spared, 0.0))
    groups: list[dict[str, Any]] = [{"params": some, "weight_decay": decay} for some, decay in both if some]
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum)
    kind = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
    # One call for all tensors: a model of small layers has many, and spends a quarter of its time in Adam otherwise.
    # On a GPU torch does likewise by itself. The fused step goes through memory, whatever the strides say.
    fused = all(p.device.type == "cpu" and p.is_floating_point() and p.is_contiguous() for p in parameters) or None
    return kind(groups, lr=options.learning_rate, fused=fused)
