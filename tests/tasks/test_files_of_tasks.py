"""Every task, public examples and nodes' own data read their files by the same rules."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedkd_flwr.core.protocols import DataReport
from tests.tasks import image_data, news_data, test_own_data, test_text_classification
from tests.tasks.conftest import write_splits
from tests.tasks.test_readers import put

pytestmark = pytest.mark.usefixtures("offline")

NATURAL = {"name": "natural", "column": "site"}


@pytest.fixture
def server_data(tmp_path: Path) -> str:
    return write_splits(tmp_path / "server", test_own_data.TEXTS, test_text_classification.TEST)


def table(*rows: str, header: str = "text,label,site") -> str:
    return "\n".join([header, *rows]) + "\n"


def left_out(report: DataReport) -> list[str]:
    """Notes on rows that are not used and on files that look odd."""
    return [note for note in report.notes if "left out" in note or note.startswith("file ")]


def counts(report: DataReport) -> dict[str, int]:
    return dict(zip(report.label_names, np.sum(report.label_counts, axis=0).tolist(), strict=True))


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_class_a_text_and_a_site_may_be_called_as_others_call_nothing(
    kind: str, tiny_bert: Path, tmp_path: Path
) -> None:
    rows = table(*["good,EU,DE", "null,NA,NA", "None,n/a,DE", "bad,NA,NA"] * 3)
    rows = rows.replace(",", "\t") if kind == "tsv" else rows
    source = str(put(tmp_path, {f"{split}.{kind}": rows for split in ("train", "test")}))
    task = test_text_classification.build(source, tiny_bert, 2, partition=NATURAL)
    assert counts(task.data_report()) == {"EU": 3, "NA": 6, "n/a": 3}
    assert left_out(task.data_report()) == []


def test_leading_zeros_tell_classes_and_sites_apart(tiny_bert: Path, tmp_path: Path) -> None:
    rows = table(*["good,007,01", "bad,07,1"] * 4)
    source = str(put(tmp_path, {f"{split}.csv": rows for split in ("train", "test")}))
    task = test_text_classification.build(source, tiny_bert, 2, partition=NATURAL, label_names=("007", "07"))
    assert task.data_report().label_counts == ((4, 0), (0, 4))


def test_rows_without_a_site_are_refused_by_number_and_file(tiny_bert: Path, tmp_path: Path) -> None:
    rows = table("good,a,1.5", "bad,b,", "so,a,2.5", "it,b,")
    source = str(put(tmp_path, {f"{split}.csv": rows for split in ("train", "test")}))
    for grouped in (False, True):
        partition = NATURAL | {"grouped": grouped}
        said = test_text_classification.refusal(source, tiny_bert, partition=partition)
        assert "'site' names no origin in 2 of 4 rows (the first is row 1 of 'train.csv')" in said


def test_a_node_reads_its_own_files_so(server_data: str, tiny_bert: Path, tmp_path: Path) -> None:
    kinds = test_own_data.KINDS
    rows = "".join(('"' if row in (1, 8) else "") + f"it was good {row}\t{kinds[row % 3]}\n" for row in range(12))
    site = put(tmp_path / "site", {"Train.tsv": "text\tlabel\n" + rows, "Test.tsv": "text\tlabel\n" + rows})
    task = test_own_data.at(test_own_data.text_options(server_data, tiny_bert), site)
    data = task.client_data(0)
    assert (len(data.train), len(data.test)) == (12, 12)
    put(site, {"Test.tsv": b"text\tlabel\ncaf\xe9\tgood\n"})
    with pytest.raises(ValueError, match=r"file 'Test\.tsv' is not UTF-8; save it as UTF-8"):
        test_own_data.at(test_own_data.text_options(server_data, tiny_bert), site)


def test_public_texts_are_read_so_and_those_left_out_are_noted(
    server_data: str,
    tiny_bert: Path,
    tmp_path: Path,
) -> None:
    site = put(tmp_path / "public", {"train.csv": 'text;note\nnull;1\n"NA";2\n;3\ngood;4\n'})
    task = test_text_classification.build(server_data, tiny_bert, public={"source": str(site)})
    public = task.public_examples()
    assert public is not None
    assert len(public) == 3
    assert left_out(task.data_report()) == [
        "public examples: split 'train': 1 of 4 rows is left out: 1 has an empty text (the first is row 2 of "
        "'train.csv')"
    ]


def png(side: int = image_data.SIDE, **settings: Any) -> bytes:
    content = io.BytesIO()
    Image.new("L", (side, side)).save(content, "PNG", **settings)
    return content.getvalue()


def test_images_are_left_out_by_their_true_reason_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{split}/{kind}/{row}.png" for split in ("Train", "Test") for kind in ("cat", "dog") for row in range(6)]
    put(tmp_path, dict.fromkeys(names, png()) | {"Train/dog/1.png": png(40), "Train/dog/2.png": png()[:-30]})
    put(tmp_path, {"Test/cat/4.png": png(40), "Train/dog/notes.txt": "no image", "Train/.DS_Store": b"\0"})
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 400)
    report = image_data.build(tmp_path, 2).data_report()
    assert left_out(report) == [
        "split 'train': 2 of 12 rows are left out: 1 has an image that can't be read (the first is row 8, "
        "'Train/dog/2.png'), 1 has an image of more than 800 pixels, the most that are read (the first is row 7, "
        "'Train/dog/1.png')",
        "split 'test': 1 of 12 rows is left out: 1 has an image of more than 800 pixels, the most that are read (the "
        "first is row 4, 'Test/cat/4.png')",
    ]


def test_an_image_that_is_no_file_is_named_so(tmp_path: Path) -> None:
    rows = "".join(f"pictures/{row}.png,{'cat' if row % 2 else 'dog'}\n" for row in range(8))
    pictures = {f"pictures/{row}.png": png() for row in range(8) if row != 3}
    put(tmp_path, pictures | {f"{split}.csv": f"image,label\n{rows}" for split in ("train", "test")})
    data = {"source": str(tmp_path), "columns": {"image": "image"}}
    # A folder of tables and images is one of tables only if they are named.
    (tmp_path / "pictures").rename(tmp_path.parent / "pictures")
    report = image_data.build(tmp_path, 2, data=absolute(data, tmp_path)).data_report()
    assert left_out(report)[0] == (
        "split 'train': 1 of 8 rows is left out: 1 names an image file that is not there (the first is row 3, "
        f"{str(tmp_path.parent / 'pictures' / '3.png')!r})"
    )


def absolute(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same tables with whole paths."""
    for split in ("train", "test"):
        text = (folder / f"{split}.csv").read_text().replace("pictures/", f"{folder.parent}/pictures/")
        (folder / f"{split}.csv").write_text(text)
    return data


