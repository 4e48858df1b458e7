"""What of the inside of teacher and student can be compared, and W_h between them.

Equation 5 of Wu et al. (see `fedkd.py`) compares hidden states and attention maps layer by layer, which takes models
that return them, and of the same tokens.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedkd_flwr.core.losses import layer_map
from fedkd_flwr.core.protocols import Outputs, Task

# Whether a term takes part. One Literal rather than `bool | Literal["auto"]`: its message names all that is allowed.
Wanted = Literal[True, False, "auto"]
Layers = tuple[Tensor, ...]

_log = logging.getLogger("fedkd")


@dataclass(frozen=True, slots=True)
class Guidance:
    """What passes between one teacher and the student beside their outputs.

    Attributes:
        hidden: whether hidden states do.
        attention: whether attention maps do.
        layers: teacher layer for each student layer, counted from 1; empty where nothing passes.
        widths: (student, teacher) width of the hidden states of each pair of layers; empty where they don't pass.
    """

    hidden: bool = False
    attention: bool = False
    layers: tuple[int, ...] = ()
    widths: tuple[tuple[int, int], ...] = ()

    @property
    def same_width(self) -> bool:
        """Whether W_h maps between equal widths everywhere."""
        return all(student == teacher for student, teacher in self.widths)


def find_guidance(
    task: Task,
    teacher: nn.Module,
    student: nn.Module,
    hidden: Wanted,
    attention: Wanted,
    layers: tuple[int, ...] | None,
    of_which: str = "",
) -> Guidance:
    """Find out what two models can compare, from one made-up example, before any client trains.

    Args:
        task: of both.
        teacher: one of its teachers.
        student: its student.
        hidden: whether hidden states shall be compared; auto where they can be, with a line in the log where not.
        attention: likewise attention maps.
        layers: teacher layer for each student layer, counted from 1; None spreads them evenly.
        of_which: what tells this teacher from others, in messages.

    Raises:
        ValueError: if a term is asked for that can't be, or the layers can't be mapped.
    """
    wanted = {"hidden_states": hidden is not False, "attentions": attention is not False}
    if not any(wanted.values()):
        return Guidance()
    outs = [_example(task, model, **wanted) for model in (teacher, student)]
    # The embedding output comes before the layers, and no layer of the student answers for it.
    states = [_layers(out.hidden_states)[1:] for out in outs]
    maps = [_layers(out.attentions) for out in outs]
    tokens = outs[0].token_mask
    terms = [
        _Term("hidden", "hidden states", hidden, tokens, *states),
        _Term("attention", "attention maps", attention, tokens, *maps),
    ]
    terms = [term for term in terms if term.wanted is not False and term.takes_part(term.obstacle(), of_which)]
    if not terms:
        return Guidance()
    pairs = _mapped(len(terms[0].student), len(terms[0].teacher), layers, of_which)
    names = {term.key for term in terms if term.takes_part(term.obstacle_between(pairs), of_which)}
    if not names:
        return Guidance()
    widths: list[tuple[int, int]] = []
    if "hidden" in names:
        of_teacher_states, of_student_states = states
        mapped = zip(of_student_states, pairs, strict=True)
        widths = [(state.shape[-1], of_teacher_states[layer - 1].shape[-1]) for state, layer in mapped]
    return Guidance("hidden" in names, "attention" in names, pairs, tuple(widths))


def _example(task: Task, model: nn.Module, *, hidden_states: bool, attentions: bool) -> Outputs:
    """A model's outputs for an example; a kind of output that fails is left out."""
    with torch.no_grad():
        try:
            return task.forward(model.eval(), task.example_batch(), hidden_states=hidden_states, attentions=attentions)
        except Exception as error:  # of a library's code, which may not have meant to be asked
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            asked = "attention maps" if attentions else "hidden states"
            _log.warning("a %s fails when it is asked for %s (%s)", type(model).__name__, asked, reason)
    if attentions:
        return _example(task, model, hidden_states=hidden_states, attentions=False)
    with torch.no_grad():
        return task.forward(model.eval(), task.example_batch(), hidden_states=False, attentions=False)


