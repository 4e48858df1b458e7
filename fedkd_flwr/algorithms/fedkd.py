"""FedKD: adaptive mutual distillation between a private teacher and a shared student.

Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature Communications 13:2032
(2022), https://doi.org/10.1038/s41467-022-29763-x. Teacher and student learn from each other on private data; only the
student's update is exchanged. The losses are in `core/losses.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd_flwr.algorithms.base import (
    Algorithm,
    AlgorithmOptions,
    Assignment,
    MeanUpdateServer,
    Metrics,
    SharedModel,
    Trained,
    num_parameters,
)
from fedkd_flwr.algorithms.loop import LocalTraining, Optimizer, OptimizerOptions, run_epochs
from fedkd_flwr.core.arrays import Array, Arrays
from fedkd_flwr.core.losses import DistillationTerms, Side, adaptive_divisor, cross_entropy, layer_map, own_loss
from fedkd_flwr.core.modules import prefixed, read_arrays, write_arrays
from fedkd_flwr.core.protocols import Batch, ClientData, Models, Outputs, Task
from fedkd_flwr.core.seeds import derive_seed

_TEACHER = "teacher/"
_PROJECTIONS = "projections/"
_TEACHER_OPTIMIZER = "teacher_optimizer/"
_PROJECTIONS_OPTIMIZER = "projections_optimizer/"
_NUM_ROUNDS_TRAINED = "num_rounds_trained"


class FedKDOptions(AlgorithmOptions):
    """Options of FedKD.

    Attributes:
        mutual: KL between the two models' outputs (equations 3 and 4).
        hidden: MSE between mapped hidden states (equation 5).
        attention: MSE between mapped attention maps (equation 5).
        adaptive: divide these by the sum of the task losses; off, they count in full.
        temperature: of the KL; the paper has 1.
        divisor_floor: least value of the divisor; the paper has none.
        layer_map: teacher layer for each student layer, counted from 1; null spreads them evenly.
        hidden_warmup_rounds: rounds of a client in which W_h learns before the teacher follows the hidden term. It
            matters only between models of different width, where W_h begins as a random map.
        local: epochs and batch size of a client's round.
        student_optimizer: begun afresh each round, because the student's weights jump.
        teacher_optimizer: the teacher's and W_h's; its moments are kept from round to round.
    """

    name: Literal["fedkd"] = "fedkd"
    mutual: bool = True
    hidden: bool = True
    attention: bool = True
    adaptive: bool = True
    temperature: float = Field(1.0, gt=0)
    divisor_floor: float = Field(0.1, gt=0)
    layer_map: tuple[int, ...] | None = None
    hidden_warmup_rounds: int = Field(1, ge=0)
    local: LocalTraining = LocalTraining()
    student_optimizer: OptimizerOptions = OptimizerOptions()
    teacher_optimizer: OptimizerOptions = OptimizerOptions()

    @property
    def terms(self) -> DistillationTerms:
        """Which terms take part, for the losses."""
        return DistillationTerms(
            self.mutual, self.hidden, self.attention, self.adaptive, self.temperature, self.divisor_floor
        )

    def build(self, task: Task, seed: int) -> Algorithm:
        """FedKD between the task's teacher and student.

        Raises:
            ValueError: if the layers can't be mapped, or a term asks for what the models don't return.
        """
        models = task.build_models(seed)
        shared = SharedModel(task, models.student)
        client = FedKDClient(task, models, shared, self, derive_seed(seed, "projections"))
        return Algorithm("updates", shared, client, MeanUpdateServer(shared), *num_parameters(models))


class FedKDClient:
    """Client half: teacher and student take every batch together, one forward pass each."""

    def __init__(self, task: Task, models: Models, shared: SharedModel, options: FedKDOptions, seed: int) -> None:
        self._task = task
        self._teacher = models.teacher
        self._shared = shared
        self._options = options
        self._terms = options.terms
        self._pairs, widths = _mapped_layers(task, models, options)
        self._projections = _projections(widths, seed)
        self._same_width = all(student == teacher for student, teacher in widths)
        self._initial = prefixed(_TEACHER, read_arrays(self._teacher)) | prefixed(
            _PROJECTIONS, read_arrays(self._projections)
        )

    def initial_private(self) -> Arrays:
        """The teacher's version 0, the same on every client, and W_h."""
        return self._initial | {_NUM_ROUNDS_TRAINED: np.array(0)}

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """One round of mutual distillation; the student's update is the upload."""
        options = self._options
        self._shared.load(shared)
        self._load_private(private)
        student = Optimizer(options.student_optimizer, self._shared.module.named_parameters())
        teacher = Optimizer(options.teacher_optimizer, self._teacher.named_parameters())
        projections = Optimizer(options.teacher_optimizer, self._projections.named_parameters())
        teacher.write_state(_TEACHER_OPTIMIZER, private)
        projections.write_state(_PROJECTIONS_OPTIMIZER, private)
        num_rounds_trained = int(private[_NUM_ROUNDS_TRAINED])
        warm = self._same_width or num_rounds_trained >= options.hidden_warmup_rounds

        def step(batch: Batch) -> Mapping[str, float]:
            loss, measures = self._losses(batch, teacher_follows_hidden=warm)
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in (student, teacher, projections):
                optimizer.step()
            return measures

        self._shared.module.train()
        self._teacher.train()
        measures = run_epochs(data.train, options.local, assignment.seed, step)
        kept = self._read_private(num_rounds_trained + 1)
        kept |= teacher.read_state(_TEACHER_OPTIMIZER) | projections.read_state(_PROJECTIONS_OPTIMIZER)
        metrics = {name: float(np.mean(values)) for name, values in measures.items() if name != "divisor"}
        return Trained(self._shared.update(shared), kept, metrics | {"min_divisor": min(measures["divisor"])})

    def evaluate(self, shared: Arrays, private: Arrays, data: ClientData) -> dict[str, Metrics]:
        """Score of the student as shared, and of the client's teacher."""
        write_arrays(self._teacher, private, _TEACHER)
        return {
            "shared": self._shared.score(shared, data.test),
            "private": self._task.score(self._teacher, data.test),
        }

    def export_private(self, private: Arrays, directory: Path) -> bool:
        """Write the client's teacher."""
        write_arrays(self._teacher, private, _TEACHER)
        self._task.export(self._teacher, directory)
        return True

    def _losses(self, batch: Batch, *, teacher_follows_hidden: bool) -> tuple[Tensor, dict[str, float]]:
        """Sum of both models' own losses: their graphs are disjoint, so one backward pass serves both."""
        terms = self._terms
        wanted = {"hidden_states": terms.hidden, "attentions": terms.attention}
        of_teacher = self._task.forward(self._teacher, batch, **wanted)
        of_student = self._task.forward(self._shared.module, batch, **wanted)
        teacher = self._teacher_side(of_teacher)
        student = self._student_side(of_student)
        divisor = adaptive_divisor(teacher.task, student.task, terms.divisor_floor)
        weight = divisor if terms.adaptive else torch.ones(())
        mask = of_student.token_mask
        learner = teacher if teacher_follows_hidden else Side(teacher.logits, teacher.task, None, teacher.attentions)
        student_loss = own_loss(student, teacher, of_student.labels, weight, terms, mask)
        teacher_loss = own_loss(learner, student, of_student.labels, weight, terms, mask)
        measures = {
            "train_loss": float(student.task.detach()),
            "teacher_train_loss": float(teacher.task.detach()),
            "divisor": float(divisor),
        }
        return student_loss + teacher_loss, measures

    def _teacher_side(self, out: Outputs) -> Side:
        hidden = [out.hidden_states[layer] for layer in self._pairs] if out.hidden_states else None
        attentions = [out.attentions[layer - 1] for layer in self._pairs] if out.attentions else None
        return Side(out.logits, cross_entropy(out.logits, out.labels), hidden, attentions)

    def _student_side(self, out: Outputs) -> Side:
        hidden: Sequence[Tensor] | None = None
        if out.hidden_states:
            hidden = [
                projection(state) for projection, state in zip(self._projections, out.hidden_states[1:], strict=True)
            ]
        return Side(out.logits, cross_entropy(out.logits, out.labels), hidden, out.attentions or None)

    def _load_private(self, private: Arrays) -> None:
        write_arrays(self._teacher, private, _TEACHER)
        write_arrays(self._projections, private, _PROJECTIONS)

    def _read_private(self, num_rounds_trained: int) -> dict[str, Array]:
        arrays = prefixed(_TEACHER, read_arrays(self._teacher))
        arrays |= prefixed(_PROJECTIONS, read_arrays(self._projections))
        return arrays | {_NUM_ROUNDS_TRAINED: np.array(num_rounds_trained)}


