"""Scores of a model on examples: classes, entities, rankings. Definitions are scikit-learn's where it has them."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import nn

from fedkd_flwr.core.losses import NO_LABEL
from fedkd_flwr.core.predictions import Numbers, Predictions
from fedkd_flwr.core.protocols import Examples, Range, Task

EVALUATION_BATCH = 256

# What the scores below may be; see `Task.metrics`. A loss in nats: that of guessing among a million classes is 14, and
# beyond the bound a model has diverged, whose mean with others would say nothing.
SHARE: Range = (0.0, 1.0)
LOSS: Range = (0.0, 1e6)
CLASSIFICATION_METRICS: dict[str, Range] = {
    **dict.fromkeys(("f1", "accuracy", "macro_f1", "precision", "recall"), SHARE),
    "loss": LOSS,
}
ENTITY_METRICS: dict[str, Range] = {**dict.fromkeys(("f1", "precision", "recall", "accuracy"), SHARE), "loss": LOSS}
RANKING_METRICS: dict[str, Range] = {**dict.fromkeys(("auc", "mrr", "ndcg_5", "ndcg_10"), SHARE), "loss": LOSS}

Span = tuple[int, int, str]


def predict(task: Task, model: nn.Module, examples: Examples) -> Predictions:
    """What a model says of examples that have one label each, or one for each of several positions.

    Positions without a label are left out.
    """
    model.eval()
    found: list[Numbers] = []
    labels: list[Numbers] = []
    with torch.inference_mode():
        for batch in examples.batches(EVALUATION_BATCH):
            out = task.forward(model, batch, hidden_states=False, attentions=False)
            of_batch, expected = out.logits.log_softmax(dim=-1).cpu().numpy(), out.labels.cpu().numpy()
            if expected.ndim == 1:
                found.extend(of_batch)
                labels.extend(expected)
                continue
            kept = expected != NO_LABEL
            found.extend(of_one[mask] for of_one, mask in zip(of_batch, kept, strict=True))
            labels.extend(of_one[mask] for of_one, mask in zip(expected, kept, strict=True))
    return Predictions(found, labels)


def classification_scores(predictions: Predictions, positive: int | None = None) -> dict[str, float]:
    """Scores of a task with one label for each example, the one to compare runs by first.

    Args:
        predictions: of at least one example.
        positive: class whose F1, precision and recall are wanted; they are absent where no example has it, because
            there is nothing to find, and 0 where the model finds nothing.

    Returns:
        f1, precision, recall of the positive class; accuracy, macro_f1 (over the classes that occur), in [0, 1]; loss,
        the mean cross-entropy in nats, every class counted alike.
    """
    found, truth = np.stack(list(predictions.log_probabilities)), np.stack(list(predictions.labels))
    loss = -float(found[np.arange(len(truth)), truth].mean(dtype=np.float64))
    return class_scores(truth, found.argmax(axis=-1), positive) | {"loss": loss}


def class_scores(truth: Numbers, predicted: Numbers, positive: int | None = None) -> dict[str, float]:
    """Scores of predicted classes; see `classification_scores`. Both arrays are [examples]."""
    # Imported here: it takes a second, and a client that says who it is scores nothing.
    from sklearn.metrics import f1_score, precision_recall_fscore_support

    scores = {
        "accuracy": float((truth == predicted).mean()),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
    }
    if positive is None or not (truth == positive).any():
        return scores
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth == positive, predicted == positive, average="binary", zero_division=0
    )
    return {"f1": float(f1)} | scores | {"precision": float(precision), "recall": float(recall)}


def entity_spans(tags: Sequence[str]) -> set[Span]:
    """Entities of a sentence in IOB2 tags: (first word, word after the last, type).

    An I- that follows no tag of its type begins an entity, as in the CoNLL evaluation.
    """
    spans: set[Span] = set()
    begin, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, of = tag.partition("-")
        if kind and (prefix != "I" or of != kind):
            spans.add((begin, place, kind))
            kind = ""
        if prefix in ("B", "I") and not kind:
            begin, kind = place, of
    return spans


def entity_scores(truth: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> dict[str, float]:
    """Entity-level F1, precision and recall over all sentences: an entity counts if its words and its type are right.

    All are 1 where there is no entity on either side, 0 where there is on one only.
    """
    found = expected = right = 0
    for of_truth, of_prediction in zip(truth, predicted, strict=True):
        a, b = entity_spans(of_truth), entity_spans(of_prediction)
        expected, found, right = expected + len(a), found + len(b), right + len(a & b)
    if expected == found == 0:
        return {"f1": 1.0, "precision": 1.0, "recall": 1.0}
    return {
        "f1": 2 * right / (expected + found),
        "precision": right / found if found else 0.0,
        "recall": right / expected if expected else 0.0,
    }


def ranking_scores(labels: Sequence[Numbers], scores: Sequence[Numbers]) -> dict[str, float]:
    """AUC, MRR, nDCG@5 and nDCG@10, each the mean over impressions, as the MIND evaluation defines them.

    MRR is the sum of 1 / rank over the clicked candidates divided by their number; gains of nDCG are 2**label - 1.
    Candidates of equal score share the mean of their places, so the order in which they were shown decides nothing.

    Args:
        labels: for each impression [candidates], 1 where clicked; impressions with clicks on all or none say nothing
            and are left out.
        scores: likewise, the higher the better.

    Raises:
        ValueError: if no impression can be scored.
    """
    rows = [
        (_auc(y, s), _mean_reciprocal_rank(y, s), _ndcg(y, s, 5), _ndcg(y, s, 10))
        for y, s in zip(labels, scores, strict=True)
        if 0 < y.sum() < len(y)
    ]
    if not rows:
        raise ValueError("no impression has both clicked and other candidates")
    means = np.mean(rows, axis=0)
    return dict(zip(("auc", "mrr", "ndcg_5", "ndcg_10"), map(float, means), strict=True))


def _expected(values_by_place: Numbers, scores: Numbers) -> Numbers:
    """For each candidate, the mean of a value of the places over which candidates of its score may lie."""
    _, group = np.unique(-scores, return_inverse=True)
    sums = np.bincount(group[np.argsort(-scores, kind="stable")], values_by_place)
    shared: Numbers = (sums / np.bincount(group))[group]
    return shared


def _auc(labels: Numbers, scores: Numbers) -> float:
    """Area under the ROC curve by ranks (Mann and Whitney's U); scikit-learn's takes 17 times as long for so few."""
    clicked = labels > 0
    num_clicked, num_others = int(clicked.sum()), int((~clicked).sum())
    places = _expected(np.arange(len(scores), dtype=float), scores)[clicked].sum()
    return float(1.0 - (places - num_clicked * (num_clicked - 1) / 2) / (num_clicked * num_others))


def _mean_reciprocal_rank(labels: Numbers, scores: Numbers) -> float:
    reciprocal = _expected(1.0 / np.arange(1, len(scores) + 1), scores)
    return float((reciprocal * labels).sum() / labels.sum())


def _ndcg(labels: Numbers, scores: Numbers, k: int) -> float:
    discounts = 1.0 / np.log2(np.arange(2, len(scores) + 2))
    discounts[k:] = 0.0
    gains = 2.0**labels - 1.0
    best = float((np.sort(gains)[::-1] * discounts).sum())
    return float((gains * _expected(discounts, scores)).sum()) / best
