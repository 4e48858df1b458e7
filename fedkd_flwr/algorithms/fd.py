"""Federated distillation: clients exchange what their models say of each label, and no model.

Jeong et al., 2018, https://arxiv.org/abs/1811.11479, algorithm 1. Every client trains a model of its own on

    phi(F(x), y) + gamma * phi(F(x), G[y])

where phi is the cross-entropy, F the softmax output and G[y] the mean output of the *other* clients for label y, after
the last round. Outputs are summed while training goes on, over all steps. The mean of the others follows from the mean
of all and from what the client itself had sent, so one broadcast serves everybody.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd_flwr.algorithms.base import Algorithm, Assignment, MakeCodec, Trained, Wires, num_classes_of, num_parameters
from fedkd_flwr.algorithms.label_outputs import (
    ROUND,
    LabelOutputs,
    LabelOutputsCodec,
    LabelOutputsMean,
    Precision,
    Weighting,
    without,
)
from fedkd_flwr.algorithms.loop import forward, run_epochs
from fedkd_flwr.algorithms.own_models import NoModelServer, OwnModelClient, OwnModelOptions
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.losses import soft_cross_entropy, task_loss
from fedkd_flwr.core.modules import prefixed, without_prefix
from fedkd_flwr.core.protocols import Batch, ClientData, Models, Task

_SENT, _COUNTED = "sent/", "counted/"


class FdOptions(OwnModelOptions):
    """Options of federated distillation, beside those of a model of one's own.

    Attributes:
        gamma: weight of what the others say; the paper does not print its own.
        weighting: how clients count in the mean of a label: all alike, as in the paper, or by their examples of it.
        precision: of a probability on the wire; what comes back is float32 where clients count by their examples: one
            that has nearly all of a label finds the others in the last digits of the mean.
    """

    weighs_by_examples: ClassVar[bool] = False
    name: Literal["fd"] = "fd"
    gamma: float = Field(0.1, ge=0)
    weighting: Weighting = "uniform"
    precision: Precision = "float16"

    def build(self, task: Task, seed: int) -> Algorithm:
        """Federated distillation between the clients' models, which may differ.

        Raises:
            ValueError: if labels are no classes, or no client has one of them.
        """
        models = task.build_models(seed)
        modules = (models.teacher, *models.other_teachers) if self.model == "teacher" else (models.student,)
        num_labels = num_labels_of(task, modules)
        shared = SharedOutputs(num_labels, self.precision, "float32" if self.weighting == "counts" else self.precision)
        client = FdClient(task, models, self, num_labels)
        return Algorithm(
            "outputs",
            shared,
            client,
            FdServer(),
            *num_parameters(models),
            make_aggregator=lambda: LabelOutputsMean(self.weighting, self.local.num_epochs),
            leaves="for each label the mean output of its model",
            stays="the model",
        )


def num_labels_of(task: Task, models: Sequence[nn.Module]) -> int:
    """Number of classes.

    Args:
        task: what is learned.
        models: that learn it.

    Raises:
        ValueError: if labels are no classes that are counted, a model says something else of an example than how likely
            each class is, or it is known that no client has one of them.
    """
    report = task.data_report()
    if not task.counts_labels or len(report.label_names) < 2 or num_classes_of(task, models) != len(report.label_names):
        raise ValueError("algorithm: outputs for each label need a task whose labels are classes that are counted")
    held = np.sum(report.label_counts, axis=0)
    if report.of_all and not held.all():
        name = report.label_names[int(np.argmin(held))]
        raise ValueError(
            f"task.partition: each label must be held by a client, got none with {name!r}, so that nobody could say "
            "anything of it; leave it out of the data, or divide otherwise"
        )
    return len(report.label_names)


class SharedOutputs:
    """What all know of what models say: version 0 is that nobody has said anything."""

    def __init__(self, num_labels: int, up: Precision, down: Precision) -> None:
        self._up = LabelOutputsCodec(num_labels, up, with_round=False)
        self._down = LabelOutputsCodec(num_labels, down, with_round=True)

    def initial(self) -> Arrays:
        """No label weighs anything."""
        return {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in self._down.spec}

    def wires(self, make_codec: MakeCodec) -> Wires | None:
        """Codecs of outputs; the user's is for updates of models, of which there are none."""
        return Wires(self._up, self._down)

    def apply(self, shared: Arrays, broadcast: Arrays) -> Arrays:
        """What was said last replaces what was said before."""
        return broadcast

    def as_sent(self, upload: Arrays) -> Arrays:
        """What the server will read of an upload."""
        return self._up.as_decoded(upload)


class FdServer(NoModelServer):
    """Server half: the mean of this round's outputs, with the number of the round."""

    def broadcast(self, aggregate: Arrays, shared: Arrays, assignment: Assignment) -> Arrays:
        """The aggregate, with the round."""
        return {**aggregate, ROUND: np.array([assignment.server_round], np.float32)}


class FdClient(OwnModelClient):
    """Client half: trains towards labels and towards what the others say, and sums up what its own model says."""

    def __init__(self, task: Task, models: Models, options: FdOptions, num_labels: int) -> None:
        super().__init__(task, models, options)
        self._fd = options
        self._num_labels = num_labels
        self._up = LabelOutputsCodec(num_labels, options.precision, with_round=False)

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """One round; the upload is the mean output for each label."""
        module = self._own.load(private, data)
        optimizer = self._own.optimizer(module, private)
        rows, others = self._targets(shared, private, assignment)
        said = LabelOutputs(self._num_labels)

        def loss_of(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
            out = forward(self._task, module, batch, self._fd.local)
            said.add(out.logits, out.labels)
            own = task_loss(out)
            labels = out.labels.to(rows.device)
            towards = soft_cross_entropy(out.logits, rows[labels].to(out.logits), others[labels].to(out.logits))
            measured = {"train_loss": own.detach(), "distillation_loss": towards.detach()}
            return own + self._fd.gamma * towards, measured

        self._fd.local.prepare(module)
        measures = run_epochs(data.train, self._fd.local, assignment, [optimizer], loss_of)
        upload = said.means(self._fd.weighting)
        sent = {**self._up.as_decoded(upload), ROUND: np.array([assignment.server_round], np.float32)}
        counted = self._counted(private, assignment) or {}
        kept = {**self._own.kept(module, optimizer), **prefixed(_SENT, sent), **prefixed(_COUNTED, counted)}
        return Trained(upload, kept, {name: float(np.mean(values)) for name, values in measures.items()})

    def _targets(self, shared: Arrays, private: Arrays, assignment: Assignment) -> tuple[Tensor, Tensor]:
        """What the others say of each label, [L, L], and of which labels they say anything, [L]."""
        own = self._counted(private, assignment)
        # It is in the mean only if it was sent in the round that made the mean, and arrived.
        among_them = own is not None and own[ROUND][0] == shared[ROUND][0]
        rows, others = without(shared, own if among_them else None)
        return torch.from_numpy(rows), torch.from_numpy(others)

    def _counted(self, private: Arrays, assignment: Assignment) -> Arrays | None:
        """What this client sent last of what counted; a round that was skipped, or a reply that was lost, did not."""
        remembered = (without_prefix(prefix, private) for prefix in (_SENT, _COUNTED))
        return next((sent for sent in remembered if sent and sent[ROUND][0] == assignment.counted_round), None)
