"""What FedKD can do beyond the paper: one option each, off until it is asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedkd_flwr.algorithms.base import Algorithm, AlgorithmOptions, Assignment, Trained
from fedkd_flwr.algorithms.fedavg import FedAvgOptions
from fedkd_flwr.algorithms.fedkd import FedKDOptions
from fedkd_flwr.algorithms.fedprox import FedProxOptions
from fedkd_flwr.algorithms.loop import OptimizerOptions
from fedkd_flwr.core.arrays import Array
from fedkd_flwr.core.protocols import ClientData, Task
from tests.algorithms.conftest import (
    FIRST,
    ONE_STEP,
    SEED,
    SGD,
    norm,
    same,
    under,
)
from tests.algorithms.little import Little
from tests.algorithms.rounds import TERMS, fedkd, student_alone, teacher_of, train, upload


def skewed(data: ClientData, counts: tuple[int, ...]) -> ClientData:
    """The same examples, as if they had other labels."""
    return replace(data, label_counts=counts)


def test_a_client_counts_the_labels_it_learns_from(task: Task, data: ClientData) -> None:
    labels = torch.cat([batch["labels"] for batch in data.train.batches(64)])
    assert data.label_counts == tuple(int((labels == digit).sum()) for digit in range(10))


def test_logit_adjustment_is_training_on_logits_plus_the_logarithm_of_the_shares(task: Task, data: ClientData) -> None:
    """One step of SGD on one batch: the bias moves by the rate times the labels' shares less the mean probabilities."""
    counts = (60, 30, 10, 5, 0, 0, 0, 0, 5, 5)
    sent = upload(fedkd(task, local=ONE_STEP, student_optimizer=SGD, logit_adjustment=2.0), skewed(data, counts))
    student = task.build_models(SEED).student.train()
    batch = next(iter(data.train.batches(128)))
    logits = task.forward(student, batch, hidden_states=False, attentions=False).logits.detach()
    shares = (torch.tensor(counts) + 1) / (sum(counts) + 10)
    probabilities = (logits + 2.0 * shares.log()).softmax(dim=-1).mean(dim=0)
    labels = torch.nn.functional.one_hot(batch["labels"], 10).double().mean(dim=0)
    moved = SGD.learning_rate * (labels - probabilities)
    np.testing.assert_allclose(sent["classifier.bias"], moved.numpy(), atol=2e-7)


def test_equal_shares_adjust_nothing(task: Task, data: ClientData) -> None:
    even = skewed(data, (7,) * 10)
    plain, adjusted = (
        upload(fedkd(task, "mutual", student_optimizer=SGD, logit_adjustment=tau), even) for tau in (0.0, 1.0)
    )
    assert norm({name: plain[name] - adjusted[name] for name in plain}) < 1e-3 * norm(plain)


def test_fedavg_of_the_student_is_adjusted_alike(task: Task, data: ClientData) -> None:
    counts = skewed(data, (60, 30, 10, 5, 0, 0, 0, 0, 5, 5))
    assert same(upload(fedkd(task, logit_adjustment=1.0), counts), student_alone(task, counts, logit_adjustment=1.0))
    assert not same(upload(fedkd(task), counts), student_alone(task, counts, logit_adjustment=1.0))


@pytest.mark.parametrize("options", [FedKDOptions, FedAvgOptions, FedProxOptions])
def test_labels_that_are_not_counted_can_not_be_adjusted(options: type[AlgorithmOptions]) -> None:
    """Found where the algorithm is built, so before anyone trains."""
    with pytest.raises(ValueError, match=r"algorithm\.logit_adjustment must be 0 for a task .* got 0\.5"):
        options.model_validate({"logit_adjustment": 0.5}).build(Little(), SEED)
    options.model_validate({"logit_adjustment": 0.0}).build(Little(), SEED)


@pytest.mark.parametrize("trust", ["right", "probability", "better"])
def test_trust_changes_what_both_models_learn(task: Task, data: ClientData, trust: str) -> None:
    everywhere, trusted = (train(fedkd(task, "mutual", trust=chosen), data) for chosen in ("all", trust))
    assert everywhere.upload and trusted.upload
    assert not same(everywhere.upload, trusted.upload)
    assert not same(teacher_of(everywhere), teacher_of(trusted))


