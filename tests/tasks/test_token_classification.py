from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Value
from datasets import Sequence as ListOf
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, AutoTokenizer, RobertaTokenizer, pipeline

from fedkd_flwr.core.losses import NO_LABEL, cross_entropy, distillation, task_loss
from fedkd_flwr.core.protocols import Batch, Examples, score_of
from fedkd_flwr.tasks.token_classification import TaggedExamples, TokenClassification, TokenClassificationOptions
from tests.tasks.conftest import one_round, state, write_splits

pytestmark = pytest.mark.usefixtures("offline")

NAMES = ("O", "B-Chemical", "I-Chemical", "B-Disease", "I-Disease")
TAGS = {"aspirin": "B-Chemical", "drug": "I-Chemical", "fever": "B-Disease"}
OUTSIDE, CHEMICAL, _, DISEASE, _ = range(5)
SENTENCES = [
    f"{start} {chemical} {middle} {end}".split()
    for start, chemical, middle, end in product(
        ("the", "so , the", "a"),
        ("aspirin", "aspirin drug"),
        ("did help", "did harm", "was good of"),
        ("fever", "patients", "."),
    )
]


def tagged(sentences: Sequence[list[str]]) -> dict[str, list[Any]]:
    return {"tokens": list(sentences), "ner_tags": [[TAGS.get(word, "O") for word in words] for words in sentences]}


TRAIN, TEST = tagged(SENTENCES), tagged([["it", *words] for words in SENTENCES[::4]])


def build(data: str | dict[str, Any], bert: Path, num_clients: int = 2, **changes: Any) -> TokenClassification:
    chosen = {"data": data, "teacher": {"source": str(bert)}, "max_length": 32, **changes}
    return TokenClassificationOptions.model_validate(chosen).build(num_clients, 0)


