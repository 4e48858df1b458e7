"""Torch modules to named arrays and back."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from fedkd_flwr.core.arrays import Array, Arrays, Spec, TensorSpec
from fedkd_flwr.core.protocols import Batch


def exchanged_spec(module: nn.Module) -> Spec:
    """What federated training moves: trainable parameters, then floating persistent buffers.

    Shared storage (tied weights) appears once. Frozen parameters, the statistics of frozen layers and integer buffers
    are not part of an update.
    """
    parameters = [TensorSpec(n, tuple(p.shape)) for n, p in module.named_parameters() if p.requires_grad]
    persistent, still = module.state_dict().keys(), _still_buffers(module)
    buffers = [
        TensorSpec(n, tuple(b.shape), "buffer")
        for n, b in module.named_buffers()
        if n in persistent and b.is_floating_point() and n not in still
    ]
    return tuple(parameters + buffers)


def read_arrays(module: nn.Module, *, frozen: bool = True) -> dict[str, Array]:
    """Every parameter and persistent buffer as an array of its own; without `frozen`, only what training can change.

    Floating tensors become float32 masters. The arrays are copies: a view of live weights would turn every later
    update into zeros.
    """
    return {name: _to_array(tensor) for name, tensor in _tensors(module, frozen).items()}


def _tensors(module: nn.Module, frozen: bool) -> dict[str, torch.Tensor]:
    """Parameters, then persistent buffers; the frozen ones only where asked for."""
    persistent, still = module.state_dict().keys(), set() if frozen else _still_buffers(module)
    tensors: dict[str, torch.Tensor] = {n: p for n, p in module.named_parameters() if frozen or p.requires_grad}
    tensors.update((n, b) for n, b in module.named_buffers() if n in persistent and n not in still)
    return tensors


def still_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Layers by name that have parameters of their own, all frozen, and buffers: what these hold is frozen, too.

    A layer that normalises over a batch must not be in training mode then, or its statistics move.
    """
    found = {}
    for name, layer in module.named_modules():
        own = list(layer.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own) and any(True for _ in layer.buffers(recurse=False)):
            found[name] = layer
    return found


def _still_buffers(module: nn.Module) -> set[str]:
    layers = still_layers(module).items()
    return {f"{prefix}.{n}" if prefix else n for prefix, layer in layers for n, _ in layer.named_buffers(recurse=False)}


def _to_array(tensor: torch.Tensor) -> Array:
    detached = tensor.detach().cpu()
    if detached.is_floating_point():
        detached = detached.to(torch.float32)
    return np.array(detached.numpy(), copy=True)


def write_arrays(module: nn.Module, arrays: Arrays, prefix: str = "", *, frozen: bool = True) -> None:
    """Copy `arrays[prefix + name]` into every parameter and persistent buffer of `module`.

    Without `frozen`, what is frozen stays as it is, whatever the arrays hold: what `read_arrays` leaves out.

    Raises:
        ValueError: if a tensor is missing or has another shape.
    """
    with torch.no_grad():
        for name, tensor in _tensors(module, frozen).items():
            value = arrays.get(prefix + name)
            if value is None or tuple(value.shape) != tuple(tensor.shape):
                got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise ValueError(f"tensor {name!r} needs shape {tuple(tensor.shape)}, got {got}")
            tensor.copy_(torch.tensor(value).reshape(tensor.shape))


def not_finite(module: nn.Module) -> str | None:
    """Name of the first parameter with a number that is not finite, or persistent buffer with NaN; None: there is none.

    A buffer may hold infinity for good, as a mask does.
    """
    parameters = dict(module.named_parameters())
    for name, tensor in module.state_dict().items():
        if not (tensor.isfinite() if name in parameters else ~tensor.isnan()).all():
            return name
    return None


def move_towards(module: nn.Module, other: nn.Module, share: float) -> None:
    """Move trainable parameters of `module` by `share` of the way to those of `other`, of the same name and shape.

    Args:
        module: changed in place.
        other: on the same device.
        share: in [0, 1]; 1 copies.
    """
    goals = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            goal = goals.get(name)
            if parameter.requires_grad and goal is not None and goal.shape == parameter.shape:
                parameter.lerp_(goal, share)


def on_device_of(model: nn.Module, batch: Batch) -> Batch:
    """The batch on the device of the model's parameters: the same tensors where they are there already."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return batch
    return {name: tensor.to(parameter.device) for name, tensor in batch.items()}


def prefixed(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The same arrays with `prefix` before every name."""
    return {prefix + name: value for name, value in arrays.items()}


def without_prefix(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays whose name starts with `prefix`, under the rest of their names."""
    return {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