def test_guidance_grows_over_the_warm_up_while_the_teacher_learns_in_full(task: Task, data: ClientData) -> None:
    def guided(warmup: float, end: float) -> Trained:
        algorithm = fedkd(task, "mutual", guide_warmup=warmup, student_optimizer=SGD, local=ONE_STEP)
        return train(algorithm, data, assignment=Assignment(0.0, FIRST.seed, end=end))

    alone = student_alone(task, data, ONE_STEP, optimizer=SGD)

    def pull(trained: Trained) -> dict[str, Array]:
        assert trained.upload is not None
        return {name: trained.upload[name] - alone[name] for name in alone}

    full, half, late = guided(0.0, 0.1), guided(0.4, 0.2), guided(0.4, 0.9)
    assert same(teacher_of(full), teacher_of(half))
    assert norm(pull(half)) == pytest.approx(norm(pull(full)) / 2, rel=1e-3)
    assert full.upload and late.upload and same(full.upload, late.upload)


def test_the_student_pays_for_leaving_the_shared_model_and_the_teacher_does_not(task: Task, data: ClientData) -> None:
    free, bound = (train(fedkd(task, proximal_mu=mu, student_optimizer=SGD), data) for mu in (0.0, 5.0))
    assert free.upload and bound.upload
    assert norm(bound.upload) < 0.8 * norm(free.upload)
    assert same(teacher_of(free), teacher_of(bound))


@pytest.mark.parametrize(("side", "other"), [("student", "teacher"), ("teacher", "student")])
def test_guidance_counts_by_its_factor_on_one_side_only(task: Task, data: ClientData, side: str, other: str) -> None:
    def moved(**options: object) -> dict[str, dict[str, Array]]:
        algorithm = fedkd(task, *TERMS, local=ONE_STEP, student_optimizer=SGD, teacher_optimizer=SGD, **options)
        trained = train(algorithm, data)
        assert trained.upload is not None
        before = under("teacher/", algorithm.client.initial_private(data))
        after = teacher_of(trained)
        return {"student": dict(trained.upload), "teacher": {name: after[name] - before[name] for name in after}}

    # One step of SGD is linear in the loss, so the pull of the guidance grows with its factor.
    once, twice, thrice = (moved(**{f"{side}_guidance": factor}) for factor in (1.0, 2.0, 3.0))
    pull = {name: twice[side][name] - once[side][name] for name in once[side]}
    more = {name: thrice[side][name] - once[side][name] for name in once[side]}
    assert norm(pull) > 0
    assert norm(more) == pytest.approx(2 * norm(pull), rel=1e-3)
    assert same(once[other], thrice[other])


def shared_and_moved(algorithm: Algorithm) -> dict[str, Array]:
    """A shared student that is not of version 0."""
    return {name: value + np.float32(0.25) for name, value in algorithm.shared.initial().items()}


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_an_anchored_teacher_begins_a_round_part_of_the_way_to_the_student(
    task: Task, data: ClientData, share: float
) -> None:
    """Training that leaves everything where it is shows where it began."""
    still = OptimizerOptions(name="sgd", learning_rate=1e-30)
    algorithm = fedkd(task, teacher_anchor=share, student_optimizer=still, teacher_optimizer=still, local=ONE_STEP)
    shared, private = shared_and_moved(algorithm), algorithm.client.initial_private(data)
    before = under("teacher/", private)
    after = teacher_of(algorithm.client.train(shared, private, data, FIRST))
    common = [name for name in before if name in shared and shared[name].shape == before[name].shape]
    assert "classifier.weight" in common and len(common) < len(before)  # the teacher has a layer more
    for name, value in after.items():
        expected = (1 - share) * before[name] + share * shared[name] if name in common else before[name]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_without_an_anchor_the_teacher_stays_with_itself(task: Task, data: ClientData) -> None:
    algorithm = fedkd(task)
    private = algorithm.client.initial_private(data)
    moved = algorithm.client.train(shared_and_moved(algorithm), private, data, FIRST)
    assert same(teacher_of(moved), teacher_of(train(algorithm, data, private)))
