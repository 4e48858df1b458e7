from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from pydantic import TypeAdapter, ValidationError

from fedkd_flwr.tasks.labels import MISSING, Labels
from fedkd_flwr.tasks.partition import (
    DirichletPartition,
    IidPartition,
    NaturalPartition,
    PathologicalPartition,
    SizePartition,
    TablePartition,
)
from fedkd_flwr.tasks.table import ClassWeights, ClientRows, class_weights, left_out

NUM_TRAIN, NUM_TEST = 40, 12


def table(split: str, features: Features | None = None, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict(columns, features=features, split=split)


def test_weights_that_balance_give_every_class_the_same_weight_in_all() -> None:
    labels = np.array([0, 0, 0, 1, MISSING])
    weights = class_weights("balanced", labels, 3)
    assert weights is not None
    assert weights.tolist() == pytest.approx([4 / 9, 4 / 3, 1.0])  # class 2 has no examples


def test_classes_count_alike_or_as_they_are_told() -> None:
    assert class_weights(None, np.array([0, 1]), 2) is None
    chosen = class_weights((1.0, 2.5), np.array([0, 1]), 2)
    assert chosen is not None
    assert chosen.dtype == torch.float32
    assert chosen.tolist() == [1.0, 2.5]
    with pytest.raises(ValueError, match=r"task.class_weights must be 2 numbers, one for each class, got 3"):
        class_weights((1.0, 1.0, 1.0), np.array([0, 1]), 2)


@pytest.mark.parametrize("chosen", [None, "balanced", (1.0, 0.0), (0.5,)])
def test_weights_may_be_numbers_not_all_of_which_are_zero(chosen: Any) -> None:
    assert TypeAdapter(ClassWeights).validate_python(chosen) == chosen


@pytest.mark.parametrize(
    ("chosen", "got"),
    [
        ([1, -0.5], "-0.5"),
        ([1, float("nan")], "nan"),
        ([1, float("inf")], "inf"),
        ([0, 0.0], "0 for all"),
        ([], "an empty list"),
        (["a", 1], "'a'"),
        ("even", "'even'"),
        (2, "2"),
    ],
)
def test_weights_that_make_no_sense_are_one_error(chosen: Any, got: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(ClassWeights).validate_python(chosen)
    (detail,) = caught.value.errors()
    assert detail["msg"] == (
        f"Value error, must be 'balanced', null, or one number >= 0 for each class, at least one of them > 0, got {got}"
    )


def test_rows_that_can_not_be_used_count_once_under_their_first_reason() -> None:
    empty, unlabelled = np.array([0, 1, 1, 0, 0], bool), np.array([0, 0, 1, 0, 1], bool)
    kept, notes = left_out("train", {"are empty": empty, "have no label": unlabelled}, 5)
    assert kept.tolist() == [0, 3]
    assert notes == (
        "split 'train': 3 of 5 rows are left out: 2 are empty (the first is row 1), 1 has no label (the first is row "
        "4)",
    )


def test_there_is_nothing_to_note_where_all_rows_can_be_used() -> None:
    kept, notes = left_out("train", {"are empty": np.zeros(3, bool)}, 3)
    assert (kept.tolist(), notes) == ([0, 1, 2], ())


def test_a_split_without_any_row_that_can_be_used_is_an_error() -> None:
    with pytest.raises(ValueError) as caught:
        left_out("test", {"are empty": np.ones(2, bool)}, 2)
    text = "task.data: no row of split 'test' can be used: 2 are empty (the first is row 0)"
    assert str(caught.value) == text
    with pytest.raises(ValueError, match="it is empty"):
        left_out("test", {"are empty": np.ones(0, bool)}, 0)


LABELS = np.arange(NUM_TRAIN) % 4
DOCUMENTS = [f"d{row // 4}" for row in range(NUM_TRAIN)]  # ten of four rows each
WRITERS = [row % 3 for row in range(NUM_TRAIN)]
UNUSABLE = {5, 17}


def client_rows(
    partition: TablePartition,
    num_clients: int = 4,
    fraction: float = 0.25,
    test: dict[str, list[Any]] | None = None,
    seed: int = 3,
) -> ClientRows:
    train = table("train", document=DOCUMENTS, writer=WRITERS)
    of_test = table("test", **(test or {"other": list(range(NUM_TEST))}))
    usable = np.array([row for row in range(NUM_TRAIN) if row not in UNUSABLE])
    return ClientRows(
        (train, of_test), (usable, np.arange(len(of_test))), LABELS, partition, num_clients, seed, fraction
    )


@pytest.mark.parametrize(
    ("partition", "num_clients"),
    [
        (IidPartition(), 4),
        (DirichletPartition(alpha=5.0, min_examples=2), 3),
        (PathologicalPartition(classes_per_client=2), 4),
        (SizePartition(growth="linear"), 4),
        (NaturalPartition(column="writer"), 3),
        (NaturalPartition(column="document"), 10),
        (NaturalPartition(column="document", grouped=True), 4),
    ],
)
def test_every_row_that_can_be_used_is_one_clients_and_is_learned_or_held_out(
    partition: TablePartition, num_clients: int
) -> None:
    rows = client_rows(partition, num_clients)
    assert len(rows) == num_clients
    mine = [rows.of(client) for client in range(num_clients)]
    together = [row for train, test in mine for row in (*train.tolist(), *test.tolist())]
    assert sorted(together) == [row for row in range(NUM_TRAIN) if row not in UNUSABLE]
    for client, (train, test) in enumerate(mine):
        assert len(train) and len(test)
        assert {*train.tolist(), *test.tolist()} == set(rows.train[client].tolist())
        assert not rows.scores_on_test(client)


def test_the_same_seed_divides_alike_and_another_one_otherwise() -> None:
    def drawn(seed: int) -> list[list[int]]:
        rows = client_rows(IidPartition(), seed=seed)
        return [part.tolist() for client in range(4) for part in rows.of(client)]

    assert drawn(3) == drawn(3) != drawn(4)


def test_a_client_asked_twice_has_the_same_rows() -> None:
    rows = client_rows(IidPartition())
    again, first = rows.of(1), rows.of(1)
    assert [part.tolist() for part in again] == [part.tolist() for part in first]


@pytest.mark.parametrize("client", [-1, 4])
def test_there_is_no_client_beyond_the_last(client: int) -> None:
    with pytest.raises(ValueError, match=r"partition-id must be in \[0, 3\]"):
        client_rows(IidPartition()).of(client)


def test_documents_that_are_grouped_are_whole_on_one_client_and_on_one_side() -> None:
    rows = client_rows(NaturalPartition(column="document", grouped=True))
    sides = [{DOCUMENTS[row] for row in side.tolist()} for client in range(len(rows)) for side in rows.of(client)]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 10


def test_a_client_of_a_single_document_holds_out_some_of_its_rows() -> None:
    rows = client_rows(NaturalPartition(column="document", grouped=True), num_clients=10)
    for client in range(10):
        train, test = rows.of(client)
        assert len(test) == 1
        assert len({DOCUMENTS[row] for row in (*train.tolist(), *test.tolist())}) == 1


def test_a_natural_column_in_the_test_split_gives_clients_their_own_test_rows() -> None:
    rows = client_rows(NaturalPartition(column="writer"), 3, test={"writer": [2, 0, 7, 0]})
    assert [rows.scores_on_test(client) for client in range(3)] == [True, False, True]
    train, test = rows.of(0)
    assert train.tolist() == rows.train[0].tolist() == [r for r in range(NUM_TRAIN) if r % 3 == 0 and r not in UNUSABLE]
    assert test.tolist() == [1, 3]
    assert rows.of(2)[1].tolist() == [0]
    train, test = rows.of(1)  # nothing in the test split: some of its own are held out
    assert {*train.tolist(), *test.tolist()} == set(rows.train[1].tolist())


def test_test_rows_that_can_not_be_used_are_not_scored_on() -> None:
    tables = table("train", writer=[0, 0, 1, 1]), table("test", writer=[0, 0, 1])
    usable = np.arange(4), np.array([1, 2])
    rows = ClientRows(tables, usable, np.zeros(4, np.int64), NaturalPartition(column="writer"), 2, 0, 0.5)
    assert rows.of(0)[1].tolist() == [1]


def test_a_natural_column_that_is_missing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"task.partition.column: split 'train' has no column 'author'"):
        client_rows(NaturalPartition(column="author"))


def test_a_client_needs_something_to_score_on() -> None:
    tables = table("train", writer=[0, 1, 1]), table("test", other=[0])
    usable = np.arange(3), np.arange(1)
    with pytest.raises(ValueError, match=r"task.partition: client 0 has one training example and none in the test"):
        ClientRows(tables, usable, np.zeros(3, np.int64), NaturalPartition(column="writer"), 2, 0, 0.5)
    tables = tables[0], table("test", writer=[0])
    rows = ClientRows(tables, usable, np.zeros(3, np.int64), NaturalPartition(column="writer"), 2, 0, 0.5)
    assert [part.tolist() for part in rows.of(0)] == [[0], [0]]


def test_test_rows_that_are_no_clients_are_counted() -> None:
    tables = table("train", writer=["01", "02", "01", "02"]), table("test", writer=["1", "02", "2"])
    usable = np.arange(4), np.arange(3)
    said = (
        "split 'test': 2 of 3 rows have a value of 'writer' that no training row has, so no client scores on them, "
        "the server does"
    )
    labels = Labels(("a", "b"), np.array([0, 1, 0, 1]), np.array([0, 1, 0]))
    for grouped in (False, True):
        partition = NaturalPartition(column="writer", grouped=grouped)
        rows = ClientRows(tables, usable, np.zeros(4, np.int64), partition, 2, 0, 0.5)
        assert (said in rows.report(labels, []).notes) is not grouped


def test_a_report_counts_the_labels_that_clients_learn_from_and_names_who_has_one_class() -> None:
    rows = client_rows(PathologicalPartition(classes_per_client=1))
    labels = Labels(("a", "b", "c", "d"), LABELS, np.arange(NUM_TEST) % 4)
    report = rows.report(labels, ["a note"])
    assert report.label_names == ("a", "b", "c", "d")
    learned = [LABELS[rows.of(client)[0]] for client in range(4)]
    assert report.label_counts == tuple(tuple(np.bincount(mine, minlength=4).tolist()) for mine in learned)
    assert np.sum(report.label_counts) < 38  # rows that can be used, those included that clients score on
    assert [sum(count > 0 for count in mine) for mine in report.label_counts] == [1] * 4
    assert report.notes[0] == "a note"
    assert "one class only (4 of 4 clients)" in report.notes[1]


@pytest.mark.parametrize(
    ("first", "note"),
    [
        (0, None),
        (1, "class '0' has no training examples"),
        (2, "classes '0', '1' have no training examples"),
        (7, "classes '0', '1', '2', '3', '4' and 2 more have no training examples"),
    ],
)
def test_a_report_names_classes_without_training_examples(first: int, note: str | None) -> None:
    names = tuple(map(str, range(first + 4)))
    labels = Labels(names, LABELS + first, np.arange(NUM_TEST) % 4 + first)
    report = client_rows(IidPartition()).report(labels, [])
    assert report.notes == ((note,) if note else ())
    assert report.label_names == names
