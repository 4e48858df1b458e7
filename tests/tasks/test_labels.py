from datetime import date, datetime
from decimal import Decimal
from time import process_time
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedkd_flwr.tasks.labels import MISSING, Labels, read_labels


def table(split: str, features: Features | None = None, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict(columns, features=features, split=split)


def labels_of(
    train: list[Any], test: list[Any], names: tuple[str, ...] | None = None, features: Features | None = None
) -> Labels:
    return read_labels(table("train", features, label=train), table("test[:50%]", features, label=test), "label", names)


def read(train: list[Any], test: list[Any], *rest: Any) -> tuple[tuple[str, ...], list[int], list[int]]:
    labels = labels_of(train, test, *rest)
    return labels.names, labels.train.tolist(), labels.test.tolist()


def refusal(*arguments: Any) -> str:
    with pytest.raises(ValueError) as caught:
        labels_of(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_whole_numbers_from_0_on_are_classes_in_their_places() -> None:
    assert read([0, 3, 1, 2], [3]) == (("0", "1", "2", "3"), [0, 3, 1, 2], [3])


def test_texts_are_classes_in_the_order_of_the_alphabet() -> None:
    assert read(["b", "c", "a"], ["a", "b"]) == (("a", "b", "c"), [1, 2, 0], [0, 1])


def test_the_library_own_labels_bring_their_names() -> None:
    features = Features({"label": ClassLabel(names=["no", "yes", "perhaps"])})
    assert read([1, 0], [2], None, features) == (("no", "yes", "perhaps"), [1, 0], [2])


def test_truth_values_are_two_classes() -> None:
    assert read([True, False], [True]) == (("False", "True"), [1, 0], [1])


@pytest.mark.parametrize("renamed", [True, False])
@pytest.mark.parametrize(
    ("names", "as_text", "otherwise"),
    [
        (("1", "2", "3"), ["1", "3", "2"], [1, 3, 2]),
        (("1", "2", "3"), ["1", "3", "2"], [1.0, 3.0, 2.0]),
        (("2", "1", "0"), ["2", "0", "1"], [2, 0, 1]),
        (("True", "False"), ["True", "False", "False"], [True, False, False]),
        (("true", "false"), ["true", "false", "false"], [True, False, False]),
    ],
)
def test_a_label_is_the_same_class_whether_a_file_holds_text_or_numbers_or_truth_values(
    names: tuple[str, ...], as_text: list[Any], otherwise: list[Any], renamed: bool
) -> None:
    texts, others = table("train", label=as_text), table("train", label=otherwise)
    expected = [names.index(name) for name in as_text]
    assert read_labels(texts, texts, "label", names, renamed=renamed).train.tolist() == expected
    assert read_labels(others, others, "label", names, renamed=renamed).train.tolist() == expected


def test_a_number_that_may_be_a_name_or_a_place_is_refused() -> None:
    text = refusal([0, 1], [0], ("none", "2", "1"))
    assert "'label' has 1, which may be the class called 1 or the class in place 1 of none, 2, 1;" in text
    assert read([0, 3], [0], ("none", "2", "1", "more")) == (("none", "2", "1", "more"), [0, 3], [0])


def test_a_number_that_is_no_name_where_all_names_are_numbers_is_refused() -> None:
    assert "has 0 in row 0 of split 'train'; labels must be one of 1, 2;" in refusal([0, 1], [1], ("1", "2"))


def test_truth_values_of_a_node_are_refused_where_no_class_is_called_so() -> None:
    rows = table("train", label=[True, False])
    with pytest.raises(ValueError, match=r"has the truth value True; task\.label_names has ham, spam; store"):
        read_labels(rows, rows, "label", ("ham", "spam"), renamed=False)
    assert read_labels(rows, rows, "label", ("ham", "spam")).train.tolist() == [1, 0]


@pytest.mark.parametrize(("train", "test"), [([1, 0], [1]), (["y", "x"], ["y"]), ([1.0, 0.0], [1.0])])
def test_names_that_are_given_order_texts_and_name_numbers(train: list[Any], test: list[Any]) -> None:
    assert read(train, test, ("x", "y")) == (("x", "y"), [1, 0], [1])


def test_names_may_include_a_class_that_the_training_split_lacks() -> None:
    assert read(["b"], ["a", "c"], ("c", "b", "a")) == (("c", "b", "a"), [1], [2, 0])


@pytest.mark.parametrize("rows", [[0, None, 1], ["a", None, "b"], [0.0, None, 1.0], [0.0, float("nan"), 1.0]])
def test_a_missing_label_is_marked(rows: list[Any]) -> None:
    assert read(rows, rows)[1:] == ([0, MISSING, 1], [0, MISSING, 1])


@pytest.mark.parametrize(
    ("train", "test", "names", "culprit"),
    [
        ([0, 1], [2], None, "2 in row 0 of split 'test[:50%]'"),
        ([0, 1], [-1], ("x", "y"), "-1 in row 0 of split 'test[:50%]'"),
        (["a", "b"], ["a", "c"], None, "'c' in row 1 of split 'test[:50%]'"),
        ([0, 1, 2], [0], ("x", "y"), "2 in row 2 of split 'train'"),
        (["x", "z"], ["x"], ("x", "y"), "'z' in row 1 of split 'train'"),
        ([0.5, 1.0], [1.0], ("x", "y"), "0.5 in row 0 of split 'train'"),
    ],
)
def test_a_label_that_is_no_class_is_an_error_with_its_row(
    train: list[Any], test: list[Any], names: tuple[str, ...] | None, culprit: str
) -> None:
    text = refusal(train, test, names)
    assert text.startswith(f"task.data.columns.label: 'label' has {culprit}; labels must be ")
    remedy = "correct the row, add the class to" if names else "set"
    assert text.endswith(f"; {remedy} task.label_names, or name another column or split")


def test_many_classes_are_not_all_listed() -> None:
    assert "a, b, c, d, e, f, g, h, ...;" in refusal([*"abcdefghij"], ["z"])


@pytest.mark.parametrize("rows", [[None, None], [[0], [1]], [b"a", b"b"]])
def test_labels_that_are_neither_numbers_nor_texts_are_refused(rows: list[Any]) -> None:
    assert refusal(rows, rows).startswith("task.data.columns.label: 'label' must hold numbers or texts, its type is")


def test_one_class_alone_can_not_be_learned() -> None:
    assert refusal(["a", "a"], ["a"]) == "task.data.columns.label: 'label' has one class only; name another column"
    with pytest.raises(ValueError, match=r"one class only; 'train\[:80%\]' is a slice: shuffle rows that are sorted"):
        read_labels(table("train[:80%]", label=["a", "a"]), table("test", label=["b"]), "label", None)


def test_two_classes_of_one_name_are_refused() -> None:
    assert refusal([0, 1], [0], ("a", "a")).startswith("task.label_names: names 'a' twice")


def test_a_column_that_one_split_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"task.data.columns.label: split 'test' has no column 'label'; columns: text"):
        read_labels(table("train", label=[0, 1]), table("test", text=["a"]), "label", None)


def test_integers_of_any_width_are_labels() -> None:
    assert read([0, 1], [1], None, Features({"label": Value("int8")})) == (("0", "1"), [0, 1], [1])


def test_names_of_a_class_label_may_be_given_in_another_order_and_keep_their_rows() -> None:
    features = Features({"label": ClassLabel(names=["neg", "pos"])})
    table = Dataset.from_dict({"label": [0, 1, 1]}, features=features)
    assert read_labels(table, table, "label", ["pos", "neg"]).train.tolist() == [1, 0, 0]
    assert read_labels(table, table, "label", ["bad", "good"]).train.tolist() == [0, 1, 1]


def test_the_label_that_a_number_is_does_not_depend_on_how_large_it_is() -> None:
    """In time and memory by rows: nothing is counted up to a number."""
    rows = [300_000_000_015, 300_000_000_731, 10_115] * 20_000
    began = process_time()
    labels = labels_of(rows, rows[:3])
    assert process_time() - began < 5
    assert labels.names == ("10115", "300000000015", "300000000731")
    assert labels.train[:3].tolist() == labels.test.tolist() == [1, 2, 0]
    (note,) = labels.notes
    assert note.startswith("'label' has 3 distinct numbers from 10115 to 300000000731, each a class of its own;")


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([-1, 1, -1, 1], ("-1", "1")),
        ([-1, 0, 1, 1], ("-1", "0", "1")),
        ([0.5, 1.5, 1.0, 0.5], ("0.5", "1.0", "1.5")),
        ([1, 3, 2, 5, 4], ("1", "2", "3", "4", "5")),
        ([10, 9, 9, 10], ("9", "10")),
        ([3.0, None, 5.0, 3.0], ("3", "5")),
        ([Decimal("0.5"), Decimal("1.5"), Decimal("1.0")], ("0.5", "1.0", "1.5")),
        (["007", "010", "007"], ("007", "010")),
        (["10", "9", "9"], ("9", "10")),
        ([date(2024, 1, 2), date(2023, 5, 6)], ("2023-05-06", "2024-01-02")),
        ([datetime(2024, 1, 2), datetime(2023, 5, 6)], ("2023-05-06", "2024-01-02")),
        ([False, True, True], ("False", "True")),
    ],
    ids=str,
)
def test_a_label_is_called_as_it_is_written_and_read_by_that_name(rows: list[Any], names: tuple[str, ...]) -> None:
    """With names given or not, in their order or another, as numbers or as texts."""
    derived = labels_of(rows, rows)
    assert derived.names == names
    places = derived.train.tolist()
    called = [None if place == MISSING else names[place] for place in places]
    assert read(rows, rows, names)[1:] == (places, places)
    assert read(called, called, names)[1:] == (places, places)
    assert read(called, called)[:2] == (names, places)
    backwards = [place if place == MISSING else len(names) - 1 - place for place in places]
    assert read(rows, rows, names[::-1])[1] == read(called, called, names[::-1])[1] == backwards


