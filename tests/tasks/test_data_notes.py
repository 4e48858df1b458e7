from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Features

from fedkd_flwr.tasks.data_notes import class_notes, digests, lacking_notes, repeated_notes
from fedkd_flwr.tasks.labels import MISSING, Labels
from fedkd_flwr.tasks.text_classification import TextClassificationOptions
from fedkd_flwr.tasks.token_classification import TokenClassificationOptions
from tests.tasks import image_data
from tests.tasks.conftest import write_splits, write_table

SPLITS = ("train", "test")


def notes_of(train: list[int], test: list[int], splits: tuple[str, str] = SPLITS) -> tuple[str, ...]:
    labels = Labels(("a", "b", "c"), np.array(train), np.array(test))
    return class_notes(labels, (np.flatnonzero(labels.train >= 0), np.arange(len(test))), splits, "task.class_weights")


def test_classes_that_a_split_lacks_are_named_with_the_split() -> None:
    assert notes_of([0, 1, 2, MISSING], [0, 1, 2]) == ()
    assert notes_of([0, 1], [0, 1]) == ("class 'c' has no training examples",)
    assert notes_of([0, 1], [0, 2]) == (
        "class 'c' has no training examples, but some in 'test'",
        "class 'b' has no examples in split 'test' to score on",
    )
    assert notes_of([0, 1, 2], [0]) == ("classes 'b', 'c' have no examples in split 'test' to score on",)


def test_a_slice_that_loses_a_class_is_blamed() -> None:
    (lost, unscored) = notes_of([0, 0, 1], [2, 2, 1], ("train[:80%]", "train[80%:]"))
    blame = "'train[:80%]' is a slice: shuffle rows that are sorted by class first"
    assert lost == f"class 'c' has no training examples, but some in 'train[80%:]'; {blame}"
    assert unscored.startswith("class 'a' has no examples in split 'train[80%:]'")


def test_many_classes_are_counted_not_listed() -> None:
    (note,) = lacking_notes([f"c{n}" for n in range(9)], np.zeros(9), np.zeros(9), SPLITS, "type")
    assert note == "types 'c0', 'c1', 'c2', 'c3', 'c4' and 4 more have no training examples"


@pytest.mark.parametrize(("ones", "noted"), [(3, False), (4, False), (5, True)])
def test_a_majority_of_more_than_four_in_five_is_noted(ones: int, noted: bool) -> None:
    labels = Labels(("no", "yes"), np.array([1] * ones + [0]), np.array([0, 1]))
    notes = class_notes(labels, (np.arange(ones + 1), np.arange(2)), SPLITS, "task.class_weights")
    assert len(notes) == noted
    for note in notes:
        assert note.startswith("83% of the training labels are 'yes': a model that always says so is right as often;")
        assert note.endswith("; see task.class_weights")


def test_repeated_rows_are_counted_within_a_split_and_across() -> None:
    train, test = digests([("a",), ("b",), ("a",), ("a",)]), digests([("b",), ("c",), ("d",), ("e",)])
    assert repeated_notes(train, test, SPLITS) == (
        "split 'train': 2 of 4 rows (50.0%) repeat another one",
        "split 'test': 1 of 4 rows (25.0%) are in split 'train' too, so scores count examples that models were trained "
        "on",
    )
    assert repeated_notes(train[:2], test[1:], SPLITS) == ()


TEXTS = [f"the {a} {b}" for a in ("good", "bad", "drug") for b in ("fever", "help", "it")]


@pytest.mark.usefixtures("offline")
def test_a_text_task_reports_what_is_odd_about_its_rows(tiny_bert: Path, tmp_path: Path) -> None:
    rows = {"text": [*TEXTS, TEXTS[0]], "label": ["Click Bait"] * 8 + ["click bait ", "Click Bait"]}
    test = {"text": ["so", TEXTS[1]], "label": ["Click Bait"] * 2}
    data = write_splits(tmp_path, rows, test)
    chosen: dict[str, Any] = {"data": data, "teacher": {"source": str(tiny_bert)}, "max_length": 16}
    notes = TextClassificationOptions.model_validate(chosen).build(2, 0).data_report().notes
    for start in (
        "classes 'Click Bait' and 'click bait ' are nearly equal;",
        "split 'train': 1 of 10 rows (10.0%) repeat",
        "split 'test': 1 of 2 rows (50.0%) are in split 'train' too",
        "class 'click bait ' has no examples in split 'test' to score on",
        "90% of the training labels are 'Click Bait'",
    ):
        assert sum(note.startswith(start) for note in notes) == 1, (start, notes)
    assert any(note.endswith("see task.positive_label and task.class_weights") for note in notes)


