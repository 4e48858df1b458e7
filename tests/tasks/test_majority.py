"""What always giving the same answer scores, by each task's own rule."""

from pathlib import Path
from typing import Any

import pytest

from fedkd_flwr.core.protocols import Task
from fedkd_flwr.tasks.digits import DigitsOptions
from fedkd_flwr.tasks.majority import majority_of
from fedkd_flwr.tasks.text_classification import TextClassificationOptions
from fedkd_flwr.tasks.token_classification import TokenClassificationOptions
from tests.tasks.conftest import write_splits

pytestmark = pytest.mark.usefixtures("offline")

# 15 of 20 to learn from are of class "fine", 6 of 10 to score on.
TRAIN = {"text": [f"the drug {n}" for n in range(20)], "label": ["fine"] * 15 + ["rash"] * 5}
TEST = {"text": [f"a help {n}" for n in range(10)], "label": ["fine"] * 6 + ["rash"] * 4}


def texts(folder: Path, bert: Path, **changes: Any) -> Task:
    data = write_splits(folder, TRAIN, TEST)
    options = {"data": data, "teacher": {"source": str(bert)}, "max_length": 16, **changes}
    return TextClassificationOptions.model_validate(options).build(2, 0)


def test_the_largest_class_of_the_training_texts_is_scored_on_the_test_texts(tmp_path: Path, tiny_bert: Path) -> None:
    found = majority_of(texts(tmp_path, tiny_bert))
    assert found is not None and found.share is not None
    assert (found.label, found.num_classes) == ("fine", 2)
    assert found.share == pytest.approx(0.75, abs=0.1)  # of what is learned from
    assert found.scores == {"accuracy": 0.6, "macro_f1": pytest.approx(0.375)}


@pytest.mark.parametrize(("positive", "f1"), [("rash", 0.0), ("fine", 0.75)])
def test_the_positive_class_has_its_f1(positive: str, f1: float, tmp_path: Path, tiny_bert: Path) -> None:
    found = majority_of(texts(tmp_path, tiny_bert, positive_label=positive))
    assert found is not None
    assert next(iter(found.scores.items())) == ("f1", pytest.approx(f1))


def test_of_entities_it_is_that_there_are_none(tmp_path: Path, tiny_bert: Path) -> None:
    rows = {"tokens": [["the", "drug", "did", "help"]] * 8, "ner_tags": [["O", "B-Drug", "O", "O"]] * 8}
    options = {"data": write_splits(tmp_path, rows, rows), "teacher": {"source": str(tiny_bert)}, "max_length": 16}
    found = majority_of(TokenClassificationOptions.model_validate(options).build(2, 0))
    assert found is not None
    assert (found.label, found.share, found.scores["f1"], found.scores["accuracy"]) == ("O, no entity", None, 0.0, 0.75)


def test_of_digits_it_is_a_tenth() -> None:
    found = majority_of(DigitsOptions().build(3, 0))
    assert found is not None
    assert found.scores["accuracy"] == pytest.approx(0.1, abs=0.02)
    assert set(found.scores) == {"accuracy", "macro_f1"}  # it gives no probabilities, so there is no loss


def test_where_labels_are_no_classes_or_lie_on_nodes_there_is_none(tmp_path: Path, tiny_bert: Path) -> None:
    own = texts(tmp_path, tiny_bert, partition={"name": "own"}, label_names=["fine", "rash"])
    assert majority_of(own) is None
    pytest.importorskip("gymnasium")
    from fedkd_flwr.tasks.cartpole import CartPoleOptions

    assert majority_of(CartPoleOptions().build(2, 0)) is None
