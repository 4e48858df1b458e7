import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, ndcg_score, precision_score, recall_score, roc_auc_score

from fedkd_flwr.tasks.scores import class_scores, entity_scores, entity_spans, ranking_scores


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_class_scores_are_those_of_scikit_learn(num_classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(num_classes, size=(2, 40))
    scores = class_scores(truth, predicted, positive=1)
    one = {"labels": [1], "average": "macro"}
    assert scores == pytest.approx(
        {
            "f1": f1_score(truth, predicted, **one),
            "accuracy": accuracy_score(truth, predicted),
            "macro_f1": f1_score(truth, predicted, average="macro"),
            "precision": precision_score(truth, predicted, **one),
            "recall": recall_score(truth, predicted, **one),
        }
    )


def test_the_score_to_compare_runs_by_comes_first() -> None:
    truth = np.array([0, 1])
    assert next(iter(class_scores(truth, truth))) == "accuracy"
    assert next(iter(class_scores(truth, truth, positive=1))) == "f1"


def test_a_positive_class_that_no_example_has_is_not_scored() -> None:
    assert class_scores(np.array([0, 0]), np.array([0, 1]), positive=1).keys() == {"accuracy", "macro_f1"}


def test_a_positive_class_that_is_never_found_scores_nothing() -> None:
    scores = class_scores(np.array([0, 1]), np.array([0, 0]), positive=1)
    assert (scores["f1"], scores["precision"], scores["recall"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("", set()),
        ("O O", set()),
        ("B-X", {(0, 1, "X")}),
        ("O B-X I-X O", {(1, 3, "X")}),
        ("B-X I-X I-X", {(0, 3, "X")}),  # goes on to the end of the sentence
        ("B-X B-X", {(0, 1, "X"), (1, 2, "X")}),
        ("B-X I-X B-X O", {(0, 2, "X"), (2, 3, "X")}),  # B after I
        ("O I-X I-X O", {(1, 3, "X")}),  # I without B
        ("I-X", {(0, 1, "X")}),
        ("B-X I-Y I-Y", {(0, 1, "X"), (1, 3, "Y")}),  # another type
        ("B-X O I-X", {(0, 1, "X"), (2, 3, "X")}),
        ("B-a-b I-a-b", {(0, 2, "a-b")}),
    ],
)
def test_entities_of_a_sentence(tags: str, spans: set[tuple[int, int, str]]) -> None:
    assert entity_spans(tags.split()) == spans


@pytest.mark.parametrize(
    ("truth", "predicted", "scores"),
    [
        ("B-X I-X O", "B-X I-X O", (1, 1, 1)),
        ("B-X I-X O", "B-X O O", (0, 0, 0)),  # half of an entity is none
        ("B-X I-X O", "B-Y I-Y O", (0, 0, 0)),
        ("B-X O B-Y", "B-X O O", (2 / 3, 1, 1 / 2)),
        ("B-X O O", "B-X O B-X", (2 / 3, 1 / 2, 1)),
        ("B-X O", "O O", (0, 0, 0)),
        ("O O", "B-X O", (0, 0, 0)),
        ("O O", "O O", (1, 1, 1)),
        ("", "", (1, 1, 1)),
    ],
)
def test_an_entity_counts_if_its_words_and_its_type_are_right(
    truth: str, predicted: str, scores: tuple[float, float, float]
) -> None:
    f1, precision, recall = scores
    found = entity_scores([truth.split()], [predicted.split()])
    assert found == pytest.approx({"f1": f1, "precision": precision, "recall": recall})


def test_entities_are_counted_over_all_sentences_and_not_from_one_to_the_next() -> None:
    truth = [["O", "B-X"], ["I-X", "O"], []]
    assert entity_scores(truth, [["O", "B-X"], ["O", "O"], []]) == {"f1": 2 / 3, "precision": 1.0, "recall": 0.5}


def test_no_sentences_at_all_have_no_entity_to_miss() -> None:
    assert entity_scores([], [])["f1"] == 1.0


def test_as_many_sentences_must_be_predicted_as_there_are() -> None:
    with pytest.raises(ValueError):
        entity_scores([["O"]], [])


def numbers(*values: float) -> np.ndarray:
    return np.array(values)


@pytest.mark.parametrize(
    ("labels", "scores", "mrr", "ndcg_5"),
    [
        ((1, 0, 0), (3.0, 2.0, 1.0), 1.0, 1.0),
        ((0, 1, 0), (3.0, 2.0, 1.0), 1 / 2, 1 / math.log2(3)),
        ((0, 1, 1), (3.0, 2.0, 1.0), (1 / 2 + 1 / 3) / 2, (1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3))),
        ((1, 0), (1.0, 1.0), (1 + 1 / 2) / 2, (1 + 1 / math.log2(3)) / 2),  # a tie
        ((0, 0, 0, 0, 0, 1), (6.0, 5.0, 4.0, 3.0, 2.0, 1.0), 1 / 6, 0.0),  # beyond the fifth place
    ],
)
def test_rankings_computed_by_hand(
    labels: tuple[int, ...], scores: tuple[float, ...], mrr: float, ndcg_5: float
) -> None:
    found = ranking_scores([numbers(*labels)], [numbers(*scores)])
    assert (found["mrr"], found["ndcg_5"]) == pytest.approx((mrr, ndcg_5))