def _mapped_layers(task: Task, models: Models, options: FedKDOptions) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Teacher layer for each student layer, and the (student, teacher) width of each pair; empty where none is needed.

    One blank example tells what the models return, before any client trains.
    """
    if not (options.hidden or options.attention):
        return (), []
    wanted = {"hidden_states": True, "attentions": options.attention}
    with torch.no_grad():
        of_teacher = task.forward(models.teacher.eval(), task.example_batch(), **wanted)
        of_student = task.forward(models.student.eval(), task.example_batch(), **wanted)
    if not (of_teacher.hidden_states and of_student.hidden_states):
        raise ValueError("algorithm: these models return no hidden states; set hidden and attention to false")
    if options.attention and not (of_teacher.attentions and of_student.attentions):
        raise ValueError("algorithm.attention: these models return no attention maps; set attention to false")
    num_teacher, num_student = len(of_teacher.hidden_states) - 1, len(of_student.hidden_states) - 1
    pairs = options.layer_map if options.layer_map is not None else _even_map(num_student, num_teacher)
    if len(pairs) != num_student or not all(1 <= layer <= num_teacher for layer in pairs):
        raise ValueError(
            f"algorithm.layer_map must name {num_student} teacher layers in [1, {num_teacher}], got {list(pairs)}"
        )
    states = zip(of_student.hidden_states[1:], pairs, strict=True)
    widths = [(state.shape[-1], of_teacher.hidden_states[layer].shape[-1]) for state, layer in states]
    return pairs, widths if options.hidden else []


def _even_map(num_student: int, num_teacher: int) -> tuple[int, ...]:
    try:
        return layer_map(num_student, num_teacher)
    except ValueError as error:
        raise ValueError(f"algorithm.layer_map: {error}") from None


def _projections(widths: list[tuple[int, int]], seed: int) -> nn.ModuleList:
    """W_h of each mapped layer: the identity where widths agree, else orthogonal, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(student, teacher, bias=False) for student, teacher in widths]
        for layer in layers:
            square = layer.in_features == layer.out_features
            (nn.init.eye_ if square else nn.init.orthogonal_)(layer.weight)
    return nn.ModuleList(layers)