def test_whole_numbers_written_with_an_exponent_are_classes_by_their_value() -> None:
    labels = labels_of(["1e3", "-2", "5", "1e3"], ["1000"])
    assert (labels.names, labels.train.tolist(), labels.test.tolist()) == (("-2", "5", "1e3"), [2, 0, 1, 2], [2])
    assert labels.notes[0].startswith("'label' has 3 distinct numbers from -2 to 1e3, ")


@pytest.mark.parametrize("name", ["1", "01", "1.0", "+1", "1e0"])
def test_a_number_is_the_class_whose_name_has_its_value(name: str) -> None:
    for value in (1, 1.0, Decimal(1), "1", "1.00"):
        assert read([7, 2], [2], ("2", name, "7"))[1] == [2, 0]
        assert labels_of([value], [value], ("2", name, "7")).train.tolist() == [1]


def test_numbers_in_single_precision_are_those_that_were_written() -> None:
    features = Features({"label": Value("float32")})
    assert read([0.1, 2.5, 0.1], [2.5], None, features) == (("0.1", "2.5"), [0, 1, 0], [1])


def test_names_of_one_value_are_told_apart_by_text_and_never_by_number() -> None:
    assert read(["1.1", "1.10"], ["1.10"]) == (("1.1", "1.10"), [0, 1], [1])
    assert "which may be any of the classes called 1.1, 1.10;" in refusal([1.1], [1.1], ("1.1", "1.10"))