def news_files(folder: Path) -> dict[str, Any]:
    return news_data.write_mind(folder, *news_data.split(news_data.planted()))


def test_titles_of_news_may_have_quotes_and_be_called_nothing(tmp_path: Path) -> None:
    build = news_data.builder(tmp_path)
    data = news_files(tmp_path / "mind")
    plain = build(data)
    file = tmp_path / "mind" / "train" / "news.tsv"
    first, second, *others = file.read_text().splitlines()
    marked = [
        "\t".join([*line.split("\t")[:3], title, *line.split("\t")[4:]])
        for line, title in ((first, '"t0w0'), (second, "NA"))
    ]
    file.write_text("\n".join([*marked, *others]) + "\n")
    task = build(data)
    assert len(task.test_data()) == len(plain.test_data())
    assert len(news_data.words(task, range(60))) == 60
    assert left_out(task.data_report()) == []


def test_news_with_a_header_a_mark_or_another_encoding(tmp_path: Path) -> None:
    build = news_data.builder(tmp_path)
    data = news_files(tmp_path / "mind")
    expected = news_data.rows_of(build(data).test_data())
    file = tmp_path / "mind" / "dev" / "behaviors.tsv"
    text = file.read_text()
    header = "impression_id\tuser_id\ttime\thistory\timpressions\n"
    for content in (header + text, "\ufeff" + text, (header + text).encode("utf-16")):
        put(tmp_path / "mind" / "dev", {"behaviors.tsv": content})
        assert news_data.rows_of(build(data).test_data()) == expected
    put(tmp_path / "mind" / "dev", {"behaviors.tsv": text.replace("U1", "\xe9").encode("latin-1")})
    with pytest.raises(ValueError, match=r"file 'dev/behaviors\.tsv' is not UTF-8; save it as UTF-8"):
        build(data)


def test_a_file_of_news_in_capitals_is_named(tmp_path: Path) -> None:
    build = news_data.builder(tmp_path)
    data = news_files(tmp_path / "mind") | {"news_files": ["News.tsv"]}
    put(tmp_path / "mind", {"news.tsv": "N1\tc\ts\tt\ta\tu\t[]\t[]\n"})
    with pytest.raises(ValueError, match=r"holds no file 'News\.tsv' but dev, news\.tsv, train; name one by its path"):
        build(data)
