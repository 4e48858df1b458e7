import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Value
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from fedkd_flwr.core.losses import DistillationTerms, Side, attention_mse, hidden_mse, own_loss, task_loss
from fedkd_flwr.core.protocols import Batch, Examples, Models, Outputs, Task, score_of
from fedkd_flwr.tasks.text_classification import TextClassification, TextClassificationOptions
from tests.tasks.conftest import BEGIN, END, PAD, UNKNOWN, one_round, state, write_splits, write_tokenizer

pytestmark = pytest.mark.usefixtures("offline")

KINDS = ("good", "bad", "drug")
# All different, of 3 to 7 pieces; the class is the kind that a text names.
TEXTS = [
    f"{start} {kind} {end}"
    for start, kind, end in product(
        ("the", "a", "so", "it was very"), KINDS, ("fever", "help", "patients", ".", "did help")
    )
]
LABELS = [next(label for label, kind in enumerate(KINDS) if kind in text) for text in TEXTS]
ROWS = {"text": TEXTS, "label": LABELS}
TEST = {"text": [f"so , {text}" for text in TEXTS[::2]], "label": LABELS[::2]}


def options(data: str | dict[str, Any], bert: Path, **changes: Any) -> TextClassificationOptions:
    chosen = {"data": data, "teacher": {"source": str(bert)}, "max_length": 32, **changes}
    return TextClassificationOptions.model_validate(chosen)


def build(data: str | dict[str, Any], bert: Path, num_clients: int = 3, **changes: Any) -> TextClassification:
    return options(data, bert, **changes).build(num_clients, 0)


