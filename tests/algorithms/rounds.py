"""One round of FedKD on one client, and of each of its models alone."""

from fedkd_flwr.algorithms.base import Algorithm, Assignment, Trained
from fedkd_flwr.algorithms.fedavg import FedAvgOptions
from fedkd_flwr.algorithms.fedkd import FedKDOptions
from fedkd_flwr.algorithms.local_only import LocalOnlyOptions
from fedkd_flwr.algorithms.loop import LocalTraining
from fedkd_flwr.core.arrays import Array, Arrays
from fedkd_flwr.core.protocols import ClientData, Task
from tests.algorithms.conftest import FIRST, LOCAL, SEED, under

TERMS = ("mutual", "hidden", "attention")


def fedkd(task: Task, *on: str, local: LocalTraining = LOCAL, **options: object) -> Algorithm:
    """FedKD with the terms that are named."""
    chosen = {**{term: term in on for term in TERMS}, "local": local, **options}
    return FedKDOptions.model_validate(chosen).build(task, SEED)


def train(
    algorithm: Algorithm, data: ClientData, private: Arrays | None = None, assignment: Assignment = FIRST
) -> Trained:
    kept = algorithm.client.initial_private(data) if private is None else private
    return algorithm.client.train(algorithm.shared.initial(), kept, data, assignment)


def upload(algorithm: Algorithm, data: ClientData) -> Arrays:
    sent = train(algorithm, data).upload
    assert sent is not None
    return sent


def teacher_of(trained: Trained) -> dict[str, Array]:
    return under("teacher/", trained.private)


def student_alone(task: Task, data: ClientData, local: LocalTraining = LOCAL, **options: object) -> Arrays:
    """What the student uploads without a teacher: FedAvg of it."""
    return upload(FedAvgOptions.model_validate({"model": "student", "local": local, **options}).build(task, SEED), data)


def teacher_alone(task: Task, data: ClientData, local: LocalTraining = LOCAL) -> dict[str, Array]:
    """What the teacher becomes in one round without a student."""
    trained = train(LocalOnlyOptions(model="teacher", local=local).build(task, SEED), data)
    return under("model/", trained.private)