@dataclass(frozen=True, slots=True)
class _Term:
    """One term of equation 5 before it is decided whether it takes part; what each model returned, layer by layer.

    `mask` is that of the tokens which both read, and which the loss is averaged over; None where there is none.
    """

    key: Literal["hidden", "attention"]
    noun: str
    wanted: Wanted
    mask: Tensor | None
    teacher: Layers
    student: Layers

    def obstacle(self) -> str | None:
        """Why no layers of the two can be compared, whichever; None where some can."""
        if not self.teacher or not self.student:
            who = "the student returns" if self.teacher else "the teacher returns"
            return f"{'these models return' if not (self.teacher or self.student) else who} no {self.noun}"
        for who, layers in (("teacher", self.teacher), ("student", self.student)):
            if (wrong := next((layer for layer in layers if not self._fits(layer)), None)) is not None:
                return f"{self.noun} of the {who} are no {self._expected()}, their shape is {list(wrong.shape)}"
        if {self._tokens(layer) for layer in self.teacher}.isdisjoint(self._tokens(layer) for layer in self.student):
            return self._difference(self.teacher[-1], self.student[-1])
        return None

    def obstacle_between(self, pairs: tuple[int, ...]) -> str | None:
        """Why the layers that are mapped to each other can't be compared; None where all can."""
        if len(self.student) != len(pairs) or max(pairs) > len(self.teacher):
            return f"the {self.noun} are of other layers than the hidden states"
        for student, layer in zip(self.student, pairs, strict=True):
            if self._tokens(student) != self._tokens(self.teacher[layer - 1]):
                return self._difference(self.teacher[layer - 1], student)
        return None

    def takes_part(self, obstacle: str | None, of_which: str) -> bool:
        """Whether the term takes part; an obstacle is an error where it was asked for, else a line in the log."""
        if obstacle is not None and self.wanted is True:
            raise ValueError(f"algorithm.{self.key}: {obstacle}{of_which}; set {self.key} to auto or false")
        if obstacle is not None:
            _log.warning("algorithm.%s is off: %s%s", self.key, obstacle, of_which)
        return obstacle is None

    def _tokens(self, layer: Tensor) -> tuple[int, ...]:
        """The axes that must agree: all but the width of states, all but the heads of maps."""
        shape = tuple(layer.shape)
        return shape[:-1] if self.key == "hidden" else shape[:1] + shape[2:]

    def _fits(self, layer: Tensor) -> bool:
        """Whether there is a value for each token, or for each pair of them, as far as it is known what tokens are."""
        shape = tuple(layer.shape)
        if len(shape) != (3 if self.key == "hidden" else 4):
            return False
        if self.mask is None:
            return True
        size, tokens = self.mask.shape
        return shape[:2] == (size, tokens) if self.key == "hidden" else (shape[0], *shape[2:]) == (size, tokens, tokens)

    def _expected(self) -> str:
        of_tokens = "" if self.mask is None else f" of {self.mask.shape[1]} tokens"
        return f"{'[batch, tokens, width]' if self.key == 'hidden' else '[batch, heads, tokens, tokens]'}{of_tokens}"

    def _difference(self, teacher: Tensor, student: Tensor) -> str:
        shapes = f"{list(teacher.shape)} and {list(student.shape)}"
        return f"{self.noun} of teacher and student are not of the same tokens, their shapes are {shapes}"


def _layers(found: tuple[Tensor | None, ...] | None) -> Layers:
    """What a model returned, empty where it returned nothing: some return a None for each layer."""
    layers = tuple(layer for layer in found or () if layer is not None)
    return layers if found and len(layers) == len(found) else ()


def _mapped(num_student: int, num_teacher: int, layers: tuple[int, ...] | None, of_which: str) -> tuple[int, ...]:
    """Teacher layer for each student layer: those asked for, or spread evenly."""
    try:
        pairs = layer_map(num_student, num_teacher) if layers is None else layers
    except ValueError as error:
        raise ValueError(f"algorithm.layer_map: {error}{of_which}") from None
    if len(pairs) != num_student or not all(1 <= layer <= num_teacher for layer in pairs):
        raise ValueError(
            f"algorithm.layer_map must name {num_student} teacher layers in [1, {num_teacher}]{of_which}, "
            f"got {list(pairs)}"
        )
    return pairs


def projections_of(guidance: Guidance, seed: int) -> nn.ModuleList:
    """W_h of each mapped layer: the identity where widths agree, else orthogonal, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(student, teacher, bias=False) for student, teacher in guidance.widths]
        for layer in layers:
            square = layer.in_features == layer.out_features
            (nn.init.eye_ if square else nn.init.orthogonal_)(layer.weight)
    return nn.ModuleList(layers)