def refusal(data: str | dict[str, Any], bert: Path, **changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        build(data, bert, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_splits(tmp_path / "data", ROWS, TEST)


def batch_of(examples: Examples, size: int | None = None, seed: int | None = None) -> Batch:
    return next(iter(examples.batches(size or len(examples), seed)))


def rows_of(examples: Examples, size: int = 1000, seed: int | None = None) -> list[tuple[tuple[int, ...], int]]:
    """Each example's pieces without padding, and its label."""
    return [
        (tuple(ids[: int(mask.sum())].tolist()), int(label))
        for batch in examples.batches(size, seed)
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]


def pieces(bert: Path, *texts: str) -> tuple[int, ...]:
    return tuple(AutoTokenizer.from_pretrained(bert)(*texts)["input_ids"])


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_one_task_may_be_kept_in_any_format(suffix: str, data: str, tiny_bert: Path, tmp_path: Path) -> None:
    parquet = build(data, tiny_bert)
    other = build(write_splits(tmp_path / suffix, ROWS, TEST, suffix), tiny_bert)
    for client in range(3):
        expected, found = (task.client_data(client) for task in (parquet, other))
        assert rows_of(found.train) == rows_of(expected.train)
        assert rows_of(found.test) == rows_of(expected.test)
    assert rows_of(other.test_data()) == rows_of(parquet.test_data())
    assert other.data_report() == parquet.data_report()


def test_a_text_is_its_word_pieces_and_a_label(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_splits(tmp_path, {"text": ["Aspirin zebra", "a", "a", "a"], "label": [1, 0, 0, 0]}, TEST)
    task = build(data, tiny_bert, num_clients=2, label_names=["a", "b", "c"])
    (ids,) = [ids for client in range(2) for side in both(task, client) for ids, label in rows_of(side) if label == 1]
    names = AutoTokenizer.from_pretrained(tiny_bert).convert_ids_to_tokens(ids)
    assert names == ["[CLS]", "as", "##pir", "##in", "[UNK]", "[SEP]"]
    assert (ids[0], ids[-2], ids[-1]) == (BEGIN, UNKNOWN, END)


def both(task: Task, client: int) -> tuple[Examples, Examples]:
    data = task.client_data(client)
    return data.train, data.test


def test_each_client_holds_its_own_rows_only_and_together_they_hold_all(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert)
    held = [row for client in range(3) for side in both(task, client) for row in rows_of(side)]
    expected = [(pieces(tiny_bert, text), label) for text, label in zip(TEXTS, LABELS, strict=True)]
    assert len(set(expected)) == len(expected)
    assert sorted(held) == sorted(expected)
    counts = [Counter(label for _, label in rows_of(task.client_data(client).train)) for client in range(3)]
    report = task.data_report()
    assert report.label_names == ("0", "1", "2")
    assert report.label_counts == tuple(tuple(mine[label] for label in range(3)) for mine in counts)


def test_the_servers_examples_are_the_test_split(data: str, tiny_bert: Path) -> None:
    expected = [(pieces(tiny_bert, text), label) for text, label in zip(TEST["text"], TEST["label"], strict=True)]
    assert sorted(rows_of(build(data, tiny_bert).test_data())) == sorted(expected)


def test_columns_may_have_any_name(tiny_bert: Path, tmp_path: Path, data: str) -> None:
    named = [
        {"sentence": rows["text"], "verdict": rows["label"], "text": ["?"] * len(rows["text"])} for rows in (ROWS, TEST)
    ]
    other = write_splits(tmp_path / "other", *named)
    task = build({"source": other, "columns": {"text": "sentence", "label": "verdict"}}, tiny_bert)
    assert rows_of(task.test_data()) == rows_of(build(data, tiny_bert).test_data())


@pytest.mark.parametrize("key", ["text", "label", "text_pair"])
def test_a_column_that_is_missing_is_an_error_with_its_option(key: str, data: str, tiny_bert: Path) -> None:
    text = refusal({"source": data, "columns": {key: "nothing"}}, tiny_bert)
    assert text == f"task.data.columns.{key}: split 'train' has no column 'nothing'; columns: text, label"


def test_a_text_must_be_text(data: str, tiny_bert: Path) -> None:
    text = refusal({"source": data, "columns": {"text": "label"}}, tiny_bert)
    assert text.startswith("task.data.columns.text: 'label' of split 'train' holds no texts but ")


def test_pairs_of_texts_are_read_as_two_segments(tiny_bert: Path, tmp_path: Path) -> None:
    rows = {"text": ["the drug", "good", "bad", "a"], "why": ["help", "", "harm . fever", None], "label": [0, 1, 0, 1]}
    source = {"source": write_splits(tmp_path, rows, rows), "columns": {"text_pair": "why"}}
    task = build(source, tiny_bert, num_clients=1)
    batch = batch_of(task.test_data())
    assert rows_of(task.test_data()) == [
        (pieces(tiny_bert, "the drug", "help"), 0),
        (pieces(tiny_bert, "bad", "harm . fever"), 0),
    ]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert task.data_report().notes[0] == (
        "split 'train': 2 of 4 rows are left out: 2 have an empty second text (the first is row 1 of 'train.parquet')"
    )


def test_long_texts_are_cut(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert, max_length=4)
    assert {len(ids) for ids, _ in rows_of(task.test_data())} == {4}
    assert {(ids[0], ids[-1]) for ids, _ in rows_of(task.test_data())} == {(BEGIN, END)}


def test_texts_that_reach_the_longest_length_are_noted(tiny_bert: Path, tmp_path: Path) -> None:
    rows = {"text": ["so good", "so very good", "so very very good", ""] * 4, "label": [0, 0, 1, 1] * 4}
    task = build(write_splits(tmp_path, rows, {"text": ["so"], "label": [0]}), tiny_bert, 2, max_length=5)
    assert task.data_report().notes[1:2] == (
        "split 'train': 8 of 12 texts reach task.max_length (5); what is longer is cut",
    )


def test_a_tokenizer_that_names_no_mask_makes_one_all_the_same(tiny_bert: Path, data: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "maskless")
    settings = tmp_path / "maskless" / "tokenizer_config.json"
    names = json.loads(settings.read_text()) | {"model_input_names": ["input_ids"]}
    settings.write_text(json.dumps(names))
    teacher = {"config": {"model_type": "bert", "vocab_size": 99}}
    task = build(data, tiny_bert, teacher=teacher, tokenizer=str(tmp_path / "maskless"))
    batch = batch_of(task.test_data())
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert torch.equal(batch["attention_mask"] == 1, batch["input_ids"] != PAD)
    assert rows_of(task.test_data()) == rows_of(build(data, tiny_bert).test_data())


def test_code_that_comes_with_a_tokenizer_is_not_run(data: str, tiny_bert: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "own")
    (tmp_path / "own" / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n")
    settings = tmp_path / "own" / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "code.Own"]}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | own))
    assert refusal(data, tiny_bert, tokenizer=str(tmp_path / "own")).startswith("task.tokenizer.source: ")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json"])