def test_digits_as_text_are_places_where_no_name_is_a_number() -> None:
    assert read(["1", "0"], ["1"], ("neg", "pos")) == (("neg", "pos"), [1, 0], [1])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([n / 7 for n in range(60)], "60 distinct numbers up to 8.42"),
        ([n // 2 * 3 for n in range(2010)], "1005 distinct numbers up to 3012"),
        (list(range(80_332)), "80332 distinct numbers up to 80331 in 80332 rows"),
        ([f"report {n}" for n in range(30)], "30 distinct texts in 30 rows"),
    ],
    ids=["measured", "counted", "numbered through", "texts"],
)
def test_a_column_of_quantities_or_of_rows_own_names_is_refused(rows: list[Any], said: str) -> None:
    text = refusal(rows, rows)
    assert f"task.data.columns.label: 'label' has {said}" in text
    assert text.endswith("; set task.label_names, or name another column")


def test_many_classes_from_0_on_are_classes() -> None:
    assert len(labels_of(list(range(2000)) * 2, [0]).names) == 2000


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("no", "yes"), [1, 0]), (("yes", "no"), [0, 1]), (("off", "on"), [1, 0]), (("n", "y"), [1, 0])],
)
def test_a_truth_value_is_the_class_that_means_it(names: tuple[str, ...], expected: list[int]) -> None:
    assert read([True, False], [True], names)[1] == expected
    assert read(["True", "False"], ["true"], names)[1] == expected


