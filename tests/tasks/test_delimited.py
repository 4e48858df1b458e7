import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedkd_flwr.tasks.cells import Kind, kind_of
from fedkd_flwr.tasks.delimited import Survey, survey, tables

HEADER = ("text", "label")


def read(path: Path, content: str | bytes, delimiter: str = ",", names: Sequence[str] | None = None) -> Survey:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return survey(str(path), delimiter=delimiter, names=names)


def rows(found: Survey) -> list[tuple[str | None, ...]]:
    """All cells as texts."""
    texts = [Kind.TEXT] * len(found.names)
    batches = [table.to_pydict() for table in tables(found, texts)]
    return [row for batch in batches for row in zip(*(batch[name] for name in found.names), strict=True)]


def lines(*texts: str, delimiter: str = ",") -> str:
    return "\n".join([delimiter.join(HEADER), *(text.replace("|", delimiter) for text in texts)]) + "\n"


@pytest.mark.parametrize("word", ["NA", "N/A", "n/a", "null", "NULL", "None", "nan", "NaN", "-", "#N/A", "<NA>", " "])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_word_for_nothing_is_a_word_and_only_an_empty_cell_is_missing(
    word: str, delimiter: str, tmp_path: Path
) -> None:
    found = read(tmp_path / "f", lines(f"{word}|{word}", "|a", '""|b', "c|", delimiter=delimiter), delimiter)
    assert rows(found) == [(word, word), (None, "a"), (None, "b"), ("c", None)]


@pytest.mark.parametrize("first", [3, 0])
@pytest.mark.parametrize("closed", [None, 9, 11])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_quote_that_is_not_closed_takes_no_other_row(
    first: int, closed: int | None, delimiter: str, tmp_path: Path
) -> None:
    """The next quote may be rows below, at the end of a cell, as if it closed the first."""
    marks = [('"' * (row == first), '"' * (row == closed)) for row in range(12)]
    texts = [f"{opening}text {row}{closing}|{row % 2}" for row, (opening, closing) in enumerate(marks)]
    found = read(tmp_path / "f", lines(*texts, delimiter=delimiter), delimiter)
    expected = [(text.split("|")[0], text.split("|")[1]) for text in texts]
    assert rows(found) == expected


def test_a_stray_quote_is_a_character_and_others_still_hold_cells_together(tmp_path: Path) -> None:
    found = read(tmp_path / "f", lines('"a, b"|x', '"Joker" is|y', '5" pipe|z', '"c ""d"""|x', '"e|y', '"f\ng, h"|z'))
    assert [row[0] for row in rows(found)] == ["a, b", '"Joker" is', '5" pipe', 'c "d"', '"e', "f\ng, h"]


def test_quotes_of_a_file_of_tabs_are_characters_unless_it_needs_them(tmp_path: Path) -> None:
    plain = read(tmp_path / "f", lines('"Joker" is|x', '"Whole"|y', delimiter="\t"), "\t")
    assert rows(plain) == [('"Joker" is', "x"), ('"Whole"', "y")]
    quoted = read(tmp_path / "f", lines('"a\tb"|x', '"c\n""d"""|y', delimiter="\t"), "\t")
    assert rows(quoted) == [("a\tb", "x"), ('c\n"d"', "y")]


def test_two_lines_that_a_quote_joins_are_noted_where_each_could_be_a_row(tmp_path: Path) -> None:
    found = read(tmp_path / "f", lines("a|x", '"Dear Ann,\nthanks"|y'))
    assert rows(found) == [("a", "x"), ("Dear Ann,\nthanks", "y")]
    assert found.notes == (
        "one row is lines 3 to 4, each of which could be a row of its own; close or remove the quote that joins them "
        "if it is stray",
    )
    assert read(tmp_path / "f", lines("a|x", '"Dear Ann\nthanks"|y')).notes == ()


def test_rows_with_too_few_cells_are_noted_and_with_too_many_refused(tmp_path: Path) -> None:
    found = read(tmp_path / "f", lines("a|x", "b", "c|y", "d"))
    assert rows(found) == [("a", "x"), ("b", None), ("c", "y"), ("d", None)]
    assert found.notes == ("2 rows have fewer fields than columns (the first is in line 3)",)
    assert read(tmp_path / "f", lines("a|x", "b")).notes == (
        "1 row has fewer fields than columns (the first is in line 3)",
    )
    assert rows(read(tmp_path / "f", lines("a|x||", "b|y|"))) == [("a", "x"), ("b", "y")]
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "f", lines("a|x", "b, c|y"))
    assert str(caught.value) == "has 3 fields in the row of line 3, and 2 columns; quote what holds the delimiter"


