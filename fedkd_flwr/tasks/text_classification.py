"""Texts, or pairs of texts, with one label each: any data set of the Hub or local files, any Hugging Face model."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import nn

from fedkd_flwr.core.predictions import Predictions
from fedkd_flwr.core.protocols import DataReport, Examples, PublicExamples
from fedkd_flwr.tasks.class_names import ClassName, LabelNames, chosen_class
from fedkd_flwr.tasks.classification_head import head_notes
from fedkd_flwr.tasks.data_notes import digests, repeated_notes
from fedkd_flwr.tasks.labels import read_labels
from fedkd_flwr.tasks.partition import IidPartition, Rows, TablePartition, WholePartition
from fedkd_flwr.tasks.public import PublicRows, PublicTextOptions, held_out, public_notes
from fedkd_flwr.tasks.scores import CLASSIFICATION_METRICS, classification_scores, predict
from fedkd_flwr.tasks.source import DataSource, RowNames, column_values, require_text
from fedkd_flwr.tasks.stored_names import stored_names
from fedkd_flwr.tasks.table import ClassWeights, ClientRows, class_weights, left_out, load_tables, verb
from fedkd_flwr.tasks.text import TextTask, TextTaskOptions, TokenExamples, by_length, inputs_of, read_sequences

if TYPE_CHECKING:
    from datasets import Dataset


TEXT_HEAD = "AutoModelForSequenceClassification"


class TextColumns(BaseModel, extra="forbid", frozen=True):
    """What the columns are called: the text, a second text where examples are pairs, and the label."""

    text: str = Field("text", min_length=1)
    text_pair: str | None = Field(None, min_length=1)
    label: str = Field("label", min_length=1)


class TextData(DataSource):
    """A table of texts and labels. Attributes: `columns`, their names; the rest as for every source."""

    columns: TextColumns = TextColumns()


class TextClassificationOptions(TextTaskOptions):
    """Options of text classification; those of the models and the tokenizer are in `TextTaskOptions`.

    Attributes:
        data: the texts.
        label_names: the classes in order; null takes those that the data names, or the texts or numbers it has.
        positive_label: the class whose F1, precision and recall are scored; the first metric is its F1 then, else
            accuracy.
        class_weights: how much a label of each class counts in the task loss: "balanced" by the training split's
            counts, one number for each class, or null for all alike.
        partition: how the training split is divided.
        client_test_fraction: share of its training rows that a client keeps for its own score, in (0, 1), unless a
            natural partition gives it rows of the test split.
        public: texts that every node has, without labels; null: none.
    """

    name: Literal["text_classification"] = "text_classification"
    data: TextData
    label_names: LabelNames | None = Field(None, min_length=2)
    positive_label: ClassName = None
    class_weights: ClassWeights = None
    partition: TablePartition = IidPartition()
    client_test_fraction: float = Field(0.2, gt=0, lt=1)
    public: PublicTextOptions | None = None

    def build(self, num_clients: int, seed: int) -> "TextClassification":
        """The task, its training split divided among `num_clients`."""
        self.check_clients(num_clients)
        return TextClassification(self, num_clients, seed)


class TextClassification(TextTask):
    """The text classification task; see the module's text."""

    metrics = CLASSIFICATION_METRICS

    def __init__(self, options: TextClassificationOptions, num_clients: int, seed: int) -> None:
        self._columns = columns = options.data.columns
        tables = dict(zip(("train", "test"), load_tables(options.data, options.partition), strict=True))
        renamed = not isinstance(options.partition, WholePartition)
        train, test = tables.values()
        key = "task.data.columns.label"
        stored = (
            stored_names(options.data, train, columns.label, key),
            stored_names(options.data, test, columns.label, key),
        )
        labels = read_labels(train, test, columns.label, options.label_names, renamed=renamed, stored=stored)
        self._labels = {"train": labels.train, "test": labels.test}
        self._positive = chosen_class(options.positive_label, labels.names, "task.positive_label")
        usable, notes = _usable(tables, self._labels, columns)
        self._public: tuple[Dataset, Rows] | None = None
        if options.public is not None and options.public.source is None:
            held, usable["train"] = held_out(usable["train"], options.public.num_examples, seed)
            self._public = tables["train"], held
        rows = ClientRows(
            (tables["train"], tables["test"]),
            (usable["train"], usable["test"]),
            labels.train,
            options.partition,
            num_clients,
            seed,
            options.client_test_fraction,
        )
        weights = class_weights(options.class_weights, labels.train[usable["train"]], len(labels.names))
        super().__init__(options, TEXT_HEAD, tables, usable["test"], rows, labels.names, weights)
        if self._public is not None:
            self._public = self._tables["train"], self._public[1]
        elif options.public is not None:
            table, chosen, of_public = self._read_public(options.public, seed)
            self._public, notes = (table, chosen), (*notes, *of_public)
        self._labels_read, self._usable, self._notes = labels, usable, notes
        self._texts = tables  # before they were encoded

    def data_report(self) -> DataReport:
        """Labels of each client, what was left out or cut off, and what is odd about the rows."""
        return self._report

    @cached_property
    def _report(self) -> DataReport:
        heads = head_notes(self._options, TEXT_HEAD, self._label_names)
        notes = (*self._notes, *self._cut_off(self._usable), *self._repeated(), *heads)
        is_named = self._positive is not None
        remedy = "task.class_weights" if is_named else "task.positive_label and task.class_weights"
        return self._rows.report(self._labels_read, notes, remedy, self._rows_of)

    def _repeated(self) -> tuple[str, ...]:
        train, test = self._texts.values()
        if train is test:
            return ()
        columns = [name for name in (self._columns.text, self._columns.text_pair) if name]
        rows = []
        for split, table in self._texts.items():
            texts = zip(*(column_values(table, name, "task.data.columns") for name in columns), strict=True)
            rows.append(digests(texts)[self._usable[split]])
        return repeated_notes(rows[0], rows[1], (str(train.split), str(test.split)))

    def public_examples(self) -> PublicExamples | None:
        """Texts of the training split that no client has, or of another table."""
        if self._public is None:
            return None
        table, rows = self._public
        return PublicRows(rows, lambda rows, positions: self._token_examples(table, rows, positions))

    def predict(self, model: nn.Module, examples: Examples) -> Predictions:
        """Log-probabilities of the classes of each example."""
        return predict(self, model, examples)

    def score(self, predictions: Predictions, examples: Examples) -> dict[str, float]:
        """Accuracy and macro-F1, those of the positive class where one is named, in [0, 1]; loss in nats."""
        return classification_scores(predictions, self._positive)

    def _pieces(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        names = (self._columns.text, self._columns.text_pair)
        texts = [[text or "" for text in rows[name]] for name in names if name]
        out = self._tokenizer(*texts, truncation=True, max_length=self._options.max_length, return_attention_mask=True)
        return {name: out[name] for name in inputs_of(self._tokenizer)}

    def _examples(self, split: str, rows: Rows) -> TokenExamples:
        table = self._tables[split]
        rows = by_length(table, rows)
        return self._token_examples(table, rows, self._labels[split][rows])

    def _token_examples(self, table: "Dataset", rows: Rows, labels: Rows) -> TokenExamples:
        sequences = read_sequences(table, rows, inputs_of(self._tokenizer))
        return TokenExamples(sequences, self._padding, torch.from_numpy(labels))

    def _read_public(self, public: PublicTextOptions, seed: int) -> "tuple[Dataset, Rows, tuple[str, ...]]":
        """A table of public texts, encoded as the task's own, the rows of it that are used, and notes on others."""
        table = public.load(self._columns.text, self._columns.text_pair)
        reasons = _empty(table, self._columns, "task.public")
        usable, notes = left_out(str(table.split), reasons, len(table), RowNames(table))
        chosen, _ = held_out(usable, public.num_examples or len(usable), seed)
        return self._encoded(table), chosen, public_notes(notes)

    def _label_counts(self, rows: Rows) -> tuple[int, ...]:
        return tuple(np.bincount(self._labels["train"][rows], minlength=len(self._label_names)).tolist())

    def _cut_off(self, usable: Mapping[str, Rows]) -> list[str]:
        notes = []
        for split, table in self._tables.items():
            lengths = np.array(table.select_columns(["length"])[:]["length"], np.int64)[usable[split]]
            # A text of just this length is not cut; to tell it from longer ones would take its pieces without a limit.
            if full := int((lengths == self._options.max_length).sum()):
                notes.append(
                    f"split {str(table.split)!r}: {full} of {len(lengths)} texts {verb(full, 'reach')} task.max_length "
                    f"({self._options.max_length}); what is longer is cut"
                )
        return notes


def _usable(
    tables: "Mapping[str, Dataset]", labels: Mapping[str, Rows], columns: TextColumns
) -> tuple[dict[str, Rows], tuple[str, ...]]:
    usable: dict[str, Rows] = {}
    notes: tuple[str, ...] = ()
    for name, table in tables.items():
        reasons = {**_empty(table, columns, "task.data.columns"), "have no label": labels[name] < 0}
        usable[name], noted = left_out(str(table.split), reasons, len(table), RowNames(table))
        notes = (*notes, *noted)
    return usable, notes


def _empty(table: "Dataset", columns: TextColumns, key: str) -> dict[str, Any]:
    """Rows without a text, or without a second one: for each reason a mask of [rows]."""
    reasons: dict[str, Any] = {}
    for name, reason in (("text", "have an empty text"), ("text_pair", "have an empty second text")):
        if (column := getattr(columns, name)) is not None:
            require_text(table, column, f"{key}.{name}")
            texts = column_values(table, column, f"{key}.{name}")
            reasons[reason] = np.array([not (text and text.strip()) for text in texts], bool)
    return reasons
