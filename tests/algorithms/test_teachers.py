"""FedKD whose clients have different teachers, or teachers of which a part is frozen."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedkd_flwr.algorithms.base import Algorithm
from fedkd_flwr.algorithms.fedkd import FedKDOptions
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.modules import exchanged_spec, read_arrays
from fedkd_flwr.core.protocols import ClientData
from tests.algorithms.conftest import FIRST, SECOND, SEED, copied, same, under
from tests.algorithms.little import Little, Net

# Deeper, wider, and one that shows nothing of its inside.
TEACHERS = (Net(num_layers=2), Net(num_layers=4, width=6, num_heads=3), Net(width=5, hidden=False, attention=False))
STUDENT = Net(num_layers=2)


@pytest.fixture
def little() -> Little:
    return Little(teachers=TEACHERS, student=STUDENT)


@pytest.fixture
def algorithm(little: Little) -> Algorithm:
    return FedKDOptions().build(little, SEED)


def one_round(algorithm: Algorithm, data: ClientData, private: Arrays | None = None) -> tuple[Arrays, Arrays]:
    kept = algorithm.client.initial_private(data) if private is None else private
    trained = algorithm.client.train(algorithm.shared.initial(), kept, data, FIRST if private is None else SECOND)
    assert trained.upload is not None
    return trained.upload, trained.private


@pytest.mark.parametrize("index", range(len(TEACHERS)))
def test_a_client_begins_with_its_own_teacher(algorithm: Algorithm, little: Little, index: int) -> None:
    models = little.build_models(SEED)
    private = algorithm.client.initial_private(little.client_data(index))
    assert same(under("teacher/", private), read_arrays((models.teacher, *models.other_teachers)[index]))


def test_w_h_goes_from_the_students_width_to_each_teachers(algorithm: Algorithm, little: Little) -> None:
    shapes = [
        [value.shape for value in under("projections/", algorithm.client.initial_private(data)).values()]
        for data in map(little.client_data, range(3))
    ]
    assert shapes == [[(4, 4)] * 2, [(6, 4)] * 2, []]


def test_the_first_teachers_state_is_that_of_a_task_without_others(algorithm: Algorithm, little: Little) -> None:
    wide = (Net(num_layers=2, width=6), Net(num_layers=2, width=6))
    alone, both = (FedKDOptions().build(Little(teachers=t, student=STUDENT), SEED) for t in (wide[:1], wide))
    first = both.client.initial_private(little.client_data(0))
    second = both.client.initial_private(little.client_data(1))
    only = alone.client.initial_private(little.client_data(0))
    assert same(under("projections/", first), under("projections/", only))
    assert not same(under("projections/", first), under("projections/", second))


def test_every_client_uploads_the_same_tensors_and_keeps_its_own(algorithm: Algorithm, little: Little) -> None:
    spec = {t.name: t.shape for t in exchanged_spec(little.build_models(SEED).student)}
    for index in range(len(TEACHERS)):
        upload, private = one_round(algorithm, little.client_data(index))
        assert {name: value.shape for name, value in upload.items()} == spec
        before = algorithm.client.initial_private(little.client_data(index))
        assert not same(under("teacher/", private), under("teacher/", before))


def test_clients_of_one_process_do_not_disturb_each_other(algorithm: Algorithm, little: Little) -> None:
    """Two rounds in turns, against two rounds alone in a process of its own."""
    everyone = [little.client_data(index) for index in range(len(TEACHERS))]
    first = [one_round(algorithm, data)[1] for data in everyone]
    in_turns = [one_round(algorithm, data, copied(private)) for data, private in zip(everyone, first, strict=True)]
    for data, (upload, private) in zip(everyone, in_turns, strict=True):
        alone = FedKDOptions().build(little, SEED)
        expected = one_round(alone, data, one_round(alone, data)[1])
        assert same(upload, expected[0])
        assert same(private, expected[1])


def test_evaluation_and_export_are_of_the_clients_own_teacher(
    algorithm: Algorithm, little: Little, tmp_path: Path
) -> None:
    for index in range(len(TEACHERS)):
        data = little.client_data(index)
        _, private = one_round(algorithm, data)
        scores = algorithm.client.evaluate(algorithm.shared.initial(), private, data)
        assert scores.keys() == {"shared", "private", "ensemble"}
        assert algorithm.client.export_private(algorithm.shared.initial(), private, data, tmp_path / str(index)) is True
        assert same(load_file(tmp_path / str(index) / "teacher" / "model.safetensors"), under("teacher/", private))


def test_the_state_of_another_teacher_is_refused(algorithm: Algorithm, little: Little) -> None:
    private = algorithm.client.initial_private(little.client_data(1))
    with pytest.raises(ValueError, match="needs shape"):
        algorithm.client.train(algorithm.shared.initial(), private, little.client_data(0), FIRST)


def test_a_line_says_which_teacher_can_not_guide(little: Little, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fedkd"):
        FedKDOptions().build(little, SEED)
    assert [record.getMessage() for record in caplog.records] == [
        "algorithm.hidden is off: the teacher returns no hidden states (teacher 2)",
        "algorithm.attention is off: the teacher returns no attention maps (teacher 2)",
    ]


def test_asked_for_strictly_every_teacher_must_guide(little: Little) -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.hidden: the teacher returns no hidden states \(teacher 2\); "):
        FedKDOptions(hidden=True).build(little, SEED)


def test_with_automatic_terms_a_pair_learns_as_with_those_terms_named(little: Little) -> None:
    data = little.client_data(1)
    automatic = one_round(FedKDOptions().build(little, SEED), data)[0]
    two = Little(teachers=TEACHERS[:2], student=STUDENT)
    named = one_round(FedKDOptions(hidden=True, attention=True).build(two, SEED), data)[0]
    assert same(automatic, named)
    blind = little.client_data(2)
    off = one_round(FedKDOptions(hidden=False, attention=False).build(little, SEED), blind)[0]
    assert same(one_round(FedKDOptions().build(little, SEED), blind)[0], off)


# What is frozen


def test_frozen_tensors_are_not_kept_by_a_client_and_still_there(tmp_path: Path) -> None:
    little = Little(teachers=(Net(frozen=True), Net(width=6, frozen=True)), student=Net(frozen=True))
    algorithm = FedKDOptions().build(little, SEED)
    models = little.build_models(SEED)
    for index, teacher in enumerate((models.teacher, *models.other_teachers)):
        data, whole = little.client_data(index), read_arrays(teacher)
        _, private = one_round(algorithm, data)
        assert under("teacher/", private).keys() == whole.keys() - {"embedding.weight"}
        assert "norm.running_mean" in under("teacher/", private)
        assert not any("embedding" in name for name in private)
        elsewhere = FedKDOptions().build(little, SEED)
        shared = algorithm.shared.initial()
        assert elsewhere.client.evaluate(shared, private, data) == algorithm.client.evaluate(shared, private, data)
        elsewhere.client.export_private(elsewhere.shared.initial(), private, data, tmp_path / str(index))
        exported = load_file(tmp_path / str(index) / "teacher" / "model.safetensors")
        assert same(exported, whole | under("teacher/", private))
    assert "embedding.weight" in algorithm.shared.initial()  # whoever joins must be able to build the student from it


def test_a_private_state_without_a_trainable_tensor_is_refused() -> None:
    little = Little(teachers=(Net(frozen=True),))
    algorithm, data = FedKDOptions().build(little, SEED), little.client_data(0)
    private = dict(algorithm.client.initial_private(data))
    del private["teacher/classifier.weight"]
    with pytest.raises(ValueError, match=r"tensor 'classifier\.weight' needs shape \(3, 4\), got nothing"):
        algorithm.client.train(algorithm.shared.initial(), private, data, FIRST)


# Moments


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("teacher", [False, True])
def test_moments_are_kept_of_whom_it_is_asked_for(student: bool, teacher: bool) -> None:
    little = Little()
    data = little.client_data(0)
    options = FedKDOptions(keep_student_moments=student, keep_teacher_moments=teacher)
    _, private = one_round(options.build(little, SEED), data)
    kept = {name.split("/")[0] for name in private if "_optimizer/" in name}
    of_teacher = {"teacher_optimizer", "projections_optimizer"} if teacher else set()
    assert kept == of_teacher | ({"student_optimizer"} if student else set())
    assert {float(v) for n, v in private.items() if n.endswith("/step")} == ({2.0} if kept else set())


def test_kept_moments_of_the_student_are_used_in_its_next_round() -> None:
    little = Little()
    data = little.client_data(0)
    algorithm = FedKDOptions(keep_student_moments=True).build(little, SEED)
    _, private = one_round(algorithm, data)
    forgotten = {name: value for name, value in private.items() if not name.startswith("student_optimizer/")}
    lasting, afresh = (one_round(algorithm, data, start)[0] for start in (private, forgotten))
    assert not same(lasting, afresh)


# What a client trains with


def test_accumulated_batches_move_both_models_as_one_step() -> None:
    little = Little()
    data = little.client_data(0)
    local = {"num_epochs": 1, "batch_size": 4, "accumulate": 3}
    _, private = one_round(FedKDOptions.model_validate({"local": local}).build(little, SEED), data)
    assert {float(value) for name, value in private.items() if name.endswith("/step")} == {1.0}


def test_bfloat16_trains_both_models_and_keeps_float32() -> None:
    little = Little()
    data = little.client_data(0)
    algorithm = FedKDOptions.model_validate({"local": {"precision": "bfloat16"}}).build(little, SEED)
    upload, private = one_round(algorithm, data)
    exact, _ = one_round(FedKDOptions().build(little, SEED), data)
    arrays = [*upload.values(), *under("teacher/", private).values(), *under("teacher_optimizer/", private).values()]
    assert {value.dtype for value in arrays} == {np.dtype(np.float32), np.dtype(np.int64)}  # batches are counted
    assert all(np.isfinite(value).all() for value in arrays)
    assert not same(upload, exact)


def test_class_weights_reach_teacher_and_student() -> None:
    plain, weighted = (
        one_round(FedKDOptions(mutual=False, hidden=False, attention=False).build(little, SEED), little.client_data(0))
        for little in (Little(), Little(class_weights=torch.tensor([9.0, 1.0, 1.0])))
    )
    assert not same(plain[0], weighted[0])
    assert not same(under("teacher/", plain[1]), under("teacher/", weighted[1]))