@pytest.mark.parametrize(
    ("content", "delimiter"),
    [
        ("text;label\na;x\n", ","),
        ("text\tlabel\na\tx\n", ","),
        ("text,label\na,x\n", "\t"),
        ("\ufefftext,label\r\na,x\r\n", ","),
        ("text,label\ra,x\r", ","),
        (" text , label\n\n\na,x\n\n", ","),
        ('"text","label"\n"a","x"', ","),
        ("text,label\na,x\n".encode("utf-16"), ","),
    ],
    ids=["semicolon", "tabs", "commas", "mark", "returns", "blank lines", "all quoted", "utf-16"],
)
def test_what_other_programs_write_is_read(content: str | bytes, delimiter: str, tmp_path: Path) -> None:
    found = read(tmp_path / "f", content, delimiter)
    assert (found.names, rows(found)) == (HEADER, [("a", "x")])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        ("text,label\ncaf\xe9,x\n".encode("latin-1"), "is not UTF-8; save it as UTF-8"),
        ("text,label\na,x\n".encode("utf-16-le"), "has zero bytes, as UTF-16 without a mark has; save it as UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "f", content)
    assert str(caught.value) == reason


def test_columns_without_a_name_or_of_one_name_are_numbered(tmp_path: Path) -> None:
    assert read(tmp_path / "f", ",text,text\n0,a,b\n").names == ("Unnamed: 0", "text", "text.1")


def test_a_file_without_a_header_may_have_one_after_all(tmp_path: Path) -> None:
    for content in ('"a\tx\n', 'text\tlabel\n"a\tx\n'):
        assert rows(read(tmp_path / "f", content, "\t", HEADER)) == [('"a', "x")]


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "-1", "0"], Kind.INTEGER),
        ([" 1", "2 "], Kind.INTEGER),
        (["0.5", "1", "-1e-05"], Kind.NUMBER),
        (["True", "false", "TRUE"], Kind.TRUTH),
        (["007", "010"], Kind.TEXT),
        (["1.50", "2.0"], Kind.TEXT),
        (["1", "NA"], Kind.TEXT),
        (["1", "True"], Kind.TEXT),
        (["nan", "inf"], Kind.TEXT),
        (["-0", "+1"], Kind.TEXT),
        (["1\u00a0", "1"], Kind.TEXT),
        (["12345678901234567890"], Kind.TEXT),
        (["2020-01-02"], Kind.TEXT),
        ([None, " "], Kind.EMPTY),
        ([None, "1"], Kind.INTEGER),
    ],
    ids=repr,
)
def test_a_column_has_numbers_only_if_their_text_is_not_lost(cells: list[str | None], kind: Kind) -> None:
    assert kind_of(pa.array(cells, pa.string())) is kind
    assert kind_of(pa.array(cells * 200, pa.string())) is kind  # looked at as a whole


def test_one_cell_far_down_makes_a_column_text(tmp_path: Path) -> None:
    content = lines(*(f"a|{row}" for row in range(30_000)), "a|007")
    found = read(tmp_path / "f", content)
    assert (found.kinds, found.num_rows) == ((Kind.TEXT, Kind.TEXT), 30_001)
    assert [label for _, label in rows(found)][-2:] == ["29999", "007"]


CELLS = st.text(st.sampled_from(list('ab",;\t\n\r 0é')), max_size=6)


@given(cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8), delimiter=st.sampled_from(",\t;"))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_program_writes_by_the_rules_is_read_back(
    cells: list[tuple[str, str]], delimiter: str, tmp_path: Path
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([HEADER, *cells])
    assume_one_reading(text.getvalue(), delimiter)
    found = read(tmp_path / "f", text.getvalue(), delimiter)
    assert rows(found) == [tuple(cell or None for cell in row) for row in cells if any(row) or len(row) > 1]


def assume_one_reading(text: str, delimiter: str) -> None:
    """Leave out rows all of whose lines could be rows: they are read as such on purpose."""
    from hypothesis import assume

    reader_lines: list[str] = []

    def noted() -> object:
        for line in io.StringIO(text, newline=""):
            reader_lines.append(line)
            yield line

    for _ in csv.reader(noted(), delimiter=delimiter):  # type: ignore[call-overload]
        assume(len(reader_lines) < 2 or not all(line.count(delimiter) == 1 for line in reader_lines))
        reader_lines.clear()


@given(text=st.text(st.sampled_from(list('a",\n')), max_size=30))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_readers_read_the_same(text: str, tmp_path: Path) -> None:
    """Where Arrow's reader is used, it reads what the slow one reads."""
    try:
        found = read(tmp_path / "f", f"text,label\n{text}")
    except ValueError:
        return
    if found.quotes is not None:
        assert rows(found) == rows(replace(found, quotes=None))