def test_rows_without_a_text_or_a_label_are_reported_and_not_used(suffix: str, tiny_bert: Path, tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {name: list(column) for name, column in ROWS.items()}
    rows["text"][3], rows["text"][8], rows["label"][5] = "   ", None, None
    task = build(write_splits(tmp_path, rows, TEST, suffix), tiny_bert)
    held = [row for client in range(3) for side in both(task, client) for row in rows_of(side)]
    expected = [(pieces(tiny_bert, TEXTS[row]), LABELS[row]) for row in range(len(TEXTS)) if row not in (3, 5, 8)]
    assert sorted(held) == sorted(expected)
    assert task.data_report().notes == (
        f"split 'train': 3 of {len(TEXTS)} rows are left out: "
        f"2 have an empty text (the first is row 3 of 'train.{suffix}'), "
        f"1 has no label (the first is row 5 of 'train.{suffix}')",
    )


def test_a_split_without_any_text_is_an_error(tiny_bert: Path, tmp_path: Path) -> None:
    empty = {"text": ["", " "], "label": [0, 1]}
    assert refusal(write_splits(tmp_path, ROWS, empty), tiny_bert).startswith(
        "task.data: no row of split 'test' can be used: 2 have an empty text"
    )


def test_labels_may_be_texts_or_named_numbers(tiny_bert: Path, tmp_path: Path) -> None:
    texts = [{"text": rows["text"], "label": [KINDS[label] for label in rows["label"]]} for rows in (ROWS, TEST)]
    as_texts = build(write_splits(tmp_path / "texts", *texts, suffix="csv"), tiny_bert)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(KINDS))})
    as_named = build(write_splits(tmp_path / "named", ROWS, TEST, features=features), tiny_bert)
    given = build(write_splits(tmp_path / "given", *texts), tiny_bert, label_names=KINDS)
    assert as_texts.data_report().label_names == tuple(sorted(KINDS))
    assert as_named.data_report() == given.data_report()
    assert as_named.data_report().label_names == KINDS
    assert rows_of(as_named.test_data()) == rows_of(given.test_data())


def test_a_batch_is_as_wide_as_its_longest_row(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert)
    widths = set()
    for batch in task.test_data().batches(4):
        longest = int(batch["attention_mask"].sum(dim=1).max())
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(batch["labels"]), longest)
        padding = batch["attention_mask"] == 0
        assert (batch["input_ids"][padding] == PAD).all()
        assert (batch["token_type_ids"][padding] == 0).all()
        widths.add(longest)
    assert len(widths) > 1


