"""Files become the same table whatever format they are in, and are refused by name where there is a doubt."""

import bz2
import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from fedkd_flwr.tasks.partition import NaturalPartition
from fedkd_flwr.tasks.source import DataSource, RowNames, column_values
from fedkd_flwr.tasks.table import ClientRows, left_out

pytestmark = pytest.mark.usefixtures("offline")

Columns = dict[str, list[Any]]

AWKWARD: Columns = {
    "text": ["NA", 'say "hi"', "a\tb", "two\nlines", "null", "a, b; c", "1\u00a0kg", '"', "None", " x ", "\u2028", "'"],
    "word": ["NA", "null", "None", "nan", "n/a", "a", None, "N/A", "-", "NULL", "NaN", "a"],
    "zeros": ["007", "010", "7", "007", "010", "7", "007", "010", "7", "007", "010", "7"],
    "signed": [-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, None],
    "half": [0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0],
    "truth": [True, False, True, False, True, False, True, False, True, False, True, False],
    "day": [f"2020-01-{row % 3 + 1:02d}" for row in range(12)],
    "hard": ["a\u00a0b", "a b"] * 6,
}
PLAIN = "text,label\na,0\nb,1\n"


def by_csv(delimiter: str, **options: Any) -> Callable[[Path, Columns], None]:
    def write(path: Path, columns: Columns) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter, **options)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))

    return write


def by_lines(path: Path, columns: Columns) -> None:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_array(path: Path, columns: Columns) -> None:
    path.write_text(json.dumps([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]))


def by_parquet(path: Path, columns: Columns) -> None:
    pq.write_table(pa.table(columns), path)


def by_views(path: Path, columns: Columns) -> None:
    """As some programs store texts: as views, with 64-bit offsets, as numbers of a dictionary."""
    kinds = [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    arrays = [
        pa.array(values, kinds[place % 3] if isinstance(values[0], str) else None)
        for place, values in enumerate(columns.values())
    ]
    pq.write_table(pa.table(arrays, names=list(columns)), path)


WRITERS: dict[str, tuple[str, Callable[[Path, Columns], None]]] = {
    "csv": ("csv", by_csv(",")),
    "all quoted": ("csv", by_csv(",", quoting=csv.QUOTE_ALL)),
    "semicolons": ("csv", by_csv(";")),
    "tsv": ("tsv", by_csv("\t")),
    "lines of json": ("jsonl", by_lines),
    "json": ("json", by_array),
    "parquet": ("parquet", by_parquet),
    "views": ("parquet", by_views),
}


def loaded(folder: Path, **options: Any) -> tuple[Dataset, Dataset]:
    return DataSource.model_validate({"source": str(folder), **options}).load()


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        loaded(folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix(f"task.data.source: {str(folder)!r} can't be loaded: ")


def put(folder: Path, files: Mapping[str, str | bytes | pa.Table]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, folder / name)
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("writer", WRITERS)
def test_an_awkward_table_is_the_same_in_every_format(writer: str, tmp_path: Path) -> None:
    suffix, write = WRITERS[writer]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.{suffix}", AWKWARD)
    for table in loaded(tmp_path):
        assert {name: column_values(table, name, "") for name in table.column_names} == AWKWARD
    assert RowNames(table).notes == ()


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("csv.gz", gzip.compress), ("csv.bz2", bz2.compress), ("csv.zip", lambda text: zipped("rows.csv", text))],
)
def test_a_packed_file_is_read_by_the_same_rules(suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    content = pack(b'text,label\n"a, b",NA\n,007\n')
    put(tmp_path, {f"{split}.{suffix}": content for split in ("train", "test")})
    for table in loaded(tmp_path):
        assert table[:] == {"text": ["a, b", None], "label": ["NA", "007"]}


def zipped(name: str, text: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr(name, text)
    return packed.getvalue()


def test_a_quote_that_is_not_closed_costs_no_row_of_a_data_set(tmp_path: Path) -> None:
    rows = "".join(('"' if row in (4, 31) else "") + f"text {row}\t{row % 2}\n" for row in range(40))
    put(tmp_path, {"train.tsv": f"text\tlabel\n{rows}", "test.tsv": PLAIN.replace(",", "\t")})
    train, _ = loaded(tmp_path)
    assert len(train) == 40
    assert column_values(train, "label", "") == [row % 2 for row in range(40)]


@pytest.mark.parametrize(
    ("first", "second", "label"),
    [
        ([1, 0], ["a"], ["1", "0"]),
        ([1, 0], ["007"], ["1", "0"]),
        (["a", "b"], [1], ["a", "b"]),
        ([1, 0], [0.5], [1.0, 0.0]),
        ([True, False], ["yes"], ["true", "false"]),
        ([None, None], ["a"], [None, None]),
        (["2020-01-02", "2020-01-03"], ["never"], ["2020-01-02", "2020-01-03"]),
    ],
)
@pytest.mark.parametrize("writer", ["lines of json", "parquet"])
def test_types_that_go_together_are_brought_together(
    first: Sequence[Any], second: Sequence[Any], label: Sequence[Any], writer: str, tmp_path: Path
) -> None:
    suffix, write = WRITERS[writer]
    for split, values in (("train", first), ("test", second)):
        write(tmp_path / f"{split}.{suffix}", {"text": ["x"] * len(values), "label": list(values)})
    train, test = loaded(tmp_path)
    assert column_values(train, "label", "") == label
    assert column_values(test, "label", "") == list(second) or isinstance(second[0], int)


def test_numbers_and_texts_in_one_column_of_json_are_texts(tmp_path: Path) -> None:
    rows = '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n{"text": "c", "label": null}\n'
    put(tmp_path, {"train.jsonl": rows, "test.jsonl": '{"text": "c", "label": 0.5}\n'})
    train, test = loaded(tmp_path)
    assert (train["label"][:], test["label"][:]) == (["1", "x", None], ["0.5"])


def test_columns_of_a_csv_have_one_type_over_all_files(tmp_path: Path) -> None:
    files = {"train-1.csv": PLAIN, "train-2.csv": "text,label\nc,007\n", "test.csv": PLAIN}
    train, test = loaded(put(tmp_path, files))
    assert (train["label"][:], test["label"][:]) == (["0", "1", "007"], ["0", "1"])


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([{"a": 1}], ["x"], "objects of a in 'train.{}' and text in 'test.{}'"),
        (["x"], [{"a": 1}], "text in 'train.{}' and objects of a in 'test.{}'"),
        ([["x"]], [1], "List(Value('string')) in 'train.{}' and int64 in 'test.{}'"),
    ],
)
@pytest.mark.parametrize("writer", ["lines of json", "parquet"])
def test_types_that_do_not_go_together_are_refused_by_column_and_file(
    first: list[Any], second: list[Any], said: str, writer: str, tmp_path: Path
) -> None:
    suffix, write = WRITERS[writer]
    for split, values in (("train", first), ("test", second)):
        write(tmp_path / f"{split}.{suffix}", {"text": ["t"], "label": values})
    assert refusal(tmp_path) == (
        f"column 'label' holds {said.format(suffix, suffix)} (from row 0 on); store it alike in all files"
    )