def test_a_truth_value_is_none_of_three_classes() -> None:
    assert "has the truth value True; task.label_names has a, b, c;" in refusal([True], [True], ("a", "b", "c"))
    assert "has the truth value False;" in refusal([False], [False], ("maybe", "yes"))


@pytest.mark.parametrize(
    ("own", "names", "expected"),
    [
        (("a", "b"), ("c", "b", "a"), [2, 1]),
        (("Neg", "Pos"), ("pos", "neg"), [1, 0]),
        (("a", "b", "unused"), ("b", "a"), [1, 0]),
        (("x", "y"), ("b", "a"), [0, 1]),
    ],
)
def test_names_of_a_class_label_are_read_by_name_wherever_one_is_known(
    own: tuple[str, ...], names: tuple[str, ...], expected: list[int]
) -> None:
    features = Features({"label": ClassLabel(names=list(own))})
    assert read([0, 1], [1], names, features) == (names, expected, expected[1:])


def test_names_that_are_neither_an_order_nor_a_renaming_are_refused() -> None:
    features = Features({"label": ClassLabel(names=["negative", "positive"])})
    assert "'label' has 'positive' in row 1" in refusal([0, 1], [0], ("negative", "postive"), features)
    assert "has 2 classes called negative, positive, and 3 names are given" in refusal(
        [0, 1], [0], ("a", "b", "c"), features
    )


def test_a_class_label_of_minus_one_is_a_missing_label() -> None:
    features = Features({"label": ClassLabel(names=["a", "b"])})
    assert read([0, 1], [-1, 1], None, features)[2] == [MISSING, 1]


@pytest.mark.parametrize("other", ["Click Bait ", "click bait", "Click\u00a0Bait", "Click  Bait", "\uff23lick Bait"])
def test_nearly_equal_classes_are_noted(other: str) -> None:
    (note,) = labels_of(["Click Bait", "news", other], ["news"]).notes
    assert note.startswith("classes 'Click")
    assert note.endswith(" are nearly equal; if they are one class, give it one name in the data")
    assert labels_of(["Click Bait", "news"], ["news"]).notes == ()


def test_no_note_or_error_quotes_a_long_label() -> None:
    long = "x" * 5000
    labels = labels_of([long, f"{long} ", "b"], ["b"])
    assert max(map(len, labels.notes)) < 300
    assert len(refusal(["a", "b"], [long])) < 400
    assert len(refusal(["a", "b"], ["c"], (long, "a", "b"))) < 400
