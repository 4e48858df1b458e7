"""Low-rank adapters on a frozen backbone.

Hu et al., "LoRA: Low-rank adaptation of large language models", ICLR 2022, https://arxiv.org/abs/2106.09685: of a layer
W only (alpha / rank) B A is trained, beside the model's head. The layers themselves are those of peft.
"""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from torch import nn

from fedkd_flwr.algorithms.base import SharedModel
from fedkd_flwr.core.arrays import Arrays, digest
from fedkd_flwr.core.modules import read_arrays
from fedkd_flwr.core.protocols import ClientData, Task
from fedkd_flwr.core.seeds import derive_seed

# What attention calls its query and value projections in the models of Hugging Face.
_QUERY_AND_VALUE = {"query", "value", "q_proj", "v_proj", "q_lin", "v_lin"}
_NAMED_MODULES = 8  # in a message about more
_KEY = "algorithm.lora"

Ranks = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class LoraOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Adapters of one model.

    Attributes:
        rank: of every adapter.
        alpha: an adapter's output counts alpha / rank.
        dropout: on what an adapter sees in training, in [0, 1).
        target_modules: layers that get one, each by its name or the end of it (such as "q_proj"), linear or
            convolutional; null takes the query and value projections, and in a model without attention every such layer
            but the head.
        trained_modules: modules that are trained whole and exchanged, beside the adapters; null is the head: what lies
            outside the backbone of a Hugging Face model, the last linear layer of any other. Name what else a
            checkpoint has no weights for, such as the pooler of a masked language model.
    """

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Names | None = None
    trained_modules: Names | None = None


def adapted(module: nn.Module, options: LoraOptions, seed: int) -> nn.Module:
    """A copy of a model with adapters: they and the head can be trained, all else is frozen.

    What is frozen is not copied: it is the very tensors of `module`, which are frozen there, too. An adapter changes
    nothing before it is trained: its B is 0, its A is drawn.

    Args:
        module: the model.
        options: of the adapters.
        seed: of A.

    Raises:
        ValueError: if a name in the options is that of no module, or a layer can't have an adapter.
    """
    # Imported here: it takes seconds, and checking a configuration should not.
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError(
            "algorithm: adapters need the package peft; install it with pip install 'fedkd-flwr[lora]'"
        ) from None

    trained = _trained_modules(module, options)
    copies = {id(p) for name in trained for p in module.get_submodule(name).parameters()}
    model: Any = copy.deepcopy(module, {id(p): p for p in module.parameters() if id(p) not in copies})
    targets = _target_modules(model, options, trained)
    config: Any = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        target_modules="|".join(map(re.escape, targets)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise ValueError(f"{_KEY}.target_modules: {' '.join(str(error).split())}") from error
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    adapted_model: nn.Module = model
    return adapted_model


def plain(module: nn.Module) -> nn.Module:
    """A copy of an adapted model in which each adapter is added to its layer: as if the layers had been trained."""
    copied = copy.deepcopy(module)
    for name, layer in adapters_of(copied).items():
        layer.merge()
        copied.set_submodule(name, layer.get_base_layer())
    if hasattr(copied, "peft_config"):
        del copied.peft_config
    return copied


def adapters_of(module: nn.Module) -> dict[str, Any]:
    """The layers of an adapted model that have an adapter, by name: peft's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def backbone_digest(module: nn.Module) -> bytes:
    """Of all that is frozen in a model, 32 bytes."""
    moving = read_arrays(module, frozen=False)
    return digest({name: value for name, value in read_arrays(module).items() if name not in moving})


def foundations(module: nn.Module) -> dict[str, bytes]:
    """What every node must have alike: the backbone; see `Algorithm.foundations`."""
    return {"frozen backbone": backbone_digest(module)}


class SharedAdapters(SharedModel):
    """Adapters and head that server and clients hold together; the backbone below them is a foundation."""

    def __init__(self, task: Task, module: nn.Module) -> None:
        super().__init__(task, module, frozen=False)

    def export(self, shared: Arrays, directory: Path) -> None:
        """Write the model with its adapters added to their layers."""
        self.load(shared)
        self._task.export(plain(self.module), directory)