@pytest.fixture
def encoded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were encoded at once, each time that some were."""
    counted: list[int] = []
    encode = TextClassification._pieces

    def pieces_of(task: TextClassification, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        counted.append(len(rows["text"]))
        return encode(task, rows)

    monkeypatch.setattr(TextClassification, "_pieces", pieces_of)
    return counted


def test_texts_are_encoded_once(data: str, tiny_bert: Path, encoded_rows: list[int]) -> None:
    first = build(data, tiny_bert)
    assert encoded_rows == [len(TEXTS), len(TEST["text"])]
    again = build(data, tiny_bert, student={"name": "layers", "num_layers": 1}, partition={"name": "size"})
    again.client_data(0)
    assert len(encoded_rows) == 2
    assert rows_of(again.test_data()) == rows_of(first.test_data())


def test_tables_of_another_version_of_the_code_are_encoded_anew(
    data: str, tiny_bert: Path, encoded_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(data, tiny_bert)
    monkeypatch.setattr("fedkd_flwr.tasks.text.FORMAT", 0)
    build(data, tiny_bert)
    assert len(encoded_rows) == 4


def test_another_length_tokenizer_or_column_is_encoded_anew(
    data: str, tiny_bert: Path, tiny_tokenizer: Path, tmp_path: Path, encoded_rows: list[int]
) -> None:
    write_tokenizer(tmp_path / "same")
    teacher = {"config": {"model_type": "bert", "vocab_size": 99}}

    def is_new(**changes: Any) -> bool:
        before = len(encoded_rows)
        rows_of(build(changes.pop("data", data), tiny_bert, **changes).test_data())
        return len(encoded_rows) > before

    assert is_new()
    assert is_new(max_length=5)
    assert not is_new(max_length=5)
    assert is_new(data={"source": data, "columns": {"text_pair": "text"}})
    assert not is_new(teacher=teacher, tokenizer=str(tmp_path / "same"))  # the same rules in another place
    settings = tmp_path / "same" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"token_type_ids",', ""))
    assert is_new(teacher=teacher, tokenizer=str(tmp_path / "same"))  # the same rules, and other inputs
    write_tokenizer(tmp_path / "other", ["good", "bad", "drug"])
    assert is_new(teacher=teacher, tokenizer=str(tmp_path / "other"))


def trained(task: TextClassification, models: Models, num_steps: int = 50) -> None:
    """Fit the student, in place."""
    optimizer = torch.optim.Adam(models.student.parameters(), lr=1e-2)
    examples = task.client_data(0).train
    for step in range(num_steps):
        loss = task_loss(
            task.forward(models.student, batch_of(examples, 32, step), hidden_states=False, attentions=False)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_three_classes_are_learned_with_fedkd(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert, num_clients=1)
    algorithm, after = one_round(
        task,
        local={"num_epochs": 8, "batch_size": 8},
        student_optimizer={"learning_rate": 0.01},
        teacher_optimizer={"learning_rate": 0.01},
    )
    assert after.upload is not None
    shared = algorithm.shared.initial()
    before = algorithm.server.evaluate(shared, task.test_data())
    now = algorithm.server.evaluate(algorithm.shared.apply(shared, after.upload), task.test_data())
    assert before is not None and now is not None
    assert before.keys() == now.keys() == {"accuracy", "macro_f1", "loss"}
    assert before["accuracy"] < 0.7 < 0.95 < now["accuracy"]
    assert now["loss"] < before["loss"]
    scores = algorithm.client.evaluate(algorithm.shared.initial(), after.private, task.client_data(0))
    assert scores["private"]["accuracy"] > 0.9


def test_a_score_is_that_of_the_predictions(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert, positive_label=2)
    model = task.build_models(0).student.eval()
    batch = batch_of(task.test_data())
    with torch.no_grad():
        out = task.forward(model, batch, hidden_states=False, attentions=False)
    scores = score_of(task, model, task.test_data())
    predicted = out.logits.argmax(dim=-1)
    assert next(iter(scores)) == "f1"
    assert scores["accuracy"] == pytest.approx(float((predicted == batch["labels"]).float().mean()))
    assert scores["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(out.logits, batch["labels"])), rel=1e-5
    )
    hits = float(((predicted == 2) & (batch["labels"] == 2)).sum())
    assert scores["recall"] == pytest.approx(hits / float((batch["labels"] == 2).sum()))


@pytest.mark.parametrize("chosen", ["drug", 2])
def test_the_positive_class_goes_by_name_or_number(chosen: str | int, data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert, label_names=KINDS, positive_label=chosen)
    model = task.build_models(0).student
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    scores = score_of(task, model, task.test_data())
    assert (scores["recall"], scores["precision"]) == (1.0, scores["accuracy"])


@pytest.mark.parametrize("chosen", ["nothing", 3, -1])
def test_a_positive_class_that_there_is_not_is_refused(chosen: str | int, data: str, tiny_bert: Path) -> None:
    assert refusal(data, tiny_bert, label_names=KINDS, positive_label=chosen) == (
        f"task.positive_label: must be one of good, bad, drug, or 0 to 2, got {chosen!r}"
    )


def test_class_weights_reach_the_loss(tiny_bert: Path, tmp_path: Path) -> None:
    rows = {"text": TEXTS[:8], "label": [0, 0, 0, 0, 0, 0, 1, 1]}
    task = build(write_splits(tmp_path, rows, rows), tiny_bert, num_clients=1, class_weights="balanced")
    model = task.build_models(0).student.eval()
    with torch.no_grad():
        out = task.forward(model, batch_of(task.test_data()), hidden_states=False, attentions=False)
    assert out.class_weights is not None
    assert out.class_weights.tolist() == pytest.approx([8 / 12, 8 / 4])
    expected = torch.nn.functional.cross_entropy(out.logits, out.labels, weight=out.class_weights)
    assert float(task_loss(out)) == pytest.approx(float(expected))


def guidance(task: TextClassification, models: Models, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every part of FedKD's losses on a batch, and the gradients of both models."""
    for model in (models.teacher.eval(), models.student.eval()):
        model.zero_grad()
    outs = [
        task.forward(model, batch, hidden_states=True, attentions=True) for model in (models.teacher, models.student)
    ]
    teacher, student = (side(out, step) for out, step in zip(outs, (2, 1), strict=True))
    labels, mask, terms = outs[0].labels, outs[0].token_mask, DistillationTerms()
    parts = {
        "hidden": hidden_mse(student.hidden or (), teacher.hidden or (), mask),
        "attention": attention_mse(student.attentions or (), teacher.attentions or (), mask),
        "student": own_loss(student, teacher, labels, torch.ones(()), terms, mask),
        "teacher": own_loss(teacher, student, labels, torch.ones(()), terms, mask),
    }
    (parts["student"] + parts["teacher"]).backward()
    gradients = {
        f"{n}.{name}": parameter.grad
        for n, model in enumerate((models.teacher, models.student))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {name: value.detach() for name, value in parts.items()}, gradients


def side(out: Outputs, step: int) -> Side:
    assert out.hidden_states is not None and out.attentions is not None
    return Side(out.logits, task_loss(out), out.hidden_states[step::step], out.attentions[step - 1 :: step])


def test_padding_changes_neither_losses_nor_gradients(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert)
    models = task.build_models(0)
    batch = dict(batch_of(task.client_data(0).train))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    filled = batch | {"input_ids": torch.where(padding, 9, batch["input_ids"])}
    wider = {
        name: tensor if name == "labels" else torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()
    }
    expected, gradients = guidance(task, models, batch)
    assert all(float(part) > 0 for part in expected.values())
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    for other in (filled, wider):
        parts, found = guidance(task, models, other)
        torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-7)
        assert found.keys() == gradients.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-6)


