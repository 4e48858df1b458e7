import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image
from pydantic import ValidationError

from fedkd_flwr.tasks.source import DataSource, column_values, require_column

pytestmark = pytest.mark.usefixtures("offline")

TRAIN = {"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}
TEST = {"text": ["e", "f"], "label": [1, 0]}


def write_parquet(path: Path, rows: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows).to_parquet(path)


def write_csv(path: Path, rows: dict[str, list[Any]]) -> None:
    lines = [",".join(rows), *(",".join(map(str, row)) for row in zip(*rows.values(), strict=True))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_json(path: Path, rows: dict[str, list[Any]]) -> None:
    lines = [json.dumps(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, rows in (("train", TRAIN), ("test", TEST)):
        write_parquet(tmp_path / "data" / f"{split}.parquet", rows)
    return tmp_path / "data"


def message(source: DataSource) -> str:
    with pytest.raises(ValueError) as caught:
        source.load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "write"), [("parquet", write_parquet), ("csv", write_csv), ("json", write_json), ("jsonl", write_json)]
)
def test_a_folder_of_any_table_format_gives_both_splits(suffix: str, write: Any, tmp_path: Path) -> None:
    write(tmp_path / f"train.{suffix}", TRAIN)
    write(tmp_path / f"test.{suffix}", TEST)
    train, test = DataSource(source=str(tmp_path)).load()
    assert train[:] == TRAIN
    assert test[:] == TEST


def test_a_folder_of_images_gives_images_and_the_folders_as_labels(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / label / "0.png")
    train, test = DataSource(source=str(tmp_path)).load()
    assert train.column_names == test.column_names == ["image", "label"]
    assert train.features["label"].names == ["cat", "dog"]


def test_a_single_file_is_divided_by_slices(folder: Path) -> None:
    source = DataSource(source=str(folder / "train.parquet"), train_split="train[:75%]", test_split="train[75%:]")
    train, test = source.load()
    assert column_values(train, "text", "task.data.columns.text") == ["a", "b", "c"]
    assert column_values(test, "text", "task.data.columns.text") == ["d"]


@pytest.mark.parametrize(("train", "test"), [("train", "train[:50%]"), ("train[:3]", "train[2:]")])
def test_a_row_can_not_be_both_trained_and_tested_on(folder: Path, train: str, test: str) -> None:
    source = DataSource(source=str(folder / "train.parquet"), train_split=train, test_split=test)
    with pytest.raises(ValueError, match=r"task\.data\.test_split: .* share rows of split 'train'"):
        source.load()


def test_splits_may_have_other_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", TRAIN)
    write_parquet(tmp_path / "validation.parquet", TEST)
    assert len(DataSource(source=str(tmp_path), test_split="validation").load()[1]) == 2


def test_files_that_changed_are_read_again(folder: Path) -> None:
    assert len(DataSource(source=str(folder)).load()[0]) == 4
    write_parquet(folder / "train.parquet", TEST)
    assert len(DataSource(source=str(folder)).load()[0]) == 2


def test_text_is_short_for_the_source() -> None:
    assert DataSource.model_validate("some/name") == DataSource(source="some/name")


def test_a_folder_that_exists_is_made_absolute_and_a_name_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert DataSource(source="data").source == str(folder)
    assert DataSource(source="data/train.parquet").source == str(folder / "train.parquet")
    assert DataSource(source="ylecun/mnist").source == "ylecun/mnist"
    written = DataSource(source="data")
    monkeypatch.chdir(folder)
    assert DataSource.model_validate(written.model_dump()) == written


def test_a_folder_below_the_home_directory_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert DataSource(source="~/data").source == str(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": ""},
        {},
        {"source": "a", "split": "train"},
        {"source": "a", "config": ""},
        3,
        {"source": "a", "test_split": "train"},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: object) -> None:
    with pytest.raises(ValidationError):
        DataSource.model_validate(wrong)


@pytest.mark.parametrize("path", ["./nothing", "/no/such/folder", "a/b/c", "~/nothing/here"])
def test_a_folder_that_is_missing_is_an_error_without_asking_the_hub(path: str) -> None:
    assert message(DataSource(source=path)) == (
        f"task.data.source: there is no folder or file {path!r}; "
        "set it to one, best by an absolute path, or to the id of a data set of the Hugging Face Hub"
    )


def test_a_hub_that_can_not_be_reached_is_an_error_with_the_remedy() -> None:
    text = message(DataSource(source="nobody/nothing"))
    assert text.startswith(
        "task.data.source: 'nobody/nothing' is no folder or file here, and can't be loaded from the Hugging Face Hub ("
    )
    assert text.endswith("); check source, config, revision, splits and the connection")


def test_the_hub_is_asked_for_the_revision_configuration_and_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    class Prepared:
        cache_dir = str(tmp_path / "none")

        def download_and_prepare(self) -> None:
            asked.append(("prepared",))

        def as_dataset(self, split: list[str]) -> list[Dataset]:
            asked.append(("split", *split))
            return [Dataset.from_dict(TRAIN), Dataset.from_dict(TEST)]

    def builder_of(path: str, name: str, **options: object) -> Prepared:
        asked.append((path, name, options))
        return Prepared()

    monkeypatch.setattr("datasets.load_dataset_builder", builder_of)
    train, _ = DataSource(source="a/b", config="c", revision="d", train_split="e", test_split="f").load()
    assert train[:] == TRAIN
    assert asked == [("a/b", "c", {"revision": "d", "data_files": None}), ("prepared",), ("split", "e", "f")]


@pytest.mark.parametrize(("option", "value"), [("train_split", "learn"), ("test_split", "dev"), ("config", "other")])
def test_a_split_or_configuration_that_is_not_there_is_an_error_with_those_that_are(
    option: str, value: str, folder: Path
) -> None:
    text = message(DataSource.model_validate({"source": str(folder), option: value}))
    assert text.startswith(f"task.data.source: {str(folder)!r} can't be loaded (")
    assert value in text
    assert "['default']" in text if option == "config" else "['train', 'test']" in text


def test_a_folder_without_data_and_a_damaged_file_are_errors(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (folder / "train.parquet").write_bytes(b"no parquet")
    assert message(DataSource(source=str(tmp_path / "empty"))).startswith(
        f"task.data.source: {str(tmp_path / 'empty')!r} can't be loaded ("
    )
    assert message(DataSource(source=str(folder))).startswith(
        f"task.data.source: {str(folder)!r} can't be loaded: file 'train.parquet' is no whole Parquet file: "
    )


def test_a_split_without_examples_is_an_error(folder: Path) -> None:
    Dataset.from_dict(TEST).select([]).to_parquet(folder / "test.parquet")
    assert '"test" corresponds to no data' in message(DataSource(source=str(folder)))


def test_a_column_that_is_missing_is_an_error_with_the_option_and_the_columns(folder: Path) -> None:
    train, _ = DataSource(source=str(folder)).load()
    require_column(train, "text", "task.data.columns.text")
    with pytest.raises(ValueError) as caught:
        column_values(train, "body", "task.data.columns.text")
    assert str(caught.value) == "task.data.columns.text: split 'train' has no column 'body'; columns: text, label"