def test_lists_and_texts_in_one_column_of_json_are_no_texts(tmp_path: Path) -> None:
    rows = '{"text": ["a"], "label": 1}\n{"text": "b", "label": 0}\n'
    put(tmp_path, {"train.jsonl": rows, "test.jsonl": '{"text": "c", "label": 0}\n'})
    assert "column 'text' holds" in refusal(tmp_path)


def test_a_column_of_a_type_of_another_program_is_refused_by_name(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "label": [0], "id": pa.array([b"0" * 16], pa.uuid())})
    put(tmp_path, {"train.parquet": table, "test.parquet": table})
    assert refusal(tmp_path) == (
        "file 'train.parquet': column 'id' is of the extension type arrow.uuid, which can't be read; store it as text "
        "or numbers, or remove it"
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (pa.array([["a", "b"]], pa.large_list(pa.large_string())), [["a", "b"]]),
        (pa.array([["a", None]], pa.list_(pa.string_view())), [["a", None]]),
        (pa.array([5]).dictionary_encode(), [5]),
        (pa.array([Decimal("1.50")]), [Decimal("1.50")]),
        (pa.array([date(2020, 1, 2)]), [date(2020, 1, 2)]),
    ],
    ids=str,
)
def test_how_a_value_is_stored_makes_no_difference(value: pa.Array, expected: list[Any], tmp_path: Path) -> None:
    table = pa.table({"text": value})
    put(tmp_path, {"train.parquet": table, "test.parquet": table})
    with pa.OSFile(str(tmp_path / "test.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    for source in (tmp_path / "train.parquet", tmp_path / "test.arrow"):
        rows = DataSource(source=str(source)).read("train")
        assert rows["text"][:] == expected
        assert "view" not in str(rows.features)


def classes(*names: str, labels: Sequence[int] = (0, 1)) -> pa.Table:
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
    table = Dataset.from_dict({"text": ["x"] * len(labels), "label": list(labels)}, features=features)
    return table.data.table


def origins(folder: Path) -> list[list[Any]]:
    """Rows of each client in both splits, by the column of classes."""
    tables = loaded(folder)
    rows = tuple(np.arange(len(table)) for table in tables)
    clients = ClientRows(tables, rows, rows[0], NaturalPartition(column="label"), 3, 0, 0.2)
    return [[train.tolist(), clients.of(client)[1].tolist()] for client, train in enumerate(clients.train)]


def test_origins_are_told_apart_by_the_names_that_their_own_files_give_them(tmp_path: Path) -> None:
    train = classes("cat", "dog", "cow", labels=[0, 1, 2] * 2)
    put(tmp_path, {"train.parquet": train, "test.parquet": classes("cow", "dog", "hen", "cat", labels=[0, 1, 2, 3])})
    assert origins(tmp_path) == [[[0, 3], [3]], [[1, 4], [1]], [[2, 5], [0]]]
    put(tmp_path, {"test-2.parquet": classes("hen", "cow", "cat", "dog")})
    (tmp_path / "test.parquet").rename(tmp_path / "test-1.parquet")
    with pytest.raises(
        ValueError, match=r"task\.partition\.column: files of split 'test' number the names of 'label' diff"
    ):
        origins(tmp_path)


def test_a_file_that_lacks_a_column_of_its_split_is_refused_and_other_splits_may_lack_it(tmp_path: Path) -> None:
    put(tmp_path, {"train-1.csv": PLAIN, "train-2.csv": "text\nc\n", "test.csv": PLAIN})
    assert refusal(tmp_path) == (
        "file 'train-2.csv' has no column 'label', which 'train-1.csv' has; files of one split must have the same "
        "columns"
    )
    put(tmp_path, {"train-2.csv": PLAIN, "test.csv": "text,site\nc,x\n"})
    train, test = loaded(tmp_path)
    assert (train.column_names, test.column_names) == (["text", "label"], ["text", "site"])


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train/a.csv", "Test/a.csv"),
        ("TRAIN.csv", "Test.csv"),
        ("train.csv", "TEST.csv"),
        ("Training/a.csv", "EVAL/a.csv"),
        ("data [1]/Train/a.csv", "data [1]/Test/b.csv"),
        ("trainset.csv", "testset.csv"),
        ("My-Train-Data.csv", "My-Test-Data.csv"),
    ],
)
def test_splits_are_found_whatever_their_capitals(train: str, test: str, tmp_path: Path) -> None:
    put(tmp_path, {train: PLAIN, test: "text,label\nc,1\n"})
    assert [len(table) for table in loaded(tmp_path)] == [2, 1]
    only, of_test = DataSource(source=str(tmp_path)).load_train()
    assert (len(only), of_test is not None) == (2, True)


