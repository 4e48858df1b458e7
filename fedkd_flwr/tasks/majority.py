"""What a task's score gives to whoever always answers the same: what a model must beat to have learned anything."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from fedkd_flwr.core.protocols import Batch, HasCommonAnswer, Outputs, Task
from fedkd_flwr.tasks.scores import predict

CERTAIN = 50.0  # a logit beside zeros: the softmax is 1 to the last bit


@dataclass(frozen=True, slots=True)
class MajorityScores:
    """What always giving the most common answer comes to.

    Attributes:
        label: the answer.
        share: of it among the training labels, in (0, 1]; None where it is no class that examples have.
        num_classes: that there are, at least 2.
        scores: by the task's own rule, on the server's test set. Without a loss: it gives no probabilities.
    """

    label: str
    share: float | None
    num_classes: int
    scores: Mapping[str, float]


class _Answerer:
    """Stands for the task where a model is run: every example gets the same logits."""

    def __init__(self, label: int, num_classes: int) -> None:
        self._logits = torch.zeros(num_classes)
        self._logits[label] = CERTAIN

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        """The same logits for each label of a batch."""
        labels = batch["labels"]
        return Outputs(self._logits.expand(*labels.shape, -1), labels)


def majority_of(task: Task) -> MajorityScores | None:
    """The scores of the most common answer on the task's test data; None where there is none.

    There is none where labels are no classes (rankings, actions), or the training data is not where this runs.
    """
    answer = task.common_answer() if isinstance(task, HasCommonAnswer) else None
    if answer is None:
        return None
    examples = task.test_data()
    answerer = cast(Task, _Answerer(answer.label, answer.num_classes))
    scores = task.score(predict(answerer, nn.Identity(), examples), examples)
    scores.pop("loss", None)
    return MajorityScores(answer.name, answer.share, answer.num_classes, scores)
