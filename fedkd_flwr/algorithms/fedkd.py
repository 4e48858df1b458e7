"""FedKD: adaptive mutual distillation between a private teacher and a shared student.

Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature Communications 13:2032
(2022), https://doi.org/10.1038/s41467-022-29763-x. Teacher and student learn from each other on private data; only the
student's update is exchanged. The losses are in `core/losses.py`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd_flwr.algorithms.base import (
    Algorithm,
    AlgorithmOptions,
    Assignment,
    Baseline,
    MeanUpdateServer,
    Metrics,
    SharedModel,
    Trained,
    Width,
    num_parameters,
)
from fedkd_flwr.algorithms.fedavg import FedAvgOptions
from fedkd_flwr.algorithms.fedprox import FedProxOptions, proximal_penalty
from fedkd_flwr.algorithms.guidance import Guidance, Wanted, find_guidance, projections_of
from fedkd_flwr.algorithms.local_only import LocalOnlyOptions
from fedkd_flwr.algorithms.loop import (
    LocalTraining,
    Optimizer,
    OptimizerOptions,
    forward,
    prior_of,
    require_counts,
    run_epochs,
)
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.losses import DistillationTerms, Side, Trust, adaptive_divisor, own_loss, task_loss
from fedkd_flwr.core.modules import move_towards, prefixed, read_arrays, write_arrays
from fedkd_flwr.core.predictions import ensemble
from fedkd_flwr.core.protocols import Batch, ClientData, Models, Outputs, Task
from fedkd_flwr.core.seeds import derive_seed

_TEACHER = "teacher/"
_PROJECTIONS = "projections/"
_STUDENT_OPTIMIZER = "student_optimizer/"
_TEACHER_OPTIMIZER = "teacher_optimizer/"
_PROJECTIONS_OPTIMIZER = "projections_optimizer/"
_NUM_ROUNDS_TRAINED = "num_rounds_trained"


class FedKDOptions(AlgorithmOptions):
    """Options of FedKD.

    Attributes:
        mutual: KL between the two models' outputs (equations 3 and 4).
        hidden: MSE between mapped hidden states (equation 5). auto: where both models return them, of as many tokens,
            but not between models whose weights are loaded, where it costs more than it gives (docs/results.md).
        attention: MSE between mapped attention maps (equation 5), likewise.
        adaptive: divide these by the sum of the task losses; off, they count in full.
        temperature: of the KL; the paper has 1.
        divisor_floor: least value of the divisor, in nats; the paper has none. Two models that know nothing are at
            2 * log(number of classes).
        layer_map: teacher layer for each student layer, counted from 1; null spreads them evenly. Where clients have
            different teachers it is for all of them.
        hidden_warmup_rounds: rounds of a client in which W_h learns before the teacher follows the hidden term. It
            matters only between models of different width, where W_h begins as a random map.
        trust: how far each model follows the other on each example: "all", everywhere alike; "right", only where the
            other is right; "probability", as much as the probability that the other gives to the label; "better", only
            where the other gives the label a higher probability than it does itself.
        student_guidance: factor on all that the student learns from the teacher, so that L_s = L_s_task + factor *
            (L_s_d + L_s_h); the paper has 1.
        teacher_guidance: likewise on what the teacher learns from the student.
        guide_warmup: share of the run over which the student's guidance grows from nothing to its full weight, in
            [0, 1); the teacher learns first.
        logit_adjustment: strength tau of logit adjustment: on each client the student learns with tau * log P(class)
            of this client added to its logits, so that what is shared are not the frequencies of the clients' labels
            (Menon et al., ICLR 2021, https://arxiv.org/abs/2007.07314). 0 is off, 1 is balanced softmax. What is scored
            and exported has no such addend; with `class_weights` of a task it would correct twice.
        proximal_mu: weight of (mu / 2) * ||w - w_shared||^2 on the student, as in FedProx; 0 is off.
        teacher_anchor: share of the way to the student on which the teacher begins each round, in [0, 1]:
            w_t <- (1 - share) * w_t + share * w_s, for every parameter that both have under one name and in one shape.
            0 leaves the teacher to itself; 1 makes one of the student's size a copy of it that is fine-tuned on the
            client.
        predict_with: what a client predicts with, and so what it writes at the end: both models, by the mean of their
            probabilities; its teacher, as in the paper; or the student, which the server writes anyway. All three are
            scored.
        local: how a client trains in a round.
        student_optimizer: the student's.
        teacher_optimizer: the teacher's and W_h's.
        keep_student_moments: go on with the student's moments of a client's last round; off, each round begins afresh,
            because the student's weights jump in between. Left out, it is on where the student's weights are loaded.
        keep_teacher_moments: likewise the teacher's and W_h's, whose weights stay where they were.
    """

    name: Literal["fedkd"] = "fedkd"
    mutual: bool = True
    hidden: Wanted = "auto"
    attention: Wanted = "auto"
    adaptive: bool = True
    temperature: float = Field(1.0, gt=0)
    divisor_floor: float = Field(3.0, gt=0)
    layer_map: tuple[int, ...] | None = None
    hidden_warmup_rounds: int = Field(1, ge=0)
    trust: Trust = "all"
    student_guidance: float = Field(1.0, gt=0)
    teacher_guidance: float = Field(1.0, gt=0)
    guide_warmup: float = Field(0.0, ge=0, lt=1)
    logit_adjustment: float = Field(0.0, ge=0)
    proximal_mu: float = Field(0.0, ge=0)
    teacher_anchor: float = Field(0.0, ge=0, le=1)
    predict_with: Literal["student", "teacher", "ensemble"] = "ensemble"
    local: LocalTraining = LocalTraining()
    student_optimizer: OptimizerOptions = OptimizerOptions()
    teacher_optimizer: OptimizerOptions = OptimizerOptions()
    keep_student_moments: bool = False
    keep_teacher_moments: bool = True

    def for_widths(self, teacher: Width | None, student: Width | None) -> Self:
        """Optimisers of fine-tuning for models with loaded weights; no hidden and attention terms between two of them.

        See `AlgorithmOptions.for_widths`.
        """
        found: dict[str, Any] = {}
        if teacher:
            found["teacher_optimizer"] = self.teacher_optimizer.for_loaded_weights(teacher, student=False)
        if student:
            found["student_optimizer"] = self.student_optimizer.for_loaded_weights(student, student=True)
            if "keep_student_moments" not in self.model_fields_set:
                found["keep_student_moments"] = True
        if teacher and student:
            found |= {term: False for term in ("hidden", "attention") if getattr(self, term) == "auto"}
        return self.model_copy(update=found)

    def terms(self, guidance: Guidance) -> DistillationTerms:
        """Which terms take part between a teacher and the student, for the losses."""
        return DistillationTerms(
            self.mutual,
            guidance.hidden,
            guidance.attention,
            self.adaptive,
            self.temperature,
            self.divisor_floor,
            self.trust,
        )

    def build(self, task: Task, seed: int) -> Algorithm:
        """FedKD between the task's teachers and its student.

        Raises:
            ValueError: if the layers can't be mapped, or a term asks for what the models or the task don't have.
        """
        require_counts(task, self.logit_adjustment)
        models = task.build_models(seed)
        shared = SharedModel(task, models.student)
        client = FedKDClient(task, models, shared, self, seed)
        return Algorithm(
            "updates",
            shared,
            client,
            MeanUpdateServer(shared),
            *num_parameters(models),
            leaves="the update of the student",
            stays="the teacher",
        )

    def baselines(self) -> Sequence[Baseline]:
        """The student without a teacher, the teacher without anyone, and dense FedAvg of the teacher.

        The student keeps whatever it has that needs no teacher.
        """
        moments, adjustment = self.keep_student_moments, self.logit_adjustment
        student: AlgorithmOptions = FedAvgOptions(
            model="student",
            local=self.local,
            optimizer=self.student_optimizer,
            keep_moments=moments,
            logit_adjustment=adjustment,
        )
        if self.proximal_mu:
            student = FedProxOptions(
                model="student",
                proximal_mu=self.proximal_mu,
                local=self.local,
                optimizer=self.student_optimizer,
                keep_moments=moments,
                logit_adjustment=adjustment,
            )
        alone = LocalOnlyOptions(
            model="teacher", local=self.local, optimizer=self.teacher_optimizer, keep_moments=self.keep_teacher_moments
        )
        teacher = FedAvgOptions(
            model="teacher", local=self.local, optimizer=self.teacher_optimizer, keep_moments=moments
        )
        return (
            Baseline("fedavg_student", student, "shared", "the same student without a teacher"),
            Baseline("local_only", alone, "local", "teachers that train alone"),
            Baseline("fedavg", teacher, "local", "dense FedAvg of the teacher", dense=True, common_teacher=True),
        )


class FedKDTeacher:
    """One of the task's teachers, with W_h and everything else that is between it and the student.

    The modules are scratch space for whichever client is at work, as the shared one is: what training can change comes
    from the client's arrays each time, and the frozen rest is of version 0 for good, so no client keeps it.
    """

    def __init__(self, task: Task, models: Models, index: int, options: FedKDOptions, seed: int) -> None:
        self.module = (models.teacher, *models.other_teachers)[index]
        of_which = f" (teacher {index})" if models.other_teachers else ""
        self.guidance = find_guidance(
            task, self.module, models.student, options.hidden, options.attention, options.layer_map, of_which
        )
        self.terms = options.terms(self.guidance)
        other = (index,) if index else ()  # the first has the seed that it would have as the only one
        self.projections = projections_of(self.guidance, derive_seed(seed, "projections", *other))
        self.initial = self.read()
        options.local.place(self.module, self.projections)

    def read(self) -> Arrays:
        """Teacher and W_h as arrays, without what is frozen."""
        arrays = prefixed(_TEACHER, read_arrays(self.module, frozen=False))
        return arrays | prefixed(_PROJECTIONS, read_arrays(self.projections))

    def load(self, private: Arrays) -> None:
        """Set teacher and W_h to a client's arrays."""
        write_arrays(self.module, private, _TEACHER, frozen=False)
        write_arrays(self.projections, private, _PROJECTIONS)

    def side(self, out: Outputs) -> Side:
        """What the teacher offers to the student."""
        layers = self.guidance.layers
        hidden = [out.hidden_states[layer] for layer in layers] if out.hidden_states else None
        attentions = [out.attentions[layer - 1] for layer in layers] if out.attentions else None
        return Side(out.logits, task_loss(out), hidden, attentions)

    def student_side(self, out: Outputs) -> Side:
        """What the student offers to this teacher: its hidden states go through W_h."""
        hidden: Sequence[Tensor] | None = None
        if out.hidden_states:
            hidden = [
                projection(state) for projection, state in zip(self.projections, out.hidden_states[1:], strict=True)
            ]
        return Side(out.logits, task_loss(out), hidden, out.attentions or None)


class FedKDClient:
    """Client half: teacher and student take every batch together, one forward pass each."""

    def __init__(self, task: Task, models: Models, shared: SharedModel, options: FedKDOptions, seed: int) -> None:
        self._task = task
        self._shared = shared
        self._options = options
        options.local.place(models.student)
        num_teachers = 1 + len(models.other_teachers)
        self._teachers = [FedKDTeacher(task, models, index, options, seed) for index in range(num_teachers)]

    def initial_private(self, data: ClientData) -> Arrays:
        """Version 0 of the client's teacher, the same on every client that has this one, and W_h."""
        return {**self._teachers[data.teacher].initial, _NUM_ROUNDS_TRAINED: np.array(0)}

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """One round of mutual distillation; the student's update is the upload."""
        options, teacher = self._options, self._teachers[data.teacher]
        self._shared.load(shared)
        teacher.load(private)
        if options.teacher_anchor:
            move_towards(teacher.module, self._shared.module, options.teacher_anchor)
        optimizers = {
            _STUDENT_OPTIMIZER: Optimizer(options.student_optimizer, self._shared.module.named_parameters()),
            _TEACHER_OPTIMIZER: Optimizer(options.teacher_optimizer, teacher.module.named_parameters()),
            _PROJECTIONS_OPTIMIZER: Optimizer(options.teacher_optimizer, teacher.projections.named_parameters()),
        }
        keep = {_STUDENT_OPTIMIZER: options.keep_student_moments}
        lasting = {p: o for p, o in optimizers.items() if keep.get(p, options.keep_teacher_moments)}
        for prefix, optimizer in lasting.items():
            optimizer.write_state(prefix, private)
        num_rounds_trained = int(private[_NUM_ROUNDS_TRAINED])
        warm = teacher.guidance.same_width or num_rounds_trained >= options.hidden_warmup_rounds

        prior = prior_of(data, options.logit_adjustment)
        guided = min(assignment.end / options.guide_warmup, 1.0) if options.guide_warmup else 1.0
        penalty = proximal_penalty(self._shared.module, options.proximal_mu) if options.proximal_mu else None

        def loss_of(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
            loss, found = self._losses(teacher, batch, prior, guided, teacher_follows_hidden=warm)
            return loss if penalty is None else loss + penalty(self._shared.module), found

        options.local.prepare(self._shared.module, teacher.module)
        measures = run_epochs(data.train, options.local, assignment, list(optimizers.values()), loss_of)
        kept = {**teacher.read(), _NUM_ROUNDS_TRAINED: np.array(num_rounds_trained + 1)}
        for prefix, optimizer in lasting.items():
            kept |= optimizer.read_state(prefix)
        metrics = {name: float(np.mean(values)) for name, values in measures.items() if name != "divisor"}
        return Trained(self._shared.update(shared), kept, metrics | {"min_divisor": min(measures["divisor"])})

    def evaluate(self, shared: Arrays, private: Arrays, data: ClientData) -> dict[str, Metrics]:
        """Score of the student as shared, of the client's teacher, and of both together."""
        teacher, examples = self._teachers[data.teacher], data.test
        teacher.load(private)
        of_student = self._shared.predict(shared, examples)
        of_teacher = self._task.predict(teacher.module, examples)
        found = {"shared": of_student, "private": of_teacher, "ensemble": ensemble(of_student, of_teacher)}
        return {whose: self._task.score(predictions, examples) for whose, predictions in found.items()}

    def export_private(self, shared: Arrays, private: Arrays, data: ClientData, directory: Path) -> bool:
        """Write what the client predicts with: its teacher, or that and the student in a directory each."""
        predict_with = self._options.predict_with
        if predict_with == "student":
            return False
        teacher = self._teachers[data.teacher]
        teacher.load(private)
        together = predict_with == "ensemble"
        self._task.export(teacher.module, directory / "teacher" if together else directory)
        if together:
            self._shared.export(shared, directory / "student")
        return True

    def _losses(
        self, teacher: FedKDTeacher, batch: Batch, prior: Tensor | None, guided: float, *, teacher_follows_hidden: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of both models' own losses: their graphs are disjoint, so one backward pass serves both.

        Args:
            teacher: of this client.
            batch: what both models take.
            prior: [classes], added to the student's logits.
            guided: factor of the student's guidance, in [0, 1].
            teacher_follows_hidden: whether the teacher has the hidden term.
        """
        terms, options, local = teacher.terms, self._options, self._options.local
        run = partial(
            forward, self._task, batch=batch, local=local, hidden_states=terms.hidden, attentions=terms.attention
        )
        of_teacher = run(teacher.module)
        of_student = run(self._shared.module, prior=prior)
        guide, student = teacher.side(of_teacher), teacher.student_side(of_student)
        divisor = adaptive_divisor(guide.task, student.task, terms.divisor_floor)
        weight = divisor if terms.adaptive else torch.ones(())
        mask = of_student.token_mask
        learner = guide if teacher_follows_hidden else Side(guide.logits, guide.task, None, guide.attentions)
        student_loss = own_loss(
            student, guide, of_student.labels, weight / guided / options.student_guidance, terms, mask
        )
        teacher_loss = own_loss(learner, student, of_student.labels, weight / options.teacher_guidance, terms, mask)
        measures = {
            "train_loss": student.task.detach(),
            "teacher_train_loss": guide.task.detach(),
            "divisor": divisor,
        }
        return student_loss + teacher_loss, measures
