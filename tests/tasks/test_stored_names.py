from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from fedkd_flwr.tasks.labels import read_labels
from fedkd_flwr.tasks.source import DataSource
from fedkd_flwr.tasks.stored_names import stored_names

pytestmark = pytest.mark.usefixtures("offline")

ABC, CBA = ("a", "b", "c"), ("c", "b", "a")


def write(file: Path, names: Sequence[str] | None, labels: list[Any], *, listed: bool = False) -> None:
    kind: Any = (
        Value("int64" if isinstance(labels[0], int) else "string") if names is None else ClassLabel(names=[*names])
    )
    features = Features({"label": List(kind) if listed else kind})
    table = Dataset.from_dict({"label": [[label] for label in labels] if listed else labels}, features)
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(file)


def names_of(folder: Path, **splits: str) -> list[tuple[str, ...] | None]:
    data = DataSource(source=str(folder), **splits)
    return [stored_names(data, table, "label", "task.data.columns.label") for table in data.load()]


@pytest.mark.parametrize("listed", [False, True])
def test_each_split_says_what_its_own_numbers_mean(listed: bool, tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", ABC, [0, 1, 2], listed=listed)
    write(tmp_path / "test.parquet", CBA, [0, 1, 2], listed=listed)
    assert names_of(tmp_path) == [ABC, CBA]
    assert names_of(tmp_path, train_split="train[:1]", test_split="train[1:]") == [ABC, ABC]


@pytest.mark.parametrize("slices", [{}, {"train_split": "train[:2]"}])
def test_two_files_of_one_split_must_agree_and_are_named_with_both_orders(
    slices: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path / "train" / "0.parquet", ABC, [0, 1, 2])
    write(tmp_path / "train" / "1.parquet", CBA, [0, 1, 2])
    write(tmp_path / "test" / "0.parquet", ABC, [0, 1, 2])
    with pytest.raises(ValueError) as caught:
        names_of(tmp_path, **slices)
    split = slices.get("train_split", "train")
    assert str(caught.value) == (
        f"task.data.columns.label: 'label' of split '{split}' has the classes a, b, c in 0.parquet and c, b, a in "
        "1.parquet; write all files of a split with the same classes in the same order"
    )


def read(folder: Path, names: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], list[int], list[int]]:
    data = DataSource(source=str(folder))
    train, test = data.load()
    stored = (stored_names(data, train, "label", "k"), stored_names(data, test, "label", "k"))
    labels = read_labels(train, test, "label", names, stored=stored)
    return labels.names, labels.train.tolist(), labels.test.tolist()


def test_numbers_without_names_are_those_of_the_split_that_names_them(tmp_path: Path) -> None:
    for folder, (of_train, of_test) in ((tmp_path / "x", (ABC, None)), (tmp_path / "y", (None, ABC))):
        write(folder / "train.parquet", of_train, [0, 1, 2])
        write(folder / "test.parquet", of_test, [2, 1])
        assert read(folder) == (ABC, [0, 1, 2], [2, 1])


def test_numbers_that_the_library_has_made_texts_keep_their_names(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", None, ["a", "b", "c"])
    write(tmp_path / "test.parquet", CBA, [0, 1, 2])
    assert read(tmp_path) == (ABC, [0, 1, 2], [2, 1, 0])
    assert read(tmp_path, ("b", "a", "c")) == (("b", "a", "c"), [1, 0, 2], [2, 0, 1])


def test_a_class_of_the_test_file_alone_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", ABC, [0, 1, 2])
    write(tmp_path / "test.parquet", ("x", "a"), [1, 0])
    with pytest.raises(ValueError, match=r"'label' has 'x' in row 1 of split 'test'"):
        read(tmp_path)


def test_files_without_types_name_no_numbers(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("label\na\nb\n")
    assert names_of(tmp_path) == [None, None]
