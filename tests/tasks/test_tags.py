from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_flwr.tasks.scores import entity_spans
from fedkd_flwr.tasks.tags import names_in_iob2, rows_in_iob2
from fedkd_flwr.tasks.token_classification import TokenClassification, TokenClassificationOptions
from tests.tasks.conftest import write_splits

Span = tuple[int, int, str]


def written(spans: list[Span], length: int, scheme: str) -> list[str]:
    """Entities in a scheme, from its definition."""
    marks = {"IOB2": "BIIB", "IOBES": "BIES", "BILOU": "BILU", "BMEWO": "BMEW"}
    tags = ["O"] * length
    for begin, end, kind in spans:
        for place in range(begin, end):
            if scheme == "IOB1":
                follows = place == begin and begin > 0 and tags[begin - 1].endswith(f"-{kind}")
                tags[place] = f"{'B' if follows else 'I'}-{kind}"
                continue
            first, inside, last, single = marks[scheme]
            mark = single if end - begin == 1 else first if place == begin else last if place == end - 1 else inside
            tags[place] = f"{mark}-{kind}"
    return tags


@st.composite
def sentences(draw: st.DrawFn) -> tuple[list[Span], int]:
    spans, place = [], 0
    for gap, size, kind in draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.sampled_from("XY")), max_size=5)
    ):
        spans.append((place + gap, place + gap + size, kind))
        place += gap + size
    return spans, place + draw(st.integers(0, 2))


@settings(max_examples=40)
@given(st.lists(sentences(), min_size=1, max_size=4), st.sampled_from(["IOB1", "IOB2", "IOBES", "BILOU", "BMEWO"]))
def test_entities_are_the_same_in_every_scheme(rows: list[tuple[list[Span], int]], scheme: str) -> None:
    read, _ = rows_in_iob2([written(spans, length, scheme) for spans, length in rows], lambda _: True)
    assert read == [written(spans, length, "IOB2") for spans, length in rows]
    assert [entity_spans(tags or ()) for tags in read] == [set(spans) for spans, _ in rows]


def test_tags_in_iob2_stay_even_where_one_is_amiss() -> None:
    rows: list[list[Any] | None] = [["B-X", "I-X", "O", "I-X"], None, ["I-Y", None, 3]]
    assert rows_in_iob2(rows, lambda _: True) == (rows, None)
    inside: list[list[Any] | None] = [["I-X", "O"]]
    assert rows_in_iob2(inside, lambda _: False) == (inside, None)  # no tag to begin an entity with


def test_names_are_those_of_iob2_in_their_order_each_once() -> None:
    assert names_in_iob2(("O", "S-X", "B-X", "I-X", "E-X")) == ("O", "B-X", "I-X")
    assert names_in_iob2(("O", "PER", "b-x")) == ("O", "PER", "b-x")


WORDS = [["so", "aspirin", "fever"], ["the", "drug", "help"]] * 4
SPANS = [[(1, 3, "X")], [(1, 2, "X")]] * 4


def task_of(folder: Path, bert: Path, tags: list[list[Any]], **changes: Any) -> TokenClassification:
    rows = {"tokens": WORDS, "ner_tags": tags}
    chosen = {"data": write_splits(folder, rows, rows), "teacher": {"source": str(bert)}, "max_length": 16, **changes}
    return TokenClassificationOptions.model_validate(chosen).build(2, 0)


def counts_in_iob2(folder: Path, bert: Path) -> tuple[tuple[int, ...], ...]:
    """Entities of each client where nothing has to be converted."""
    counts = task_of(folder, bert, [written(spans, 3, "IOB2") for spans in SPANS]).data_report().label_counts
    assert all(sum(of_client) > 1 for of_client in counts)
    return counts


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("scheme", ["IOBES", "IOB1"])
def test_a_task_reads_other_schemes_and_says_so(scheme: str, tiny_bert: Path, tmp_path: Path) -> None:
    tags = [written(spans, 3, scheme) for spans in SPANS]
    task = task_of(tmp_path / scheme, tiny_bert, tags)
    assert task.data_report().label_counts == counts_in_iob2(tmp_path / "IOB2", tiny_bert)
    for split in ("train", "test"):
        assert f"split '{split}': tags are in {scheme} and read as IOB2" in task.data_report().notes
    assert task._label_names == ("O", "B-X", "I-X")


@pytest.mark.usefixtures("offline")
def test_numbers_are_places_in_the_names_as_they_are_given(tiny_bert: Path, tmp_path: Path) -> None:
    names = ("S-X", "O", "B-X", "E-X", "I-X")
    tags = [[names.index(tag) for tag in written(spans, 3, "IOBES")] for spans in SPANS]
    task = task_of(tmp_path / "numbers", tiny_bert, tags, label_names=names)
    assert task._label_names == ("B-X", "O", "I-X")
    assert task.data_report().label_counts == counts_in_iob2(tmp_path / "IOB2", tiny_bert)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("tag", "given"), [*product(("DET", "B_X"), (False, True))])
def test_tags_that_are_of_no_scheme_are_blamed_on_where_they_are(
    tag: str, given: bool, tiny_bert: Path, tmp_path: Path
) -> None:
    key, changes = ("label_names", {"label_names": ("O", tag)}) if given else ("data.columns.tags", {})
    with pytest.raises(ValueError, match=rf"^task\.{key}: tags must be 'O', .*, got '{tag}'; correct"):
        task_of(tmp_path, tiny_bert, [["O", tag, "O"]] * 8, **changes)
