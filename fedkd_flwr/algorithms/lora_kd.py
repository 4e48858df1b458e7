"""Federated fine-tuning by outputs: adapters stay on their clients, soft labels of public examples are exchanged.

In the spirit of Li & Li, "Knowledge distillation and LoRA for federated fine-tuning", CAC 2024, pp. 426-430,
https://doi.org/10.1109/CAC63892.2024.10865080, of which no more than the idea is public: every client fine-tunes
adapters on a frozen backbone, and bytes don't depend on their size. The steps are those of FedMD and DS-FL. In a round
a client

1. learns from the soft labels that have come since its last round: tau^2 KL(soft labels || softmax(z / tau)),
2. learns from its own data,
3. says softmax(z / tau) of the public examples that are asked.

The server's mean of what all say is the next broadcast; a model of its own learns from it, too. No example is asked
again before all others were, and whoever comes late is sent what is known.
"""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from fedkd_flwr.algorithms.base import (
    Algorithm,
    AlgorithmOptions,
    Assignment,
    MakeCodec,
    Metrics,
    Trained,
    Wires,
    num_classes_of,
    num_parameters,
)
from fedkd_flwr.algorithms.loop import (
    LocalTraining,
    Optimizer,
    OptimizerOptions,
    prior_of,
    require_counts,
    train_supervised,
)
from fedkd_flwr.algorithms.lora import AdaptedModels, LoraOptions, Ranks, plain
from fedkd_flwr.algorithms.public_distillation import (
    VERSION,
    Distillation,
    Distiller,
    public_examples_of,
)
from fedkd_flwr.algorithms.soft_labels import (
    SOFT_LABELS,
    Form,
    NoReduction,
    Reduction,
    Schedule,
    SoftLabelCodec,
    SoftLabelMean,
)
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.modules import prefixed, read_arrays, without_prefix, write_arrays
from fedkd_flwr.core.protocols import ClientData, Examples, Task, score_of
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.core.soft_labels import Weighting

_MODEL, _OPTIMIZER = "model/", "optimizer/"
_SEEN = "seen"
_STORED = np.dtype(np.float16)  # of soft labels that are known


class LoraKDOptions(AlgorithmOptions):
    """Options of federated fine-tuning by outputs.

    Attributes:
        model: which of the task's models is a client's backbone; teachers may differ (`other_teachers`).
        server_model: likewise the server's, which learns from soft labels alone.
        lora: adapters of every model.
        ranks: of the clients' adapters, dealt in turn: client c has that at place c modulo their number. null: all have
            that of `lora`, as the server has.
        num_asked: public examples that are asked in a round.
        temperature: tau, of what clients say and of what is learned from it.
        uplink: how a client's soft labels are written; see `SoftLabelCodec`.
        downlink: how those that go back are.
        top_k: of that form; 1 is the likeliest class alone.
        weighting: how much a client counts in the mean; see `weights_of`.
        entropy_reduction: what is done to the mean before it goes back.
        distillation: how clients learn from soft labels.
        server_distillation: how the server's model does.
        local: how a client trains on its own data in a round.
        optimizer: the client's, there.
        keep_moments: go on with its moments of the last round.
        logit_adjustment: strength of logit adjustment on each client; see `FedKDOptions`. Clients with few classes then
            don't say that there are no others.
    """

    weighs_by_examples: ClassVar[bool] = False
    name: Literal["lora_kd"] = "lora_kd"
    model: Literal["teacher", "student"] = "teacher"
    server_model: Literal["teacher", "student"] = "teacher"
    lora: LoraOptions = LoraOptions()
    ranks: Ranks = None
    num_asked: int = Field(500, ge=1)
    temperature: float = Field(1.0, gt=0)
    uplink: Form = "int8"
    downlink: Form = "int8"
    top_k: int = Field(1, ge=1, lt=2**16)
    weighting: Weighting = "uniform"
    entropy_reduction: Reduction = NoReduction()
    distillation: Distillation = Distillation()
    server_distillation: Distillation = Distillation(num_replayed=None)
    local: LocalTraining = LocalTraining()
    optimizer: OptimizerOptions = OptimizerOptions()
    keep_moments: bool = True
    logit_adjustment: float = Field(0.0, ge=0)

    def build(self, task: Task, seed: int) -> Algorithm:
        """Fine-tuning by outputs on the task's public examples.

        Raises:
            ValueError: if there are none, or fewer than are asked, or a model has not one output for each class.
        """
        require_counts(task, self.logit_adjustment)
        public = public_examples_of(task, self.name)
        if self.num_asked > len(public):
            raise ValueError(
                f"algorithm.num_asked must be at most {len(public)}, the public examples (task.public), "
                f"got {self.num_asked}"
            )
        models = task.build_models(seed)
        sizes = num_parameters(models)
        backbones = (models.teacher, *models.other_teachers) if self.model == "teacher" else (models.student,)
        of_server = models.teacher if self.server_model == "teacher" else models.student
        num_classes = num_classes_of(task, (*backbones, of_server))
        schedule = Schedule(len(public), self.num_asked, seed)
        of_clients = AdaptedModels(backbones, self.lora, self.ranks, derive_seed(seed, "adapters"))
        own = AdaptedModels((of_server,), self.lora, None, derive_seed(seed, "adapters of the server"))
        self.local.place(*of_clients.all(), *own.all())
        distiller = Distiller(task, public, schedule, self.local, self.temperature)
        return Algorithm(
            "outputs",
            SharedSoftLabels(schedule, len(public), num_classes, self),
            LoraKDClient(task, of_clients, distiller, self),
            LoraKDServer(task, own.first, distiller, self),
            *sizes,
            make_aggregator=lambda: SoftLabelMean(self.weighting),
            leaves=f"soft labels of {self.num_asked} public examples a round",
            stays=f"the {self.model} and its adapters",
            notes=(
                f"clients tell what their models say of {self.num_asked} of {len(public)} public examples a round; "
                "soft labels can give away what a client's labels are",
            ),
            foundations=lambda: {"public examples": public.digest()},
            shows_history=True,
            weighs_claims=self.weighting == "num_examples",
        )