@pytest.mark.parametrize("name", ["Validation", "VAL", "dev", "Valid"])
def test_a_validation_split_may_have_any_of_its_names(name: str, tmp_path: Path) -> None:
    put(tmp_path, {"Train/a.csv": PLAIN, f"{name}/a.csv": PLAIN})
    assert len(loaded(tmp_path, test_split="validation")[1]) == 2


def test_where_a_split_is_not_found_what_is_there_and_what_it_may_be_called_is_said(tmp_path: Path) -> None:
    put(tmp_path, {"Learn.csv": PLAIN, "Check.csv": PLAIN})
    said = refusal(tmp_path)
    assert "it holds Check.csv, Learn.csv;" in said
    assert "train (training), test (testing, eval, evaluation) or validation (valid, val, dev)" in said


def test_folders_of_images_in_capitals_are_splits_too(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("L", (4, 4)).save(image, "PNG")
    names = [f"{split}/{kind}/0.png" for split in ("Train", "TEST") for kind in ("Cat", "Dog")]
    train, test = loaded(put(tmp_path, dict.fromkeys(names, image.getvalue())))
    assert (len(train), len(test), train.features["label"].names) == (2, 2, ["Cat", "Dog"])


def test_metadata_of_a_folder_of_images_is_read_as_every_csv(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("L", (4, 4)).save(image, "PNG")
    for split in ("train", "test"):
        put(tmp_path / split, {f"{row}.png": image.getvalue() for row in range(3)})
        put(tmp_path / split, {"metadata.csv": "file_name;label;site\n0.png;NA;007\n1.png;;008\n2.png;None;007\n"})
    for table in loaded(tmp_path):
        assert table.remove_columns("image")[:] == {"label": ["NA", None, "None"], "site": ["007", "008", "007"]}


def test_a_column_of_metadata_has_one_type_in_all_splits_and_files(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("L", (4, 4)).save(image, "PNG")
    for folder, label in (("train/a", "7"), ("train/b", "10"), ("test", "NA")):
        put(tmp_path / folder, {"0.png": image.getvalue(), "metadata.csv": f"file_name,label\n0.png,{label}\n"})
    train, test = loaded(tmp_path)
    assert (sorted(train["label"][:]), test["label"][:]) == (["10", "7"], ["NA"])


def test_rows_are_named_by_their_file_in_slices_too(tmp_path: Path) -> None:
    put(tmp_path, {"train-1.csv": PLAIN, "train-2.csv": "text,label\nc,\nd,1\n", "test.csv": PLAIN})
    for split, row in (("train", 2), ("train[1:]", 1), ("train[2:]", 0)):
        train = DataSource(source=str(tmp_path)).read(split)
        assert RowNames(train)(row) == "row 0 of 'train-2.csv'"
    table = Dataset.from_dict({"text": ["a"]})
    assert (RowNames(table)(0), RowNames(table).notes) == ("row 0", ())


def test_what_looks_like_an_accident_in_a_file_is_noted_with_the_rows_left_out(tmp_path: Path) -> None:
    put(tmp_path, {"train.csv": "text,label\na,1\nb\n", "test.csv": PLAIN})
    train, test = loaded(tmp_path)
    missing = [label is None for label in train["label"]]
    _, notes = left_out("train", {"have no label": pa.array(missing).to_numpy(False)}, 2, RowNames(train))
    assert notes == (
        "file 'train.csv': 1 row has fewer fields than columns (the first is in line 3)",
        "split 'train': 1 of 2 rows is left out: 1 has no label (the first is row 1 of 'train.csv')",
    )
    assert RowNames(test).notes == ()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.csv", b"text,label\ncaf\xe9,x\n", "file 'train.csv' is not UTF-8; save it as UTF-8"),
        ("train.csv", b"", "file 'train.csv' is empty"),
        ("train.csv", b"text,label\na,b,c\n", "file 'train.csv' has 3 fields in the row of line 2, and 2 columns; "),
        ("train.jsonl", b'{"text": "a" "b"}\n', "file 'train.jsonl' is no JSON that can be read: "),
        ("train.parquet", b"PAR1", "file 'train.parquet' is no whole Parquet file: "),
    ],
)
def test_a_file_that_can_not_be_read_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    put(tmp_path, {name: content})
    assert refusal(tmp_path).startswith(said)


def test_what_an_older_copy_was_is_not_what_a_data_set_says_of_itself(tmp_path: Path) -> None:
    """Another program's copy of the same files, in the same cache, made "NA" nothing."""
    import datasets

    put(tmp_path, {f"{split}.csv": "text,label\na,NA\nb,1\n" for split in ("train", "test")})
    older = datasets.load_dataset(str(tmp_path), split="train")
    assert older["label"][:] == [None, 1.0]
    assert loaded(tmp_path)[0]["label"][:] == ["NA", "1"]


CARD = """---
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': neg
          '1': pos
---
"""


@pytest.mark.parametrize("cells", [("pos", "neg", ""), ("1", "0", "-1")])
def test_classes_that_a_data_card_declares_may_be_written_by_name_or_by_number(
    cells: tuple[str, str, str], tmp_path: Path
) -> None:
    text = "text,label\n" + "".join(f"{name},{cell}\n" for name, cell in zip("abc", cells, strict=True))
    put(tmp_path, {"train.csv": text, "test.csv": text, "README.md": CARD})
    for table in loaded(tmp_path):
        assert table.features["label"].names == ["neg", "pos"]
        assert [None if label == -1 else label for label in table["label"][:]] == [1, 0, None]


def test_a_name_that_is_a_number_stays_a_name_where_a_data_card_declares_it(tmp_path: Path) -> None:
    card = CARD.replace("neg", "'1'").replace("pos", "'0'")
    put(tmp_path, {"train.csv": "text,label\na,1\nb,0\n", "test.csv": PLAIN, "README.md": card})
    train, _ = loaded(tmp_path)
    assert [train.features["label"].int2str(label) for label in train["label"][:]] == ["1", "0"]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_what_a_data_card_does_not_declare_is_refused_by_file_and_column(
    ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split, label in (("train", "pos"), ("test", "odd")):
        columns = {"text": ["a"], "label": [label]}
        as_text = {"csv": f"text,label\na,{label}\n", "jsonl": f'{{"text": "a", "label": "{label}"}}\n'}
        put(tmp_path, {f"{split}.{ending}": as_text.get(ending) or pa.table(columns)})
    said = refusal(put(tmp_path, {"README.md": CARD}))
    assert said.startswith(
        f"file 'test.{ending}' has a value in column 'label' that is none of numbers of the classes neg, pos ("
    )
    assert "odd" in said
    assert not caplog.records