@pytest.mark.usefixtures("offline")
def test_a_pair_of_texts_is_repeated_only_as_a_pair(tiny_bert: Path, tmp_path: Path) -> None:
    rows = {"text": ["so"] * 9, "other": TEXTS, "label": [0, 1, 0] * 3}
    data = {"source": write_splits(tmp_path, rows, {**rows, "text": ["a"] * 9}), "columns": {"text_pair": "other"}}
    chosen: dict[str, Any] = {"data": data, "teacher": {"source": str(tiny_bert)}, "max_length": 16}
    assert TextClassificationOptions.model_validate(chosen).build(2, 0).data_report().notes == ()


@pytest.mark.usefixtures("offline")
def test_a_task_of_tags_reports_what_is_odd_about_its_rows(tiny_bert: Path, tmp_path: Path) -> None:
    words = [text.split() for text in TEXTS]
    tags = [["O", "B-X", "O"]] * 8 + [["O", "B-x", "O"]]
    data = write_splits(tmp_path, {"tokens": words, "ner_tags": tags}, {"tokens": words[:1], "ner_tags": tags[:1]})
    chosen: dict[str, Any] = {"data": data, "teacher": {"source": str(tiny_bert)}, "max_length": 16}
    notes = TokenClassificationOptions.model_validate(chosen).build(2, 0).data_report().notes
    for start in (
        "classes 'X' and 'x' are nearly equal;",
        "split 'test': 1 of 1 rows (100.0%) are in split 'train' too",
        "type 'x' has no examples in split 'test' to score on",
    ):
        assert sum(note.startswith(start) for note in notes) == 1, (start, notes)


@pytest.mark.usefixtures("offline")
def test_an_image_task_reports_what_is_odd_about_its_rows(tmp_path: Path) -> None:
    train = image_data.rows(24)
    train["image"][3] = train["image"][0]
    test = {name: values[:6] for name, values in train.items()}
    test["label"] = [0] * 6
    features = Features({"image": image_data.ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    for split, rows in (("train", train), ("test", test)):
        kept = {name: rows[name] for name in ("image", "label")}
        write_table(tmp_path / "data" / f"{split}.parquet", kept, features)
    notes = image_data.build(tmp_path / "data").data_report().notes
    for start in (
        "split 'train': 1 of 24 rows (4.2%) repeat",
        "split 'test': 6 of 6 rows (100.0%) are in split 'train' too",
        "classes 'b', 'c' have no examples in split 'test' to score on",
    ):
        assert sum(note.startswith(start) for note in notes) == 1, (start, notes)


@pytest.mark.usefixtures("offline")
def test_folders_of_classes_are_read_by_name_where_a_split_lacks_one(tmp_path: Path) -> None:
    rows = image_data.rows(12)
    for split, kinds, first in (("train", ("blue", "green", "red"), 0), ("test", ("red", "blue"), 6)):
        for number in range(first, first + 6):
            folder = tmp_path / "data" / split / kinds[number % len(kinds)]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(rows["image"][number]["bytes"])
    for names in (None, ("red", "green", "blue"), ("blue", "red", "green")):
        partition = {} if names is None else {"partition": {"name": "own"}, "image_size": 8}
        task = image_data.build(tmp_path / "data", 2, label_names=names, **partition)
        batch = next(iter(task.test_data().batches(6)))
        called = task.data_report().label_names
        assert sorted(called[label] for label in batch["labels"].tolist()) == ["blue"] * 3 + ["red"] * 3
