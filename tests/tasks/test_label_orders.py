"""The same rows and the same checkpoint, whatever order each of them has the classes in."""

from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from fedkd_flwr.core.protocols import score_of
from fedkd_flwr.tasks.image_classification import ImageClassificationOptions
from fedkd_flwr.tasks.labels import read_labels
from fedkd_flwr.tasks.text_classification import TextClassificationOptions
from fedkd_flwr.tasks.token_classification import TokenClassificationOptions
from tests.tasks import image_data
from tests.tasks.conftest import PIECES, SPECIAL, write_table, write_tokenizer

pytestmark = pytest.mark.usefixtures("offline")

NAMES = ("bad", "drug", "good")
ORDERS = list(permutations(NAMES))
TEXTS = [f"{start} {kind} {end}" for start, kind, end in product(("the", "so"), NAMES, ("fever", "help", "it"))]
TRUE = [next(name for name in NAMES if name in text) for text in TEXTS]
TAGS = ("O", "B-X", "I-X")
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
TURNED = (NAMES, ("drug", "good", "bad"))  # no exchange of two: its own inverse would hide a mistake


def features_of(order: Sequence[str]) -> Features:
    return Features({"text": Value("string"), "label": ClassLabel(names=list(order))})


def rows_of(texts: Sequence[str], true: Sequence[str], order: Sequence[str]) -> dict[str, list[Any]]:
    return {"text": list(texts), "label": [list(order).index(name) for name in true]}


def test_a_row_has_its_class_in_every_order_of_both_files_and_of_the_names() -> None:
    """The library calls the test split's numbers as it does those of the training split."""
    tables = {
        (split, order, called): Dataset.from_dict(rows_of(TEXTS, TRUE, order), features_of(called), split=split)
        for split, order, called in product(("train", "test"), ORDERS, ORDERS)
        if split == "test" or order == called
    }
    for of_train, of_test, names in product(ORDERS, ORDERS, (None, *ORDERS)):
        train, test = tables["train", of_train, of_train], tables["test", of_test, of_train]
        labels = read_labels(train, test, "label", names, stored=(of_train, of_test))
        assert labels.names == (names or of_train)
        for rows in (labels.train, labels.test):
            assert [labels.names[place] for place in rows] == TRUE


def shuffled(model: Any, head: Any, names: Sequence[str], order: Sequence[str], folder: Path) -> str:
    """A checkpoint that says the same, its head's rows in another order."""
    places = [list(names).index(name) for name in order]
    with torch.no_grad():
        weight, bias = head.weight.clone(), head.bias.clone()
        head.weight.copy_(weight[places])
        head.bias.copy_(bias[places])
    model.config.id2label = dict(enumerate(order))
    model.config.label2id = {name: place for place, name in enumerate(order)}
    model.save_pretrained(folder)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return str(folder)


def drawn(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return model.eval()


def said(task: Any, model: Any, names: Sequence[str], order: Sequence[str]) -> Any:
    """Log-probabilities of the classes in one order, for each test row or word."""
    predictions = task.predict(model, task.test_data())
    places = [list(names).index(name) for name in order]
    return np.concatenate([np.atleast_2d(row) for row in predictions.log_probabilities])[:, places]


def require_alike(found: Sequence[Any], scores: Sequence[dict[str, float]]) -> None:
    assert len({round(float(value), 4) for value in found[0][0]}) == 3  # classes that can be told apart
    for other, score in zip(found, scores, strict=True):
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-4)
        assert score == pytest.approx(scores[0], abs=1e-4)


def test_a_text_classifier_says_the_same_in_every_order(tmp_path: Path) -> None:
    vocab_size = len(SPECIAL) + len(PIECES)
    model = drawn(BertForSequenceClassification, BertConfig(vocab_size=vocab_size, num_labels=3, **SIZES))
    sources = [shuffled(model, model.classifier, NAMES, order, tmp_path / f"m{n}") for n, order in enumerate(TURNED)]
    for source in sources:
        write_tokenizer(Path(source))
    for split, order, part in (("train", TURNED[0], slice(None)), ("test", TURNED[1], slice(1, None, 2))):
        rows = rows_of(TEXTS[part], TRUE[part], order)
        write_table(tmp_path / "data" / f"{split}.parquet", rows, features_of(order))
    found, scores = [], []
    for (first, second), names in product((sources, sources[::-1]), (None, ("good", "drug", "bad"))):
        other = {"clients": [0], "model": {"source": first}}
        models = {"teacher": {"source": first}, "other_teachers": [other]}
        models["student"] = {"name": "transformers", "source": second}
        chosen = {"data": str(tmp_path / "data"), "label_names": names, "max_length": 16, "positive_label": "drug"}
        task = TextClassificationOptions.model_validate(chosen | models).build(2, 0)
        built = task.build_models(0)
        for model in (built.teacher, built.student, *built.other_teachers):
            found.append(said(task, model, task.data_report().label_names, NAMES))
            scores.append(score_of(task, model, task.test_data()))
            assert tuple(model.config.id2label.values()) == (names or NAMES)
    require_alike(found, scores)


Orders = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...] | None]


def class_of(pieces: Sequence[int]) -> str:
    """The class of a text, which is a word in it."""
    return next(name for name in NAMES if len(SPECIAL) + PIECES.index(name) in pieces)


