"""A checkpoint's classification head and the data's classes: rows in the data's order, or a head drawn anew.

Row n of a head speaks of the class that the checkpoint calls n. Where the data has the same classes in another order,
the rows are put into that order; where it has others, what the head has learned is worth nothing. Names that say
nothing (LABEL_0, or the numbers 0 to n - 1) leave the rows in their places.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedkd_flwr.tasks.class_names import by_name, listed

_GENERIC = re.compile(r"(?:LABEL_)?([0-9]+)")
_SHOWN = 4  # classes of a head in a note


@dataclass(frozen=True, slots=True)
class CheckpointHead:
    """What a checkpoint says of its head.

    Attributes:
        classes: what it calls them, in the order of its rows.
        made_by: names of the library's classes that wrote it, such as "BertForMaskedLM".
    """

    classes: tuple[str, ...]
    made_by: tuple[str, ...]


def checkpoint_head(source: str, revision: str | None) -> CheckpointHead:
    """What the configuration of a checkpoint says of its head.

    Args:
        source: a folder, or the id of a model of the Hugging Face Hub.
        revision: of a model of the Hub.

    Raises:
        Exception: the library's own, if there is no such checkpoint.
    """
    # Imported here: it takes seconds, and checking a configuration should not.
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    names: Mapping[Any, str] = getattr(config, "id2label", None) or {}
    classes = tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))
    return CheckpointHead(classes, tuple(config.architectures or ()))


def row_order(own: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """For each class of the data the row of a head that speaks of it; None where the head's classes are others.

    Args:
        own: what the checkpoint calls its classes, in the order of its rows.
        classes: of the data, as many.
    """
    found = by_name(own, classes)
    if len(found) == len(classes):
        rows = {found[name]: row for row, name in enumerate(own)}
        return [rows[name] for name in classes]
    if _is_generic(own) or _is_generic(classes):
        return list(range(len(classes)))
    return None


def fit_head(model: nn.Module, own: Sequence[str], classes: Sequence[str], key: str) -> None:
    """Make a loaded model's head one for the classes of the data; see the module's text.

    A head of another number of classes has been drawn anew when it was loaded.

    Args:
        model: of the library, loaded with the data's classes.
        own: what its checkpoint calls its classes.
        classes: of the data.
        key: of the model's options, for errors.

    Raises:
        ValueError: if the rows of such a head can't be found.
    """
    if len(own) != len(classes):
        return
    order = row_order(own, classes)
    if order == list(range(len(classes))):
        return
    tensors = label_tensors(model, len(classes))
    if not tensors:
        raise ValueError(
            f"{key}.source: the head of a {type(model).__name__} has its classes in the order {listed(own)}, which "
            f"can't be changed; give this order in task.label_names, or another model"
        )
    if order is None:
        _redraw(model, tensors)
        return
    with torch.no_grad():
        for name, axis in tensors.items():
            tensor = _tensor(model, name)
            tensor.copy_(tensor.index_select(axis, torch.tensor(order, device=tensor.device)))


def label_tensors(model: nn.Module, num_classes: int) -> dict[str, int]:
    """Parameters and buffers of a model that have an entry for each class, each with the axis of the classes.

    They are those whose shape follows the number of classes: one class more makes that axis longer by one. That holds
    for every family, whatever it calls its head; nothing is computed or held for it.
    """
    config: Any = copy.deepcopy(model.config)
    config.num_labels = num_classes + 1
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        larger = type(model)(config).state_dict()
    found = {}
    for name, tensor in model.state_dict().items():
        longer = larger[name].shape if name in larger else tensor.shape
        differing = [axis for axis, (a, b) in enumerate(zip(tensor.shape, longer, strict=True)) if a != b]
        if len(differing) == 1 and longer[differing[0]] == num_classes + 1 == tensor.shape[differing[0]] + 1:
            found[name] = differing[0]
    return found


def head_notes(options: Any, head: str, classes: Sequence[str]) -> tuple[str, ...]:
    """What becomes of the heads of checkpoints, one line for each that does not stay as it is.

    Args:
        options: of a task: its teacher, its student and its other teachers. Models without a `source` have no
            checkpoint.
        head: the library's class, such as "AutoModelForTokenClassification".
        classes: of the data, in order.
    """
    others = {f"other_teachers.{n}.model": other.model for n, other in enumerate(options.other_teachers)}
    notes = []
    for key, model in {"teacher": options.teacher, "student": options.student, **others}.items():
        if (source := getattr(model, "source", None)) is None:
            continue
        try:
            stored = checkpoint_head(source, model.revision)
        except Exception:  # the model can't be loaded either, and the error then says why
            continue
        # Encoders and language models have none, whatever their configuration says of classes.
        has_head = any(head.removeprefix("AutoModel") in name for name in stored.made_by)
        if has_head and (said := _fate(stored.classes, classes)) is not None:
            notes.append(f"task.{key}: {said}")
    return tuple(notes)


def _fate(own: Sequence[str], classes: Sequence[str]) -> str | None:
    """What becomes of a head, None where it stays as it is."""
    if len(own) != len(classes):
        return f"the checkpoint's head has {len(own)} classes, the data {len(classes)}: it is drawn anew"
    order = row_order(own, classes)
    if order is None:
        return f"the checkpoint's head is for {listed(own, _SHOWN)}, the data has others: it is drawn anew"
    if order != list(range(len(classes))):
        return f"the checkpoint's classes are in another order ({listed(own, _SHOWN)}): its head follows the data's"
    if _is_generic(classes) and not _is_generic(own):
        return f"the data's classes have no names: the checkpoint's are taken by place ({listed(own, _SHOWN)})"
    return None


def _is_generic(names: Sequence[str]) -> bool:
    """Whether names say no more than places: LABEL_0, LABEL_1, or 0, 1."""
    matches = [_GENERIC.fullmatch(name) for name in names]
    return all(match and int(match[1]) == place for place, match in enumerate(matches))


def _tensor(model: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), attribute)
    return tensor


def _redraw(model: nn.Module, tensors: Mapping[str, int]) -> None:
    """Draw the modules anew that hold these tensors, as the library draws a head that a checkpoint does not have."""
    for path in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        module: Any = model.get_submodule(path)
        if module is model:  # no module of its own: a bias of the classes, which begins with nothing
            for name in tensors:
                if "." not in name:
                    _tensor(model, name).data.zero_()
            continue
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        for part in (module, *module.parameters(recurse=False)):
            part._is_hf_initialized = False  # or the library leaves alone what it has loaded
        with torch.no_grad():
            model._init_weights(module)  # type: ignore[operator]