def test_the_score_of_rankings_is_their_mean() -> None:
    labels = [numbers(1, 0), numbers(0, 1)]
    scores = [numbers(2, 1), numbers(2, 1)]
    assert ranking_scores(labels, scores) == pytest.approx(
        {"auc": 0.5, "mrr": 0.75, "ndcg_5": (1 + 1 / math.log2(3)) / 2, "ndcg_10": (1 + 1 / math.log2(3)) / 2}
    )


def test_impressions_with_clicks_on_all_or_none_are_left_out() -> None:
    labels = [numbers(1, 0), numbers(0, 0), numbers(1, 1)]
    scores = [numbers(2, 1)] * 3
    assert ranking_scores(labels, scores) == {"auc": 1.0, "mrr": 1.0, "ndcg_5": 1.0, "ndcg_10": 1.0}
    with pytest.raises(ValueError, match="no impression has both"):
        ranking_scores(labels[1:], scores[1:])


impressions = st.integers(2, 14).flatmap(
    lambda size: st.tuples(
        st.lists(st.booleans(), min_size=size, max_size=size).filter(lambda clicked: 0 < sum(clicked) < len(clicked)),
        st.lists(st.integers(0, 4), min_size=size, max_size=size),  # few values: many ties
    )
)


@settings(max_examples=30, deadline=None)
@given(impressions)
def test_auc_and_ndcg_are_those_of_scikit_learn(impression: tuple[list[bool], list[int]]) -> None:
    labels, scores = np.array(impression[0], int), np.array(impression[1], float)
    found = ranking_scores([labels], [scores])
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores))
    for k in (5, 10):
        assert found[f"ndcg_{k}"] == pytest.approx(ndcg_score(labels[None], scores[None], k=k))


@settings(max_examples=30, deadline=None)
@given(impressions, st.integers(0, 99))
def test_the_order_in_which_candidates_were_shown_decides_nothing(
    impression: tuple[list[bool], list[int]], seed: int
) -> None:
    labels, scores = np.array(impression[0], int), np.array(impression[1], float)
    order = np.random.default_rng(seed).permutation(len(labels))
    assert ranking_scores([labels[order]], [scores[order]]) == pytest.approx(ranking_scores([labels], [scores]))


def test_inputs_stay_as_they_were() -> None:
    labels, scores = numbers(0, 1, 0), numbers(1, 1, 2)
    ranking_scores([labels], [scores])
    assert labels.tolist() == [0, 1, 0]
    assert scores.tolist() == [1, 1, 2]