def require_same_predictions(heads: Sequence[Sequence[str]], combined: Sequence[Orders], folder: Path) -> None:
    """A row is learned, weighed and predicted as the same class.

    Args:
        heads: orders of one checkpoint's head.
        combined: orders of the training split, the test split and the names that are given; of each a task is made.
        folder: for files.
    """
    vocab_size = len(SPECIAL) + len(PIECES)
    model = drawn(BertForSequenceClassification, BertConfig(vocab_size=vocab_size, num_labels=3, **SIZES))
    sources = [shuffled(model, model.classifier, NAMES, order, folder / f"m{n}") for n, order in enumerate(heads)]
    write_tokenizer(Path(sources[0]))
    others = [{"clients": [client], "model": {"source": source}} for client, source in enumerate(sources[1:])]
    models = {"teacher": {"source": sources[0]}, "other_teachers": others, "tokenizer": sources[0]}
    found, scores = [], []
    for of_train, of_test, names in combined:
        data = folder / "-".join(order[0] + order[1] for order in (of_train, of_test))
        if not data.exists():
            # Of some classes more rows than of others, so that a class in another's place is noticed.
            for split, order, part in (("train", of_train, slice(4, None)), ("test", of_test, slice(0, 7))):
                write_table(data / f"{split}.parquet", rows_of(TEXTS[part], TRUE[part], order), features_of(order))
        order = names or of_train
        weights = [float(1 + NAMES.index(name)) for name in order]
        chosen = {"data": str(data), "label_names": names, "max_length": 16, "positive_label": "drug"}
        task = TextClassificationOptions.model_validate(chosen | {"class_weights": weights} | models).build(6, 0)
        built = task.build_models(0)
        for teacher in (built.teacher, *built.other_teachers):
            found.append(said(task, teacher, order, NAMES))
            scores.append(score_of(task, teacher, task.test_data()))
        for examples in (task.client_data(0).train, task.test_data()):
            batch = next(iter(examples.batches(7)))
            assert [order[place] for place in batch["labels"]] == list(map(class_of, batch["input_ids"].tolist()))
            outputs = task.forward(built.teacher, batch, hidden_states=False, attentions=False)
            assert outputs.class_weights is not None
            assert outputs.class_weights.tolist() == weights
    require_alike(found, scores)


def test_predictions_are_the_same_in_orders_of_every_kind(tmp_path: Path) -> None:
    """Each order of each file and of the names at least once, with three orders of the checkpoint."""
    every: list[tuple[str, ...] | None] = [None, *ORDERS]
    combined = [(ORDERS[n % 6], ORDERS[(5 * n + 2) % 6], names) for n, names in enumerate(every)]
    require_same_predictions(ORDERS[::2], combined, tmp_path)


@pytest.mark.nightly
def test_predictions_are_the_same_in_the_product_of_all_orders(tmp_path: Path) -> None:
    require_same_predictions(ORDERS, list(product(ORDERS, ORDERS, (None, *ORDERS))), tmp_path)


def test_tags_of_words_are_the_same_in_every_order(tmp_path: Path) -> None:
    vocab_size = len(SPECIAL) + len(PIECES)
    model = drawn(BertForTokenClassification, BertConfig(vocab_size=vocab_size, num_labels=3, **SIZES))
    turned = (TAGS, ("I-X", "O", "B-X"))
    sources = [shuffled(model, model.classifier, TAGS, order, tmp_path / f"m{n}") for n, order in enumerate(turned)]
    for source in sources:
        write_tokenizer(Path(source))
    words = [text.split() for text in TEXTS]
    tags = [["O" if word in ("the", "so") else "B-X" if word in NAMES else "I-X" for word in row] for row in words]
    for split, order in zip(("train", "test"), turned, strict=True):
        features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=list(order)))})
        rows = {"tokens": words, "ner_tags": [[order.index(tag) for tag in row] for row in tags]}
        write_table(tmp_path / "data" / f"{split}.parquet", rows, features)
    found, scores = [], []
    for source, names in product(sources, (None, turned[1])):
        chosen = {"data": str(tmp_path / "data"), "teacher": {"source": source}, "label_names": names, "max_length": 16}
        task = TokenClassificationOptions.model_validate(chosen).build(2, 0)
        teacher = task.build_models(0).teacher
        found.append(said(task, teacher, names or TAGS, TAGS))
        scores.append(score_of(task, teacher, task.test_data()))
    require_alike(found, scores)


def test_an_image_classifier_says_the_same_in_every_order(tmp_path: Path) -> None:
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    model = drawn(ResNetForImageClassification, ResNetConfig(num_labels=3, num_channels=1, **sizes))
    head = model.classifier[1]
    sources = [shuffled(model, head, NAMES, order, tmp_path / f"m{n}") for n, order in enumerate(TURNED)]
    for split, order, count in (("train", TURNED[0], 18), ("test", TURNED[1], 9)):
        rows = image_data.rows(count, first=100 * count)
        kept = {"image": rows["image"], "label": [order.index(NAMES[label]) for label in rows["label"]]}
        features = Features({"image": image_data.ImageFeature(), "label": ClassLabel(names=list(order))})
        write_table(tmp_path / "data" / f"{split}.parquet", kept, features)
    found, scores = [], []
    for source, names in product(sources, (None, TURNED[1])):
        models = {"teacher": {"source": source}, "student": {"source": source}}
        chosen = {"data": str(tmp_path / "data"), "channels": 1, "label_names": names, **models}
        task = ImageClassificationOptions.model_validate(chosen).build(2, 0)
        teacher = task.build_models(0).teacher
        found.append(said(task, teacher, task.data_report().label_names, NAMES))
        scores.append(score_of(task, teacher, task.test_data()))
    require_alike(found, scores)