class AdaptedModels:
    """Adapted models of clients that may have other backbones and other ranks: one module for each pair of them.

    The modules are scratch space for whichever client is at work; their backbones are the very tensors of the models
    that they were made from.

    Args:
        backbones: by `ClientData.teacher`; one alone is everybody's.
        options: of the adapters.
        ranks: dealt in turn by `ClientData.client`; None gives everybody that of the options.
        seed: of version 0.
    """

    def __init__(self, backbones: Sequence[nn.Module], options: LoraOptions, ranks: Ranks, seed: int) -> None:
        self._num_backbones = len(backbones)
        self._ranks = ranks or (options.rank,)
        self._modules = {
            (index, rank): adapted(
                backbone, options.model_copy(update={"rank": rank}), derive_seed(seed, "backbone", index, rank)
            )
            for index, backbone in enumerate(backbones)
            for rank in sorted(set(self._ranks))
        }
        self._initial = {key: read_arrays(module, frozen=False) for key, module in self._modules.items()}

    @property
    def first(self) -> nn.Module:
        """The only one, where there is one backbone and one rank."""
        return next(iter(self._modules.values()))

    def all(self) -> Sequence[nn.Module]:
        """Every module."""
        return list(self._modules.values())

    def of(self, data: ClientData) -> nn.Module:
        """A client's module."""
        return self._modules[self._key(data)]

    def initial(self, data: ClientData) -> Arrays:
        """Version 0 of a client's adapters and head."""
        return self._initial[self._key(data)]

    def _key(self, data: ClientData) -> tuple[int, int]:
        backbone = data.teacher if self._num_backbones > 1 else 0
        return backbone, self._ranks[data.client % len(self._ranks)]


def _trained_modules(module: nn.Module, options: LoraOptions) -> list[str]:
    if options.trained_modules is not None:
        return [_one_named(module, name) for name in options.trained_modules]
    backbone = getattr(module, "base_model_prefix", "")
    if backbone and isinstance(getattr(module, backbone, None), nn.Module):
        return [name for name, child in module.named_children() if name != backbone and list(child.parameters())]
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError(
            f"{_KEY}.trained_modules: a {type(module).__name__} has no linear layer to be its head; name it"
        )
    return linear[-1:]


def _one_named(module: nn.Module, name: str) -> str:
    found: list[str] = [full for full, _ in module.named_modules() if full == name or full.endswith(f".{name}")]
    if len(found) != 1:
        children = ", ".join(full for full, _ in module.named_children())
        raise ValueError(
            f"{_KEY}.trained_modules: {'several modules' if found else 'no module'} of a {type(module).__name__} "
            f"{'are' if found else 'is'} called {name!r}; give a full name; its parts: {children}"
        )
    return found[0]


def _target_modules(module: nn.Module, options: LoraOptions, trained: list[str]) -> list[str]:
    """Full names of the layers that get an adapter."""
    layers = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and not any(name == whole or name.startswith(f"{whole}.") for whole in trained)
    ]
    if options.target_modules is None:
        attention = [name for name in layers if name.rpartition(".")[2] in _QUERY_AND_VALUE]
        chosen = attention or layers
        if not chosen:
            raise ValueError(f"{_KEY}: a {type(module).__name__} has no linear or convolutional layer below its head")
        return chosen
    found: list[str] = []
    for target in options.target_modules:
        matching = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not matching:
            ends = sorted({name.rpartition(".")[2] for name in layers})
            shown = ", ".join(ends[:_NAMED_MODULES]) + (", ..." if len(ends) > _NAMED_MODULES else "")
            raise ValueError(
                f"{_KEY}.target_modules: a {type(module).__name__} has no linear or convolutional layer {target!r} "
                f"below its head; there are {shown}"
            )
        found += [name for name in matching if name not in found]
    return found