class SharedSoftLabels:
    """What all know of public examples: version 0 is that nobody has said anything."""

    def __init__(self, schedule: Schedule, num_public: int, num_classes: int, options: LoraKDOptions) -> None:
        self._schedule = schedule
        self._shape = (num_public, num_classes)
        self._options = options

    def initial(self) -> Arrays:
        """Rows of zeros."""
        return {SOFT_LABELS: np.zeros(self._shape, _STORED), VERSION: np.zeros(1, np.int64)}

    def wires(self, make_codec: MakeCodec) -> Wires | None:
        """Codecs of soft labels; the user's is for updates of models, of which there are none."""
        options = self._options
        up, down = (
            SoftLabelCodec(options.num_asked, self._shape[1], form, options.top_k)
            for form in (options.uplink, options.downlink)
        )
        return Wires(up, down)

    def apply(self, shared: Arrays, broadcast: Arrays) -> Arrays:
        """The rows that were asked have what was answered."""
        version = int(shared[VERSION][0])
        rows = np.array(shared[SOFT_LABELS], copy=True)
        rows[self._schedule.asked(version)] = broadcast[SOFT_LABELS].astype(_STORED)
        return {SOFT_LABELS: rows, VERSION: np.array([version + 1], np.int64)}


class LoraKDClient:
    """Client half: adapters and head of its own, which never leave it."""

    def __init__(self, task: Task, models: AdaptedModels, distiller: Distiller, options: LoraKDOptions) -> None:
        self._task = task
        self._models = models
        self._distiller = distiller
        self._options = options

    def initial_private(self, data: ClientData) -> Arrays:
        """Version 0 of adapters and head; nothing is learned from others yet."""
        return {**prefixed(_MODEL, self._models.initial(data)), _SEEN: np.zeros(1, np.int64)}

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """Learn from the others, learn from the own data, answer."""
        options, model = self._options, self._load(private, data)
        seen = int(private[_SEEN][0])
        learned = self._distiller.teach(model, shared, seen, options.distillation, assignment)
        optimizer = Optimizer(options.optimizer, model.named_parameters())
        if options.keep_moments:
            optimizer.write_state(_OPTIMIZER, private)
        prior = prior_of(data, options.logit_adjustment)
        metrics = train_supervised(self._task, model, optimizer, data.train, options.local, assignment, prior=prior)
        kept = {**prefixed(_MODEL, read_arrays(model, frozen=False)), _SEEN: shared[VERSION]}
        if options.keep_moments:
            kept |= optimizer.read_state(_OPTIMIZER)
        return Trained(self._distiller.ask(model, shared), kept, metrics | learned)

    def evaluate(self, shared: Arrays, private: Arrays, data: ClientData) -> dict[str, Metrics]:
        """Score of the client's own model."""
        return {"private": score_of(self._task, self._load(private, data), data.test)}

    def export_private(self, shared: Arrays, private: Arrays, data: ClientData, directory: Path) -> bool:
        """Write the client's own model, its adapters added to their layers."""
        self._task.export(plain(self._load(private, data)), directory)
        return True

    def _load(self, private: Arrays, data: ClientData) -> nn.Module:
        model = self._models.of(data)
        write_arrays(model, private, _MODEL, frozen=False)
        return model


class LoraKDServer:
    """Server half: the mean, made sharper where asked, and a model that learns from it as clients do."""

    def __init__(self, task: Task, model: nn.Module, distiller: Distiller, options: LoraKDOptions) -> None:
        self._task = task
        self._model = model
        self._distiller = distiller
        self._options = options
        self._initial: Arrays = read_arrays(model, frozen=False)
        self.begin()

    def broadcast(self, aggregate: Arrays, shared: Arrays, assignment: Assignment) -> Arrays:
        """The mean of what clients say, its entropy reduced where asked."""
        return {SOFT_LABELS: self._options.entropy_reduction.apply(aggregate[SOFT_LABELS]).astype(np.float32)}

    def begin(self) -> None:
        """The model is of version 0."""
        self._arrays, self._seen = self._initial, 0

    def learn(self, shared: Arrays, assignment: Assignment) -> None:
        """Let the server's model learn from a new version."""
        write_arrays(self._model, self._arrays, frozen=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(assignment.seed)  # dropout draws from torch's global source
            self._distiller.teach(self._model, shared, self._seen, self._options.server_distillation, assignment)
        self._arrays, self._seen = read_arrays(self._model, frozen=False), int(shared[VERSION][0])

    def state(self) -> Arrays:
        """Adapters and head of the server's model, and the version that it has learned."""
        return {**prefixed(_MODEL, self._arrays), _SEEN: np.array([self._seen], np.int64)}

    def restore(self, state: Arrays) -> None:
        """Go on from a checkpoint."""
        self._arrays, self._seen = without_prefix(_MODEL, state), int(state[_SEEN][0])

    def evaluate(self, shared: Arrays, examples: Examples) -> Metrics | None:
        """Score of the server's model."""
        write_arrays(self._model, self._arrays, frozen=False)
        return self._task.score(self._task.predict(self._model, examples), examples)

    def export_shared(self, shared: Arrays, directory: Path) -> bool:
        """Write the server's model, its adapters added to their layers."""
        write_arrays(self._model, self._arrays, frozen=False)
        self._task.export(plain(self._model), directory)
        return True