def refusal(data: str | dict[str, Any], bert: Path, **changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        build(data, bert, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_splits(tmp_path / "data", TRAIN, TEST)


def on_the_server(tmp_path: Path, bert: Path, rows: dict[str, list[Any]], **changes: Any) -> TokenClassification:
    """A task with these rows as its test split."""
    return build(write_splits(tmp_path / "rows", TRAIN, rows), bert, label_names=NAMES, **changes)


def batch_of(examples: Examples) -> Batch:
    return next(iter(examples.batches(len(examples))))


def sentences_of(examples: Examples) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Each sentence's pieces without padding, and all its tags."""
    assert isinstance(examples, TaggedExamples)
    batch = batch_of(examples)
    pieces = [
        tuple(ids[: int(n)].tolist()) for ids, n in zip(batch["input_ids"], batch["attention_mask"].sum(1), strict=True)
    ]
    return list(zip(pieces, map(tuple, examples.tags), strict=True))


class Fake(nn.Module):
    """Tags a piece by what it is, whatever is around it."""

    def __init__(self, bert: Path, tags: dict[str, int]) -> None:
        super().__init__()
        tokenizer = AutoTokenizer.from_pretrained(bert)
        self.tags = torch.zeros(len(tokenizer), dtype=torch.int64)
        for piece, tag in tags.items():
            self.tags[tokenizer.convert_tokens_to_ids(piece)] = tag

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=9 * nn.functional.one_hot(self.tags[input_ids], len(NAMES)).float())


RIGHT = {"as": 1, "drug": 2, "fever": 3}


def test_the_first_piece_of_a_word_carries_its_tag(tiny_bert: Path, tmp_path: Path) -> None:
    rows = tagged([["the", "Aspirin", "fever"], ["zebra", "patients"]])
    examples = on_the_server(
        tmp_path, tiny_bert, {"tokens": rows["tokens"], "ner_tags": [["O", "B-Chemical", "B-Disease"], ["O", "O"]]}
    ).test_data()
    batch = batch_of(examples)
    assert batch["labels"].tolist() == [
        [NO_LABEL, OUTSIDE, OUTSIDE, NO_LABEL, NO_LABEL, NO_LABEL, NO_LABEL],  # zebra patient ##s, the shorter sentence
        [NO_LABEL, OUTSIDE, CHEMICAL, NO_LABEL, NO_LABEL, DISEASE, NO_LABEL],  # the as ##pir ##in fever
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 7]


def test_a_word_without_pieces_has_a_tag_and_no_label(tiny_bert: Path, tmp_path: Path) -> None:
    rows = {
        "tokens": [["a", " ", "fever", "\t"], ["", "drug"]],
        "ner_tags": [["O", "B-Chemical", "B-Disease", "O"], ["O", "O"]],
    }
    task = on_the_server(tmp_path, tiny_bert, rows)
    assert batch_of(task.test_data())["labels"].tolist() == [
        [NO_LABEL, OUTSIDE, DISEASE, NO_LABEL],
        [NO_LABEL, OUTSIDE, OUTSIDE, NO_LABEL],  # an empty word is an unknown one
    ]
    scores = score_of(task, Fake(tiny_bert, RIGHT | {"drug": 0}), task.test_data())
    assert (scores["precision"], scores["recall"], scores["accuracy"]) == (1.0, 0.5, 5 / 6)
    assert task.data_report().notes == ()


def test_what_is_cut_off_is_missed_and_noted(tiny_bert: Path, tmp_path: Path) -> None:
    rows = tagged([["fever", "so", "so", "fever", "fever"], ["fever", "so", "so", "fever"]])
    task = on_the_server(tmp_path, tiny_bert, rows, max_length=6)
    scores = score_of(task, Fake(tiny_bert, RIGHT), task.test_data())
    assert scores["precision"] == 1.0
    assert scores["recall"] == pytest.approx(4 / 5)
    assert scores["accuracy"] == pytest.approx(8 / 9)
    of_train, of_test = (note for note in task.data_report().notes if "longer than" in note)
    assert of_train.startswith("split 'train': ")
    assert of_test == (
        "split 'test': 1 of 2 sentences is longer than task.max_length (6); entities beyond it count as missed"
    )


def test_tags_that_are_cut_off_are_not_counted_among_those_a_client_learns_from(
    tiny_bert: Path, tmp_path: Path
) -> None:
    rows = tagged([["so", "so", "so", "so", "fever", "fever"]] * 20)
    source = write_splits(tmp_path, rows, rows)
    task = build(source, tiny_bert, 2, max_length=7, label_names=NAMES)  # five words and two marks
    for client in range(2):
        data = task.client_data(client)
        labels = torch.cat([batch["labels"].flatten() for batch in data.train.batches(64)])
        assert data.label_counts == tuple(int((labels == tag).sum()) for tag in range(len(NAMES)))
        assert data.label_counts[DISEASE] == len(data.train)


def test_a_word_that_is_cut_in_half_keeps_its_tag(tiny_bert: Path, tmp_path: Path) -> None:
    task = on_the_server(tmp_path, tiny_bert, tagged([["so", "so", "aspirin"]]), max_length=5)
    assert batch_of(task.test_data())["labels"].tolist() == [[NO_LABEL, OUTSIDE, OUTSIDE, CHEMICAL, NO_LABEL]]
    assert not any("'test'" in note and "longer than" in note for note in task.data_report().notes)


def numbered(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return rows | {"ner_tags": [[NAMES.index(tag) for tag in tags] for tags in rows["ner_tags"]]}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_tags_may_be_texts_or_numbers_with_names(suffix: str, data: str, tiny_bert: Path, tmp_path: Path) -> None:
    plain = build(data, tiny_bert)
    others = [
        build(write_splits(tmp_path / "texts", TRAIN, TEST, suffix), tiny_bert, label_names=NAMES),
        build(
            write_splits(tmp_path / "numbers", numbered(TRAIN), numbered(TEST), suffix), tiny_bert, label_names=NAMES
        ),
    ]
    if suffix == "parquet":  # the one that keeps the names
        features = Features({"tokens": ListOf(Value("string")), "ner_tags": ListOf(ClassLabel(names=list(NAMES)))})
        named = write_splits(tmp_path / "named", numbered(TRAIN), numbered(TEST), features=features)
        others.append(build(named, tiny_bert))
    for task in others:
        assert task.data_report() == plain.data_report()
        assert sentences_of(task.test_data()) == sentences_of(plain.test_data())
        for name, tensor in batch_of(task.client_data(1).train).items():
            assert torch.equal(tensor, batch_of(plain.client_data(1).train)[name])


def test_tags_that_occur_are_named_outside_first_then_by_type(data: str, tiny_bert: Path) -> None:
    config = build(data, tiny_bert).build_models(0).student.config
    assert tuple(config.id2label.values()) == NAMES  # "I-Disease" does not occur
    assert config.label2id["B-Disease"] == DISEASE


def test_columns_may_have_any_name(data: str, tiny_bert: Path, tmp_path: Path) -> None:
    named = [{"words": rows["tokens"], "marks": rows["ner_tags"]} for rows in (TRAIN, TEST)]
    source = write_splits(tmp_path / "other", *named)
    task = build({"source": source, "columns": {"tokens": "words", "tags": "marks"}}, tiny_bert)
    assert sentences_of(task.test_data()) == sentences_of(build(data, tiny_bert).test_data())
    assert refusal({"source": source, "columns": {"tags": "marks"}}, tiny_bert).startswith(
        "task.data.columns.tokens: split 'train' has no column 'tokens'; columns: words, marks"
    )


def test_sentences_without_words_or_with_other_numbers_of_tags_are_reported_and_not_used(
    tiny_bert: Path, tmp_path: Path
) -> None:
    rows = {name: list(column) for name, column in TRAIN.items()}
    rows["tokens"][1], rows["tokens"][4], rows["ner_tags"][6] = [], None, ["O"]
    task = build(write_splits(tmp_path, rows, TEST), tiny_bert, num_clients=3)
    assert task.data_report().notes == (
        f"split 'train': 3 of {len(SENTENCES)} rows are left out: 2 have no words (the first is row 1 of "
        "'train.parquet'), 1 has another number of tags than words (the first is row 6 of 'train.parquet')",
    )
    sides = [side for client in range(3) for side in (task.client_data(client).train, task.client_data(client).test)]
    assert sum(map(len, sides)) == len(SENTENCES) - 3


def test_the_report_counts_entities_by_type(tiny_bert: Path, data: str) -> None:
    task = build(data, tiny_bert)
    report = task.data_report()
    assert report.label_names == ("Chemical", "Disease")
    for client, counts in enumerate(report.label_counts):
        tags = [tag for _, of_words in sentences_of(task.client_data(client).train) for tag in of_words]
        assert counts == (tags.count("B-Chemical"), tags.count("B-Disease"))


@pytest.mark.parametrize("kind", ["text", "number"])
def test_a_tag_that_is_not_named_is_an_error_with_its_row(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    rows = {name: list(column) for name, column in TRAIN.items()}
    rows["ner_tags"][2] = ["B-Gene", *rows["ner_tags"][2][1:]]
    if kind == "number":
        rows["ner_tags"] = [[{"B-Gene": 5}.get(tag) or NAMES.index(tag) for tag in tags] for tags in rows["ner_tags"]]
    wrong = "5" if kind == "number" else "'B-Gene'"
    test = numbered(TEST) if kind == "number" else TEST
    assert refusal(write_splits(tmp_path, rows, test), tiny_bert, label_names=NAMES) == (
        f"task.data.columns.tags: 'ner_tags' has {wrong} in row 2 of split 'train', which is none of "
        f"{', '.join(NAMES)}; set task.label_names, or correct the row"
    )


def test_a_tag_that_only_the_test_split_has_is_an_error(tiny_bert: Path, tmp_path: Path) -> None:
    test = {"tokens": [["a"]], "ner_tags": [["B-Gene"]]}
    assert "'B-Gene' in row 0 of split 'test'" in refusal(write_splits(tmp_path, TRAIN, test), tiny_bert)


def test_numbers_need_names(tiny_bert: Path, tmp_path: Path) -> None:
    assert refusal(write_splits(tmp_path, numbered(TRAIN), numbered(TEST)), tiny_bert).startswith(
        "task.label_names: required, because the tags are numbers such as "
    )


@pytest.mark.parametrize(
    ("names", "got"),
    [
        (("O", "Chemical"), "'Chemical'"),
        (("O", "X-Chemical"), "'X-Chemical'"),
        (("O", "B-"), "'B-'"),
        (("B-Chemical", "I-Chemical"), "no 'O'"),
        (("O", "B-X", "B-X"), "'B-X' twice"),
    ],
)
def test_names_that_are_not_of_iob2_are_refused(names: tuple[str, ...], got: str, data: str, tiny_bert: Path) -> None:
    text = refusal(data, tiny_bert, label_names=names)
    assert text.startswith("task.label_names: ")
    assert got in text


def test_tags_of_another_kind_in_the_data_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    rows = {"tokens": [["a", "drug"]] * 6, "ner_tags": [["DET", "NOUN"]] * 6}
    assert "got 'DET'" in refusal(write_splits(tmp_path, rows, rows), tiny_bert)


def test_data_without_entities_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    rows = {"tokens": [["a", "drug"]] * 6, "ner_tags": [["O", "O"]] * 6}
    assert refusal(write_splits(tmp_path, rows, rows), tiny_bert) == (
        "task.data.columns.tags: 'ner_tags' has no entities; name another column"
    )


def test_tags_must_be_lists(tiny_bert: Path, tmp_path: Path) -> None:
    rows = {"tokens": [["a"]] * 6, "ner_tags": ["O"] * 6}
    assert "must hold a list of tags in every row" in refusal(write_splits(tmp_path, rows, rows), tiny_bert)


@pytest.mark.parametrize("tags", [[[["O"]]] * 6, [[{"tag": "O"}]] * 6])
def test_lists_of_what_is_no_tag_are_refused(tags: list[Any], tiny_bert: Path, tmp_path: Path) -> None:
    rows = {"tokens": [["a"]] * 6, "ner_tags": tags}
    assert "must hold a list of tags in every row" in refusal(write_splits(tmp_path, rows, rows), tiny_bert)


@pytest.mark.parametrize("tokens", [["a drug"] * 6, [[1, 2]] * 6, [[["a"], ["drug"]]] * 6])
def test_tokens_must_be_lists_of_words(tokens: list[Any], tiny_bert: Path, tmp_path: Path) -> None:
    rows = {"tokens": tokens, "ner_tags": [["O", "B-Chemical"]] * 6}
    text = refusal(write_splits(tmp_path, rows, rows), tiny_bert)
    assert text.startswith(
        "task.data.columns.tokens: 'tokens' of split 'train' must hold a list of words in every row, its type is "
    )
    assert text.endswith("; name another column")


@pytest.mark.parametrize("kind", ["text", "number", "named number"])
def test_a_word_without_a_tag_leaves_its_row_out(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    rows = {name: list(column) for name, column in (TRAIN if kind == "text" else numbered(TRAIN)).items()}
    rows["ner_tags"][3] = [*rows["ner_tags"][3][:-1], None]
    names = ListOf(ClassLabel(names=list(NAMES)))
    features = Features({"tokens": ListOf(Value("string")), "ner_tags": names}) if kind == "named number" else None
    source = write_splits(tmp_path, rows, TEST if kind == "text" else numbered(TEST), features=features)
    task = build(source, tiny_bert, label_names=NAMES if kind == "number" else None)
    assert task.data_report().notes == (
        f"split 'train': 1 of {len(SENTENCES)} rows is left out: 1 has a word without a tag (the first is row 3 of "
        "'train.parquet')",
    )
    sides = [side for client in range(2) for side in (task.client_data(client).train, task.client_data(client).test)]
    assert sum(map(len, sides)) == len(SENTENCES) - 1


def test_documents_stay_whole(tiny_bert: Path, tmp_path: Path) -> None:
    documents = [f"d{row // 6}" for row in range(len(SENTENCES))]
    data = write_splits(tmp_path, TRAIN | {"doc_id": documents}, TEST)
    task = build(data, tiny_bert, 3, partition={"name": "natural", "column": "doc_id", "grouped": True})
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    document = {
        tuple(tokenizer(words, is_split_into_words=True)["input_ids"]): name
        for words, name in zip(SENTENCES, documents, strict=True)
    }
    sides = [side for client in range(3) for side in (task.client_data(client).train, task.client_data(client).test)]
    held = [{document[ids] for ids, _ in sentences_of(side)} for side in sides]
    assert sum(map(len, held)) == len(set(documents)) == len(set().union(*held))


def test_partitions_by_label_go_by_the_type_of_entity(tiny_bert: Path, tmp_path: Path) -> None:
    rows = tagged([["aspirin", "did", "help"], ["fever", "was", "bad"]] * 8)
    task = build(
        write_splits(tmp_path, rows, rows), tiny_bert, partition={"name": "pathological", "classes_per_client": 1}
    )
    assert sorted(task.data_report().label_counts) == [(0, 6), (6, 0)]


def test_sentences_without_entities_are_a_class_of_their_own_for_a_partition(tiny_bert: Path, tmp_path: Path) -> None:
    rows = tagged([["aspirin", "did", "help"], ["fever", "was", "bad"], ["it", "was", "good"]] * 20)
    source = write_splits(tmp_path, rows, rows)
    task = build(source, tiny_bert, 3, partition={"name": "pathological", "classes_per_client": 1})
    report = task.data_report()
    assert report.label_names == ("Chemical", "Disease")
    assert sorted(report.label_counts) == [(0, 0), (0, 16), (16, 0)]
    held = [{tags[0] for _, tags in sentences_of(task.client_data(client).train)} for client in range(3)]
    assert sorted(held, key=min) == [{"B-Chemical"}, {"B-Disease"}, {"O"}]
    # Much alpha deals every class evenly, so that the sentences without entities are dealt so as well.
    even = build(source, tiny_bert, 2, partition={"name": "dirichlet", "alpha": 1e4, "min_examples": 10})
    for client in range(2):
        sides = (even.client_data(client).train, even.client_data(client).test)
        without = sum(set(tags) == {"O"} for side in sides for _, tags in sentences_of(side))
        assert without == pytest.approx(10, abs=2)


def test_a_perfect_model_finds_every_entity(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert)
    scores = score_of(task, Fake(tiny_bert, RIGHT), task.test_data())
    assert list(scores) == ["f1", "precision", "recall", "accuracy", "loss"]
    assert [scores[name] for name in ("f1", "precision", "recall", "accuracy")] == [1.0] * 4
    assert 0 < scores["loss"] < 0.01


def test_a_model_that_finds_nothing_scores_nothing(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert)
    scores = score_of(task, Fake(tiny_bert, {}), task.test_data())
    assert [scores[name] for name in ("f1", "precision", "recall")] == [0.0] * 3
    assert 0.5 < scores["accuracy"] < 1.0


def test_what_a_model_says_of_later_pieces_and_of_padding_does_not_count(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert)
    noise = {"##pir": 3, "##in": 4, "##s": 1, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3}
    assert score_of(task, Fake(tiny_bert, RIGHT | noise), task.test_data())["f1"] == 1.0


def test_the_loss_is_the_mean_over_words(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert)
    model = task.build_models(0).student.eval()
    with torch.no_grad():
        out = task.forward(model, batch_of(task.test_data()), hidden_states=False, attentions=False)
    expected = nn.functional.cross_entropy(out.logits.flatten(0, 1), out.labels.flatten())
    assert score_of(task, model, task.test_data())["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_positions_without_a_label_give_no_gradient(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert)
    models = task.build_models(0)
    batch = batch_of(task.client_data(0).train)
    ignored = batch["labels"] == NO_LABEL
    teacher, student = (
        task.forward(model.eval(), batch, hidden_states=False, attentions=False).logits
        for model in (models.teacher, models.student)
    )
    for loss in (cross_entropy(student, batch["labels"]), distillation(student, teacher, batch["labels"])):
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        assert (gradient[ignored] == 0).all()
        assert (gradient[~ignored] != 0).any(dim=-1).all()


def test_padding_changes_neither_the_loss_nor_its_gradient(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert)
    model = task.build_models(0).student.eval()
    batch = batch_of(task.client_data(0).train)
    padding = batch["attention_mask"] == 0
    assert padding.any()
    wider = {
        name: nn.functional.pad(tensor, (0, 3), value=NO_LABEL if name == "labels" else 0)
        for name, tensor in batch.items()
    }
    found = []
    for other in (batch, {**batch, "input_ids": torch.where(padding, 9, batch["input_ids"])}, wider):
        model.zero_grad()
        loss = task_loss(task.forward(model, other, hidden_states=False, attentions=False))
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        found.append((loss.detach(), gradients))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-3, atol=1e-6)


def test_class_weights_are_of_tags(data: str, tiny_bert: Path) -> None:
    task = build(data, tiny_bert, class_weights="balanced")
    model = task.build_models(0).student
    weights = task.forward(model, task.example_batch(), hidden_states=False, attentions=False).class_weights
    assert weights is not None
    counts = np.bincount([NAMES.index(tag) for tags in TRAIN["ner_tags"] for tag in tags], minlength=5)
    assert weights.tolist() == pytest.approx([*(counts[:4].sum() / (5 * counts[:4])), 1.0])
    assert "must be 5 numbers" in refusal(data, tiny_bert, class_weights=[1.0, 2.0])


FIT = {
    "local": {"num_epochs": 16, "batch_size": 8},
    "student_optimizer": {"learning_rate": 0.01},
    "teacher_optimizer": {"learning_rate": 0.01},
}


def test_entities_are_learned_with_fedkd_and_found_by_the_library(data: str, tiny_bert: Path, tmp_path: Path) -> None:
    task = build(data, tiny_bert, num_clients=1)
    algorithm, trained = one_round(task, hidden=True, attention=True, **FIT)
    assert trained.upload is not None
    shared = algorithm.shared.initial()
    learned = algorithm.shared.apply(shared, trained.upload)
    before, after = (algorithm.server.evaluate(arrays, task.test_data()) for arrays in (shared, learned))
    assert before is not None and after is not None
    assert before["f1"] < 0.5 < 0.85 < after["f1"]

    algorithm.server.export_shared(learned, tmp_path / "export")
    reloaded = AutoModelForTokenClassification.from_pretrained(tmp_path / "export")
    assert all(np.array_equal(tensor.numpy(), learned[name]) for name, tensor in state(reloaded).items())
    find = pipeline("token-classification", model=str(tmp_path / "export"), aggregation_strategy="first", device="cpu")
    text = "it the aspirin drug did help fever"
    found = [(entity["entity_group"], text[entity["start"] : entity["end"]]) for entity in find(text)]
    assert found == [("Chemical", "aspirin drug"), ("Disease", "fever")]


def test_a_tokenizer_of_bytes_begins_a_word_as_it_does_in_a_text(tmp_path: Path, data: str) -> None:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {piece: place for place, piece in enumerate([*special, "Ġ", *"abcdefghijklmnopqrstuvwxyz.,"])}
    RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path / "bytes")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    teacher = {"config": {"model_type": "roberta", "vocab_size": len(vocabulary), **sizes}}
    chosen = {"data": data, "teacher": teacher, "tokenizer": str(tmp_path / "bytes"), "max_length": 64}
    task = TokenClassificationOptions.model_validate(chosen).build(2, 0)
    batch = batch_of(task.test_data())
    starts = batch["labels"] != NO_LABEL
    assert (batch["input_ids"][starts] == vocabulary["Ġ"]).all()
    task.export(task.build_models(0).student, tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    texts = {tuple(tokenizer(" ".join(words))["input_ids"]) for words in TEST["tokens"]}
    assert {ids for ids, _ in sentences_of(task.test_data())} == texts