def test_an_export_is_loaded_by_the_library_and_gives_the_same_accuracy_on_texts(
    data: str, tiny_bert: Path, tmp_path: Path
) -> None:
    task = build(data, tiny_bert, label_names=KINDS)
    models = task.build_models(0)
    trained(task, models)
    task.export(models.student, tmp_path / "export")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    assert state(reloaded).keys() == state(models.student).keys()
    assert all(torch.equal(tensor, state(models.student)[name]) for name, tensor in state(reloaded).items())
    config = AutoConfig.from_pretrained(tmp_path / "export")
    assert config.id2label == dict(enumerate(KINDS))
    assert config.label2id == {name: label for label, name in enumerate(KINDS)}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.model_max_length == 32
    classify = pipeline("text-classification", model=str(tmp_path / "export"), device="cpu")
    answers = [answer["label"] for answer in classify(TEST["text"])]
    accuracy = np.mean([answer == KINDS[label] for answer, label in zip(answers, TEST["label"], strict=True)])
    assert accuracy == pytest.approx(score_of(task, models.student, task.test_data())["accuracy"])
    assert accuracy > 0.7


def test_a_made_up_example_suits_the_models(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert)
    out = task.forward(task.build_models(0).student, task.example_batch(), hidden_states=True, attentions=True)
    assert out.logits.shape == (1, 3)
    assert out.labels.shape == (1,)


def test_clients_may_be_those_of_the_data(tiny_bert: Path, tmp_path: Path) -> None:
    writers = [row % 2 for row in range(len(TEXTS))]
    data = write_splits(tmp_path, ROWS | {"writer": writers}, TEST | {"writer": [0] * len(TEST["text"])})
    task = build(data, tiny_bert, num_clients=2, partition={"name": "natural", "column": "writer"})
    assert len(task.client_data(0).train) == len(TEXTS) // 2
    assert rows_of(task.client_data(0).test) == rows_of(task.test_data())
    with pytest.raises(ValueError, match="partition-id"):
        task.client_data(2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_length": 3},
        {"label_names": ["one"]},
        {"client_test_fraction": 1.0},
        {"class_weights": "even"},
        {"partition": {"name": "alphabetic"}},
        {"tokenizer": {"source": ""}},
        {"columns": {}},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any], tiny_bert: Path) -> None:
    with pytest.raises(ValidationError):
        options("data", tiny_bert, **wrong)


@pytest.mark.parametrize(
    ("positive", "remedy"), [(None, "task.positive_label and task.class_weights"), ("no", "task.class_weights")]
)
def test_an_uneven_task_is_told_only_the_options_that_are_not_set(
    positive: str | None, remedy: str, tiny_bert: Path, tmp_path: Path
) -> None:
    rows = {"text": [f"good {n}" for n in range(20)], "label": ["yes"] * 18 + ["no"] * 2}
    task = build(write_splits(tmp_path, rows, rows), tiny_bert, num_clients=1, positive_label=positive)
    assert any(note.endswith(f"right as often; see {remedy}") for note in task.data_report().notes)
