from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from fedkd_flwr.tasks.class_names import Classes, LabelNames, chosen_class, near_equal, number_of
from fedkd_flwr.tasks.text_classification import TextClassificationOptions


@pytest.mark.parametrize(
    ("chosen", "names", "expected"),
    [
        (1, ("-1", "0", "1"), "1"),
        (-1, ("-1", "0", "1"), "-1"),
        ("1", ("2", "1"), "1"),
        (2, ("2", "1"), "2"),
        (0.5, ("0.5", "1.0"), "0.5"),
        (1, ("0.5", "1.0"), "1.0"),
        (7, ("007", "010"), "007"),
        (1, ("ham", "spam"), "spam"),
        ("yes", ("maybe", "no", "yes"), "yes"),
        (True, ("False", "True"), "True"),
        (False, ("true", "false"), "false"),
        (1, ("no", "yes"), "yes"),
    ],
)
def test_a_chosen_class_follows_the_rule_by_which_labels_are_read(
    chosen: Any, names: tuple[str, ...], expected: str
) -> None:
    place = chosen_class(chosen, names, "task.positive_label")
    assert place is not None and names[place] == expected
    if not isinstance(chosen, bool):
        assert Classes(names).place(chosen) == place


@pytest.mark.parametrize(
    ("chosen", "names", "said"),
    [
        (True, ("maybe", "no", "yes"), 'quote it, as "yes"'),
        (False, ("off", "on"), 'quote it, as "off"'),
        (True, ("ham", "spam"), "(YAML reads on, true, yes so); quote it"),
        (True, ("0", "1"), "got the truth value true"),
        (3, ("-1", "0", "1"), "must be one of -1, 0, 1, got 3"),
        (2, ("ham", "spam"), "must be one of ham, spam, or 0 to 1, got 2"),
        ("eggs", ("ham", "spam"), "got 'eggs'"),
        (1, ("none", "2", "1"), "which may be the class called 1 or the class in place 1"),
        (float("nan"), ("0", "1"), "got nan"),
    ],
)
def test_a_chosen_class_that_there_is_not_is_one_line(chosen: Any, names: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        chosen_class(chosen, names, "task.positive_label")
    assert str(caught.value).startswith("task.positive_label: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def options(**changes: Any) -> TextClassificationOptions:
    return TextClassificationOptions.model_validate({"data": "x", "teacher": {"source": "y"}, **changes})


@pytest.mark.parametrize("value", [True, False, 1, 0.5, "yes", None])
def test_an_option_keeps_a_class_as_yaml_has_read_it(value: Any) -> None:
    kept = options(positive_label=value)
    again = TextClassificationOptions.model_validate(kept.model_dump())
    for found in (kept.positive_label, again.positive_label):
        assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("names", "got"),
    [
        ([False, True], "the truth value false in place 0"),
        (["no", True], "the truth value true in place 1"),
        ([7, 8], "7 in place 0"),
        (["0.5", 1.0], "1.0 in place 1"),
        (["a", None], "null in place 1"),
        (["a", ["b"]], "['b'] in place 1"),
    ],
)
def test_names_of_classes_that_yaml_reads_otherwise_are_to_be_quoted(names: list[Any], got: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(LabelNames).validate_python(names)
    (detail,) = caught.value.errors()
    assert detail["msg"] == (f'Value error, must be texts, got {got}; quote each name, as ["no", "yes"] or ["1", "2"]')


def test_a_class_is_no_list() -> None:
    with pytest.raises(ValidationError, match="must be the name of a class"):
        options(positive_label=["yes"])


def test_names_that_differ_in_case_spaces_or_digits_alone_are_nearly_equal() -> None:
    assert near_equal(["a", "b", "A ", "7", "07", "7.5"]) == [("7", "07"), ("a", "A ")]
    assert near_equal(["1.1", "1.2", "x y", "xy"]) == []


@pytest.mark.parametrize(
    ("text", "number"),
    [("12", 12), ("-0.5", -0.5), ("1e3", 1000), ("0x1", None), ("1_000", None), ("nan", None), ("\u0663", None)],
)
def test_a_number_is_written_in_plain_digits(text: str, number: float | None) -> None:
    assert number_of(text) == number
