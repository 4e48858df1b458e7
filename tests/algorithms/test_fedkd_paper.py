"""The paper's equations, taken literally, against one step of gradient descent worked out here."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedkd_flwr.algorithms.fedkd import FedKDOptions
from fedkd_flwr.algorithms.fedkd_paper import FedKDPaperOptions
from fedkd_flwr.algorithms.loop import LocalTraining, OptimizerOptions
from fedkd_flwr.core.protocols import ClientData, Task
from tests.algorithms.conftest import ONE_STEP, SEED, SGD, under
from tests.algorithms.rounds import train

FAST = {name: OptimizerOptions(learning_rate=0.01) for name in ("student_optimizer", "teacher_optimizer")}
PAPER = FedKDPaperOptions(local=ONE_STEP, student_optimizer=SGD, teacher_optimizer=SGD)


def kl(target: Tensor, learner: Tensor) -> Tensor:
    """KL(a, b) = -sum_j a_j log(b_j / a_j) of the paper, mean over the batch; the target is a constant."""
    a, b = target.detach(), learner
    return -(a * (b / a).log()).sum(dim=-1).mean()


def own_losses(task: Task, teacher: nn.Module, student: nn.Module, data: ClientData) -> tuple[Tensor, Tensor]:
    """L_t and L_s of the first batch, W_h being the identity. The last layers are mapped."""
    batch = next(iter(data.train.batches(128)))
    of_teacher, of_student = (
        task.forward(model.train(), batch, hidden_states=True, attentions=True) for model in (teacher, student)
    )
    y_t, y_s = of_teacher.logits.softmax(dim=-1), of_student.logits.softmax(dim=-1)
    gold = torch.nn.functional.one_hot(batch["labels"], 10)
    task_t, task_s = (-(gold * y.log()).sum(dim=-1).mean() for y in (y_t, y_s))
    divisor = (task_t + task_s).detach()
    pairs = [
        (of_teacher.hidden_states[-1], of_student.hidden_states[-1]),
        (of_teacher.attentions[-1], of_student.attentions[-1]),
    ]
    l_t = task_t + (kl(y_s, y_t) + sum(((t - s.detach()) ** 2).mean() for t, s in pairs)) / divisor
    l_s = task_s + (kl(y_t, y_s) + sum(((t.detach() - s) ** 2).mean() for t, s in pairs)) / divisor
    return l_t, l_s


def test_one_step_descends_both_equations(task: Task, data: ClientData) -> None:
    algorithm = PAPER.build(task, SEED)
    trained = train(algorithm, data)
    models = task.build_models(SEED)
    l_t, l_s = own_losses(task, models.teacher, models.student, data)
    moved = under("teacher/", trained.private)
    before = under("teacher/", algorithm.client.initial_private(data))
    assert trained.upload is not None
    for model, loss, step in (
        (models.teacher, l_t, {name: moved[name] - before[name] for name in moved}),
        (models.student, l_s, trained.upload),
    ):
        names, parameters = zip(*model.named_parameters(), strict=True)
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(
                torch.as_tensor(step[name]), -SGD.learning_rate * gradient, rtol=1e-3, atol=2e-7, msg=name
            )


def test_no_default_of_fedkd_can_change_it() -> None:
    assert PAPER.spelt_out().model_fields_set == set(FedKDOptions.model_fields) - {"name"}


def test_the_divisor_has_no_floor(task: Task, data: ClientData) -> None:
    certain = FedKDPaperOptions(local=LocalTraining(num_epochs=40, batch_size=32), **FAST).build(task, SEED)
    # Losses of a thousandth are out of reach in a test; far below FedKD's floor they are not.
    least = train(certain, data).metrics["min_divisor"]
    assert least < FedKDOptions().divisor_floor / 2
    assert PAPER.spelt_out().divisor_floor <= 1e-8


@pytest.mark.parametrize("option", ["divisor_floor", "temperature", "trust", "logit_adjustment", "mutual"])
def test_nothing_beyond_the_paper_can_be_set(option: str) -> None:
    with pytest.raises(ValidationError, match=option):
        FedKDPaperOptions.model_validate({option: 1})
