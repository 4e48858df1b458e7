from pathlib import Path
from typing import Literal

import pytest
from transformers import ViTForImageClassification

from fedkd_flwr.algorithms.local_only import LocalOnlyOptions
from fedkd_flwr.algorithms.loop import Optimizer, OptimizerOptions, train_supervised
from fedkd_flwr.compressors.identity import IdentityOptions
from fedkd_flwr.core.modules import read_arrays, write_arrays
from fedkd_flwr.core.protocols import ClientData, Task
from tests.algorithms.conftest import FIRST, LOCAL, SECOND, SEED, copied, same, under

OPTIONS = LocalOnlyOptions(model="teacher", local=LOCAL, optimizer=OptimizerOptions(learning_rate=0.01))


def test_nothing_is_exchanged(task: Task, data: ClientData) -> None:
    algorithm = OPTIONS.build(task, SEED)
    assert algorithm.exchanges == "nothing"
    assert algorithm.shared.initial() == {}
    assert algorithm.shared.wires(lambda spec, direction: IdentityOptions().build(spec)) is None
    assert algorithm.client.train({}, algorithm.client.initial_private(), data, FIRST).upload is None


def test_the_server_has_nothing_to_send_to_score_or_to_write(task: Task, tmp_path: Path) -> None:
    server = OPTIONS.build(task, SEED).server
    assert server.broadcast({}, {}, FIRST) == {}
    assert server.evaluate({}, task.test_data()) is None
    assert server.export_shared({}, tmp_path / "shared") is False
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_client_begins_with_the_chosen_models_version_0(task: Task, which: Literal["teacher", "student"]) -> None:
    private = LocalOnlyOptions(model=which).build(task, SEED).client.initial_private()
    assert same(under("model/", private), read_arrays(getattr(task.build_models(SEED), which)))


def test_two_rounds_are_one_uninterrupted_training_bit_for_bit(
    task: Task, data: ClientData, other_data: ClientData
) -> None:
    client = OPTIONS.build(task, SEED).client
    private = client.train({}, client.initial_private(), data, FIRST).private
    # Another client of the same process trains in between, and must leave no trace.
    client.train({}, client.initial_private(), other_data, SECOND)
    private = client.train({}, private, data, SECOND).private

    module = task.build_models(SEED).teacher
    optimizer = Optimizer(OPTIONS.optimizer, module.named_parameters())
    for assignment in (FIRST, SECOND):
        train_supervised(task, module, optimizer, data.train, LOCAL, assignment.seed)
    assert same(under("model/", private), read_arrays(module))


def test_training_leaves_the_private_arrays_it_was_given_alone(task: Task, data: ClientData) -> None:
    client = OPTIONS.build(task, SEED).client
    private = client.train({}, client.initial_private(), data, FIRST).private
    kept = copied(private)
    later = client.train({}, private, data, SECOND).private
    assert same(private, kept)
    assert not same(later, kept)


def test_evaluation_scores_the_private_model_that_it_is_given(task: Task, data: ClientData) -> None:
    client = OPTIONS.build(task, SEED).client
    version_0 = client.initial_private()
    trained = client.train({}, version_0, data, FIRST).private
    module = task.build_models(SEED).teacher
    expected = []
    for private in (version_0, trained):
        write_arrays(module, private, "model/")
        expected.append({"private": task.score(module, data.test)})
    assert expected[0] != expected[1]
    assert [client.evaluate({}, private, data) for private in (version_0, trained)] == expected


def test_the_private_model_is_exported(task: Task, tmp_path: Path) -> None:
    client = OPTIONS.build(task, SEED).client
    assert client.export_private(client.initial_private(), tmp_path / "private") is True
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "private")
    assert same(read_arrays(loaded), under("model/", client.initial_private()))
