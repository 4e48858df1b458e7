"""What tasks make of a model's outputs: log-probabilities, example by example."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedkd_flwr.core.losses import NO_LABEL
from fedkd_flwr.core.predictions import Predictions, ensemble
from fedkd_flwr.core.protocols import Batch, Outputs, Task
from fedkd_flwr.tasks.scores import classification_scores, predict


class Batches:
    """Examples in two batches, whatever size is asked for."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self._batches = list(zip(logits.split(2), labels.split(2), strict=True))
        self._length = len(labels)

    def __len__(self) -> int:
        return self._length

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        for logits, labels in self._batches:
            yield {"logits": logits, "labels": labels}


def forward(model: nn.Module, batch: Batch, **_: bool) -> Outputs:
    assert not model.training
    return Outputs(batch["logits"], batch["labels"])


TASK = cast(Task, SimpleNamespace(forward=forward))


def predicted(logits: Tensor, labels: Tensor) -> Predictions:
    return predict(TASK, nn.Identity(), Batches(logits, labels))


def test_an_example_with_one_label_has_the_log_probability_of_each_class() -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([1, 0, 3])
    found = predicted(logits, labels)
    assert np.stack(list(found.log_probabilities)) == pytest.approx(logits.log_softmax(dim=-1).numpy())
    assert [int(label) for label in found.labels] == [1, 0, 3]


def test_positions_without_a_label_are_left_out() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 1], [2, 0, 0, 0], [0, 0, 0, 0]]), 3).float()
    labels = torch.full((3, 4), NO_LABEL)
    labels[0, 1], labels[0, 3], labels[1, 0] = 0, 1, 2
    found = predicted(logits, labels)
    assert [of_one.argmax(axis=-1).tolist() for of_one in found.log_probabilities] == [[1, 1], [2], []]
    assert [of_one.tolist() for of_one in found.labels] == [[0, 1], [2], []]


@pytest.mark.parametrize("shapes", [[(3,), (3,)], [(2, 3), (0, 3)], [(5,), (2,)]], ids=["one", "several", "ragged"])
def test_several_models_say_the_mean_of_their_probabilities(shapes: list[tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    probabilities = [[rng.dirichlet(np.ones(shape[-1]), size=shape[:-1]) for shape in shapes] for _ in range(3)]
    labels = [np.zeros(shape[:-1], dtype=int) for shape in shapes]
    together = ensemble(*(Predictions([np.log(of_one) for of_one in each], labels) for each in probabilities))
    for of_one, *expected in zip(together.log_probabilities, *probabilities, strict=True):
        assert np.exp(of_one) == pytest.approx(np.mean(expected, axis=0))
    assert together.labels is labels


def test_one_model_alone_is_an_ensemble_of_itself() -> None:
    of_one = predicted(torch.randn(3, 4), torch.tensor([1, 0, 3]))
    assert np.stack(list(ensemble(of_one).log_probabilities)) == pytest.approx(np.stack(list(of_one.log_probabilities)))


def test_models_of_different_examples_are_no_ensemble() -> None:
    few, many = predicted(torch.randn(2, 4), torch.zeros(2).long()), predicted(torch.randn(3, 4), torch.zeros(3).long())
    with pytest.raises(ValueError, match="zip"):
        ensemble(few, many)


def test_the_surer_model_decides_and_the_loss_is_of_the_mean() -> None:
    labels = [np.array(0)]
    sure, unsure = np.array([0.9, 0.1]), np.array([0.4, 0.6])
    scores = classification_scores(ensemble(Predictions([np.log(sure)], labels), Predictions([np.log(unsure)], labels)))
    assert scores["accuracy"] == 1.0
    assert scores["loss"] == pytest.approx(-np.log(0.65))


def test_the_loss_of_predictions_is_the_mean_cross_entropy() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    expected = nn.functional.cross_entropy(logits, labels)
    assert classification_scores(predicted(logits, labels))["loss"] == pytest.approx(float(expected), rel=1e-5)
