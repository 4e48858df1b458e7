from pathlib import Path
from typing import Literal

import pytest
from safetensors.numpy import load_file
from transformers import ViTForImageClassification

from fedkd_flwr.algorithms.local_only import LocalOnlyOptions
from fedkd_flwr.algorithms.loop import Optimizer, OptimizerOptions, train_supervised
from fedkd_flwr.compressors.identity import IdentityOptions
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.modules import read_arrays, write_arrays
from fedkd_flwr.core.protocols import ClientData, Task, score_of
from tests.algorithms.conftest import FIRST, LOCAL, SECOND, SEED, copied, same, under
from tests.algorithms.little import Little, Net

OPTIONS = LocalOnlyOptions(model="teacher", local=LOCAL, optimizer=OptimizerOptions(learning_rate=0.01))


def test_nothing_is_exchanged(task: Task, data: ClientData) -> None:
    algorithm = OPTIONS.build(task, SEED)
    assert algorithm.exchanges == "nothing"
    assert algorithm.shared.initial() == {}
    assert algorithm.shared.wires(lambda spec, direction: IdentityOptions().build(spec)) is None
    assert algorithm.client.train({}, algorithm.client.initial_private(data), data, FIRST).upload is None


def test_the_server_has_nothing_to_send_to_score_or_to_write(task: Task, tmp_path: Path) -> None:
    server = OPTIONS.build(task, SEED).server
    assert server.broadcast({}, {}, FIRST) == {}
    assert server.evaluate({}, task.test_data()) is None
    assert server.export_shared({}, tmp_path / "shared") is False
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_client_begins_with_the_chosen_models_version_0(
    task: Task, data: ClientData, which: Literal["teacher", "student"]
) -> None:
    private = LocalOnlyOptions(model=which).build(task, SEED).client.initial_private(data)
    assert same(under("model/", private), read_arrays(getattr(task.build_models(SEED), which)))


def test_two_rounds_are_one_uninterrupted_training_bit_for_bit(
    task: Task, data: ClientData, other_data: ClientData
) -> None:
    client = OPTIONS.build(task, SEED).client
    private = client.train({}, client.initial_private(data), data, FIRST).private
    # Another client of the same process trains in between, and must leave no trace.
    client.train({}, client.initial_private(other_data), other_data, SECOND)
    private = client.train({}, private, data, SECOND).private

    module = task.build_models(SEED).teacher
    optimizer = Optimizer(OPTIONS.optimizer, module.named_parameters())
    for assignment in (FIRST, SECOND):
        train_supervised(task, module, optimizer, data.train, LOCAL, assignment)
    assert same(under("model/", private), read_arrays(module))


def test_training_leaves_the_private_arrays_it_was_given_alone(task: Task, data: ClientData) -> None:
    client = OPTIONS.build(task, SEED).client
    private = client.train({}, client.initial_private(data), data, FIRST).private
    kept = copied(private)
    later = client.train({}, private, data, SECOND).private
    assert same(private, kept)
    assert not same(later, kept)


def test_evaluation_scores_the_private_model_that_it_is_given(task: Task, data: ClientData) -> None:
    client = OPTIONS.build(task, SEED).client
    version_0 = client.initial_private(data)
    trained = client.train({}, version_0, data, FIRST).private
    module = task.build_models(SEED).teacher
    expected = []
    for private in (version_0, trained):
        write_arrays(module, private, "model/")
        expected.append({"private": score_of(task, module, data.test)})
    assert expected[0] != expected[1]
    assert [client.evaluate({}, private, data) for private in (version_0, trained)] == expected


def test_the_private_model_is_exported(task: Task, data: ClientData, tmp_path: Path) -> None:
    client = OPTIONS.build(task, SEED).client
    assert client.export_private({}, client.initial_private(data), data, tmp_path / "private") is True
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "private")
    assert same(read_arrays(loaded), under("model/", client.initial_private(data)))


def test_moments_are_kept_unless_they_are_to_be_forgotten() -> None:
    little = Little()
    data = little.client_data(0)

    def two_rounds(keep: bool, forget: bool = False) -> Arrays:
        client = LocalOnlyOptions(keep_moments=keep).build(little, SEED).client
        private = client.train({}, client.initial_private(data), data, FIRST).private
        start = {n: v for n, v in private.items() if not (forget and n.startswith("optimizer/"))}
        assert keep == any(name.startswith("optimizer/") for name in private)
        return under("model/", client.train({}, start, data, SECOND).private)

    assert not same(two_rounds(keep=True), two_rounds(keep=False))
    assert same(two_rounds(keep=True, forget=True), two_rounds(keep=False))


def test_each_client_trains_the_teacher_that_it_has() -> None:
    little = Little(teachers=(Net(width=4), Net(width=6, num_layers=3)))
    client = LocalOnlyOptions().build(little, SEED).client
    models = little.build_models(SEED)
    privates = []
    for index, teacher in enumerate((models.teacher, *models.other_teachers)):
        data = little.client_data(index)
        private = client.initial_private(data)
        assert same(under("model/", private), read_arrays(teacher))
        privates.append(client.train({}, private, data, FIRST).private)
    for index, private in enumerate(privates):
        data = little.client_data(index)
        module = (models.teacher, *models.other_teachers)[index]
        write_arrays(module, private, "model/")
        assert client.evaluate({}, private, data) == {"private": score_of(little, module, data.test)}
        later = client.train({}, private, data, SECOND).private
        assert later.keys() == private.keys()
        with pytest.raises(ValueError, match="needs shape"):
            client.evaluate({}, private, little.client_data(1 - index))


def test_all_clients_train_the_student_where_that_is_chosen() -> None:
    little = Little(teachers=(Net(), Net(width=6)))
    client = LocalOnlyOptions(model="student").build(little, SEED).client
    first, second = (client.initial_private(little.client_data(index)) for index in (0, 1))
    assert same(first, second)
    assert same(under("model/", first), read_arrays(little.build_models(SEED).student))


def test_what_is_frozen_is_not_kept_by_a_client_and_still_there(tmp_path: Path) -> None:
    little = Little(teachers=(Net(frozen=True),))
    data = little.client_data(0)
    client = LocalOnlyOptions().build(little, SEED).client
    private = client.train({}, client.initial_private(data), data, FIRST).private
    whole = read_arrays(little.build_models(SEED).teacher)
    assert "embedding.weight" in whole
    assert under("model/", private).keys() == whole.keys() - {"embedding.weight"}
    # Another process builds version 0 anew and knows the client by what it kept.
    elsewhere = LocalOnlyOptions().build(little, SEED).client
    assert elsewhere.evaluate({}, private, data) == client.evaluate({}, private, data)
    elsewhere.export_private({}, private, data, tmp_path)
    exported = load_file(tmp_path / "model.safetensors")
    assert same(exported, whole | under("model/", private))
