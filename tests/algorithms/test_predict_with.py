"""What a client predicts with: its teacher, the student, or both."""

from pathlib import Path

import pytest
from transformers import ViTForImageClassification

from fedkd_flwr.algorithms.base import Trained
from fedkd_flwr.core.modules import read_arrays
from fedkd_flwr.core.protocols import ClientData, Task
from tests.algorithms.conftest import (
    SEED,
    same,
)
from tests.algorithms.rounds import TERMS, fedkd, teacher_of, train


@pytest.fixture(scope="module")
def trained(task: Task, data: ClientData) -> Trained:
    return train(fedkd(task, *TERMS), data)


def exported(task: Task, data: ClientData, trained: Trained, directory: Path, **options: object) -> bool:
    algorithm = fedkd(task, *TERMS, **options)
    return algorithm.client.export_private(algorithm.shared.initial(), trained.private, data, directory)


def test_a_client_that_predicts_with_its_teacher_writes_it(
    task: Task, data: ClientData, trained: Trained, tmp_path: Path
) -> None:
    assert exported(task, data, trained, tmp_path / "model", predict_with="teacher") is True
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "model")
    assert same(read_arrays(loaded), teacher_of(trained))


def test_a_client_that_predicts_with_the_student_has_nothing_of_its_own_to_write(
    task: Task, data: ClientData, trained: Trained, tmp_path: Path
) -> None:
    assert exported(task, data, trained, tmp_path / "model", predict_with="student") is False
    assert not (tmp_path / "model").exists()


def test_by_default_a_client_predicts_with_both_models_and_writes_a_directory_for_each(
    task: Task, data: ClientData, trained: Trained, tmp_path: Path
) -> None:
    assert exported(task, data, trained, tmp_path) is True
    teacher, student = (ViTForImageClassification.from_pretrained(tmp_path / name) for name in ("teacher", "student"))
    assert same(read_arrays(teacher), teacher_of(trained))
    assert same(read_arrays(student), read_arrays(task.build_models(SEED).student))


@pytest.mark.parametrize("predict_with", ["student", "teacher", "ensemble"])
def test_all_three_are_scored_whatever_is_chosen(
    task: Task, data: ClientData, trained: Trained, predict_with: str
) -> None:
    algorithm = fedkd(task, *TERMS, predict_with=predict_with)
    scores = algorithm.client.evaluate(algorithm.shared.initial(), trained.private, data)
    assert list(scores) == ["shared", "private", "ensemble"]
