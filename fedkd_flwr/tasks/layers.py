"""A student cut from its teacher: some of the teacher's layers, whatever the family, found by comparing the two.

What a configuration says layer by layer is cut as the layers are; which modules are layers shows where the student has
fewer of them.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field
from torch import nn

from fedkd_flwr.tasks.base import quiet
from fedkd_flwr.tasks.source import reason_of

# Names of a number of layers beside `num_hidden_layers`, in families that have an encoder and a decoder.
_COUNTS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
_NO_LAYERS = {"architectures", "image_size", "patch_size"}  # lists that may happen to have as many entries
# In names of attributes: the number of a layer itself, and a state.
_NO_TRAITS = ("idx", "index", "layer_id", "layer_number", "training", "checkpointing")


class LayersOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A student cut from its teacher: some of its layers, its embeddings and its head.

    Attributes:
        num_layers: how many, at most the teacher's.
        pick: "first" takes the first ones, as FedKD's authors do; "spread" every k-th, the last one included.
    """

    name: Literal["layers"] = "layers"
    num_layers: int = Field(2, ge=1)
    pick: Literal["first", "spread"] = "first"

    def picked(self, depth: int) -> list[int]:
        """Which of `depth` layers, from 0.

        Raises:
            ValueError: if there are fewer.
        """
        num = self.num_layers
        if num > depth:
            raise ValueError(f"task.student.num_layers must be at most the teacher's {depth}, got {num}")
        return [layer if self.pick == "first" else (layer + 1) * depth // num - 1 for layer in range(num)]


def cut_student(teacher: nn.Module, options: LayersOptions) -> nn.Module:
    """A student of some of the teacher's layers, with its embeddings and its head.

    A model with an encoder and a decoder is cut in both.

    Raises:
        ValueError: if the teacher has fewer layers, or none that can be told apart.
    """
    config: Any = copy.deepcopy(teacher.config)
    family: Any = type(teacher)
    depths = {depth for part in _parts(config) for _, depth in _counts(part)}
    if not depths or not any(len(layers) in depths for layers in _stacks(teacher).values()):
        raise ValueError(_no_stack(teacher))
    try:
        for part in _parts(config):
            _cut_config(part, options)
        with quiet():
            student: nn.Module = family(config)
            type(config).from_dict(config.to_dict())  # what an export is loaded with
    except Exception as error:  # the library's own
        if str(error).startswith("task.student."):
            raise
        raise ValueError(
            f"task.student: a {type(teacher).__name__} can't be cut to {options.num_layers} layers "
            f"({reason_of(error)}); give the student a source or a config of its own"
        ) from error
    picked = _picked(teacher, student, options)
    if not picked and depths != {options.num_layers}:
        raise ValueError(_no_stack(teacher))
    _copy_layers(teacher, student, picked)
    return student


def _no_stack(teacher: nn.Module) -> str:
    return (
        f"task.student: a {type(teacher).__name__} has no plain stack of layers to cut from; "
        "give the student a source or a config of its own"
    )


def _parts(config: Any) -> Iterator[Any]:
    """A configuration, or those inside of it that are of text models, whichever has a number of layers."""
    if any(True for _ in _counts(config)):
        yield config
        return
    for name, part in vars(config).items():
        if hasattr(part, "to_dict") and not any(other in name for other in ("vision", "audio", "image")):
            yield from _parts(part)


def _counts(config: Any) -> Iterator[tuple[str, int]]:
    for name in _COUNTS:
        if isinstance(depth := getattr(config, name, None), int):
            yield name, depth


def _cut_config(config: Any, options: LayersOptions) -> None:
    """Change numbers of layers, and every list that has an entry for each layer."""
    depths = dict(_counts(config))
    for name, values in list(vars(config).items()):
        if isinstance(values, list | tuple) and len(values) in depths.values() and name not in _NO_LAYERS:
            setattr(config, name, type(values)(values[layer] for layer in options.picked(len(values))))
    for name, depth in depths.items():
        options.picked(depth)  # which says so if there are fewer
        setattr(config, name, options.num_layers)
    # GPT-Neo says the same twice, once with numbers of repetitions.
    if hasattr(config, "attention_types") and isinstance(kinds := getattr(config, "attention_layers", None), list):
        config.attention_types = [[[kind], 1] for kind in kinds]


def _stacks(model: nn.Module) -> Mapping[str, nn.ModuleList | nn.Sequential]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential)}


def _picked(teacher: nn.Module, student: nn.Module, options: LayersOptions) -> dict[str, list[int]]:
    """For each stack of which the student has less: which of the teacher's layers its own stand for."""
    of_teacher = _stacks(teacher)
    return {
        name: options.picked(len(of_teacher[name]))
        for name, layers in _stacks(student).items()
        if len(layers) == options.num_layers < len(of_teacher.get(name, layers))
    }


def _copy_layers(teacher: nn.Module, student: nn.Module, picked: Mapping[str, Sequence[int]]) -> None:
    """Give the student the weights of the layers that were picked, and of all that is no layer."""
    values, wanted = teacher.state_dict(), student.state_dict()
    for name, own in wanted.items():
        source, is_layer = _source_of(name, picked)
        if source in values and values[source].shape == own.shape:
            wanted[name] = values[source]
        elif source not in values or is_layer:
            raise ValueError(
                _unlike(teacher, f"{source!r} is {'missing' if source not in values else 'of another shape'}")
            )
        # What is no layer but as large as their number, such as weights of the layers' mean, stays as it was drawn.
    modules = dict(teacher.named_modules())
    for name, module in student.named_modules():
        source, is_layer = _source_of(name, picked)
        if is_layer and (there := modules.get(source)) is not None and _traits(there) != _traits(module):
            raise ValueError(_unlike(teacher, f"{source!r} is of another kind than the student's {name!r}"))
    student.load_state_dict(wanted)


def _unlike(teacher: nn.Module, what: str) -> str:
    return (
        f"task.student.pick: layers of a {type(teacher).__name__} are not alike ({what}), so none can stand in "
        "another's place; use pick: first, or give the student a source or a config"
    )


def _source_of(name: str, picked: Mapping[str, Sequence[int]]) -> tuple[str, bool]:
    """Name in the teacher of what has `name` in the student, and whether it belongs to a layer."""
    for stack, layers in picked.items():
        if name.startswith(f"{stack}."):
            layer, *rest = name[len(stack) + 1 :].split(".", 1)
            return ".".join([stack, str(layers[int(layer)]), *rest]), True
    return name, False


def _traits(module: nn.Module) -> dict[str, Any]:
    """What decides how a module computes beside its tensors: its class, and plain values but its number and state."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, str | int) and not any(part in name for part in _NO_TRAITS) and not name.startswith("_")
    }
    return {**plain, "class": type(module)}


def layer_stack(model: nn.Module) -> nn.ModuleList | None:
    """The one stack of all layers; None where there is none, or an encoder and a decoder."""
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return found[0] if found and not encodes else None
