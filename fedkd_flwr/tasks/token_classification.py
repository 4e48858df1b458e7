"""Words with one tag each, entities in IOB2: any data set of the Hub or local files, any Hugging Face model.

A tag belongs to a word, a model reads word pieces: the first piece of a word carries its tag. Later pieces of a word
and special tokens carry no label and are left out of the cross-entropy and of the KL divergence. The terms of hidden
states and of attention compare every real token, those among them, because both models see them; only padding is left
out of all.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, Field
from torch import nn

from fedkd_flwr.core.losses import NO_LABEL
from fedkd_flwr.core.predictions import Predictions
from fedkd_flwr.core.protocols import CommonAnswer, DataReport, Examples
from fedkd_flwr.tasks.class_names import LabelNames, near_equal_notes
from fedkd_flwr.tasks.classification_head import head_notes
from fedkd_flwr.tasks.data_notes import digests, lacking_notes, repeated_notes
from fedkd_flwr.tasks.partition import IidPartition, Rows, TablePartition, client_notes
from fedkd_flwr.tasks.scores import ENTITY_METRICS, entity_scores, predict
from fedkd_flwr.tasks.source import DataSource, RowNames, column_values, require_column
from fedkd_flwr.tasks.stored_names import stored_names
from fedkd_flwr.tasks.table import ClassWeights, ClientRows, class_weights, left_out, load_tables, verb
from fedkd_flwr.tasks.tags import (
    OUTSIDE,
    entity_counts,
    names_in_iob2,
    require_iob2,
    rows_in_iob2,
    tag_indices,
    tag_names,
    tag_texts,
)
from fedkd_flwr.tasks.text import TextTask, TextTaskOptions, TokenExamples, by_length, inputs_of, read_sequences

if TYPE_CHECKING:
    from datasets import Dataset

TOKEN_HEAD = "AutoModelForTokenClassification"
WORDS = "words"  # column of the encoded table: for each piece, the word that begins with it, -1 where none does


class TokenColumns(BaseModel, extra="forbid", frozen=True):
    """What the columns are called: the words of a sentence, and as many tags."""

    tokens: str = Field("tokens", min_length=1)
    tags: str = Field("ner_tags", min_length=1)


class TokenData(DataSource):
    """A table of sentences. Attributes: `columns`, their names; the rest as for every source."""

    columns: TokenColumns = TokenColumns()


class TokenClassificationOptions(TextTaskOptions):
    """Options of token classification; those of the models and the tokenizer are in `TextTaskOptions`.

    Attributes:
        data: the sentences.
        label_names: the tags in order, with "O", in IOB2 or a scheme that is read as IOB2; null takes those that the
            data names or has.
        class_weights: how much each tag counts in the task loss: "balanced" by the training split's counts, one number
            for each tag, or null for all alike.
        partition: how the training split is divided. A partition by label goes by the type of entity that a sentence
            has most of; sentences without entities are a class of their own.
        client_test_fraction: share of its training rows that a client keeps for its own score, in (0, 1), unless a
            natural partition gives it rows of the test split.
    """

    name: Literal["token_classification"] = "token_classification"
    data: TokenData
    label_names: LabelNames | None = Field(None, min_length=2)
    class_weights: ClassWeights = None
    partition: TablePartition = IidPartition()
    client_test_fraction: float = Field(0.2, gt=0, lt=1)

    def load_tokenizer(self) -> Any:
        """The tokenizer, which begins each word of a list as it would begin it in a text."""
        tokenizer = super().load_tokenizer()
        rule = tokenizer.backend_tokenizer.pre_tokenizer
        if getattr(rule, "add_prefix_space", None) is False:  # of bytes: the space before a word is part of its piece
            rule.add_prefix_space = tokenizer.add_prefix_space = True
            tokenizer.init_kwargs["add_prefix_space"] = True  # what an export keeps
        return tokenizer

    def build(self, num_clients: int, seed: int) -> "TokenClassification":
        """The task, its training split divided among `num_clients`."""
        self.check_clients(num_clients)
        return TokenClassification(self, num_clients, seed)


class TaggedExamples(TokenExamples):
    """Sentences as word pieces, and the tags of all their words, those that were cut off included.

    Args:
        sequences: as for `TokenExamples`, "labels" among them.
        padding: likewise.
        tags: for each sentence, the tag of each word, [words].
        words: for each sentence, the word of each labelled piece in order, [labelled pieces].
    """

    def __init__(
        self,
        sequences: Mapping[str, Sequence[Rows]],
        padding: Mapping[str, int],
        tags: Sequence[list[str]],
        words: Sequence[Rows],
    ) -> None:
        super().__init__(sequences, padding)
        self.tags = list(tags)
        self.words = list(words)


class TokenClassification(TextTask):
    """The token classification task; see the module's text."""

    metrics = ENTITY_METRICS
    _labels_tokens = True

    def __init__(self, options: TokenClassificationOptions, num_clients: int, seed: int) -> None:
        self._columns = columns = options.data.columns
        tables = dict(zip(("train", "test"), load_tables(options.data, options.partition), strict=True))
        usable: dict[str, Rows] = {}
        notes: list[str] = []
        repeated: list[Rows] = []
        tags: dict[str, list[list[Any] | None]] = {}
        chosen = None if options.label_names is None else names_in_iob2(options.label_names)
        begins = (lambda kind: True) if chosen is None else (lambda kind: f"B-{kind}" in chosen)
        for split, table in tables.items():
            words = _words(table, columns.tokens)
            stored = stored_names(options.data, table, columns.tags, "task.data.columns.tags")
            found = tag_texts(table, columns.tags, stored, options.label_names)
            tags[split], scheme = rows_in_iob2(found, begins)
            usable[split], noted = left_out(str(table.split), _reasons(words, tags[split]), len(table), RowNames(table))
            notes.extend(noted)
            if scheme is not None:
                notes.append(f"split {str(table.split)!r}: tags are in {scheme} and read as IOB2")
            repeated.append(digests(tuple(row or ()) for row in words)[usable[split]])
        names = chosen or tag_names(tags["train"], usable["train"])
        require_iob2(names, "task.label_names" if chosen else "task.data.columns.tags")
        if len(names) < 2:
            raise ValueError(f"task.data.columns.tags: {columns.tags!r} has no entities; name another column")
        self._tags = {
            split: tag_indices(tags[split], usable[split], names, columns.tags, str(table.split))
            for split, table in tables.items()
        }
        kinds = sorted({name.partition("-")[2] for name in names} - {""})
        entities = entity_counts(self._tags["train"], names, kinds)
        rows = ClientRows(
            (tables["train"], tables["test"]),
            (usable["train"], usable["test"]),
            # The largest count of a sentence without entities would be that of the first type.
            np.where(entities.any(axis=1), entities.argmax(axis=1), len(kinds)),
            options.partition,
            num_clients,
            seed,
            options.client_test_fraction,
        )
        weights = class_weights(options.class_weights, np.concatenate(self._tags["train"]), len(names))
        super().__init__(options, TOKEN_HEAD, tables, usable["test"], rows, names, weights)
        counts = tuple(tuple(int(n) for n in entities[mine].sum(axis=0)) for mine in rows.learned(self._rows_of))
        self._kinds, self._counts = tuple(kinds), counts
        splits = str(tables["train"].split), str(tables["test"].split)
        if tables["train"] is not tables["test"]:
            test_entities = entity_counts([self._tags["test"][row] for row in usable["test"]], names, kinds)
            of_splits = entities[np.concatenate(rows.train)].sum(axis=0), test_entities.sum(axis=0)
            notes.extend(lacking_notes(kinds, *of_splits, splits, "type"))
            notes.extend(repeated_notes(repeated[0], repeated[1], splits))
        self._notes = (*notes, *rows.notes, *near_equal_notes(kinds), *self._cut_off(usable), *client_notes(counts))

    def common_answer(self) -> CommonAnswer | None:
        """That no word is part of an entity."""
        return CommonAnswer(self._label_names.index(OUTSIDE), f"{OUTSIDE}, no entity", None, len(self._label_names))

    def data_report(self) -> DataReport:
        """Entities of each type on each client, what was left out or cut off, and what is odd about the rows."""
        return self._report

    @cached_property
    def _report(self) -> DataReport:
        heads = head_notes(self._options, TOKEN_HEAD, self._label_names)
        return DataReport(self._kinds, self._counts, (*self._notes, *heads))

    def predict(self, model: nn.Module, examples: Examples) -> Predictions:
        """Log-probabilities of the tags of each sentence's words, as far as `max_length` lets them in."""
        return predict(self, model, examples)

    def score(self, predictions: Predictions, examples: Examples) -> dict[str, float]:
        """Entity-level F1, precision, recall, and accuracy of tags, in [0, 1]; loss in nats for each word.

        A word beyond `max_length` counts as predicted outside of any entity: what is cut off is missed.
        """
        assert isinstance(examples, TaggedExamples)
        predicted = [[OUTSIDE] * len(tags) for tags in examples.tags]
        loss, num_labels = 0.0, 0
        found = zip(predicted, examples.words, predictions.log_probabilities, predictions.labels, strict=True)
        for tags, words, of_words, labels in found:
            for word, label in zip(words.tolist(), of_words.argmax(axis=-1), strict=True):
                tags[word] = self._label_names[label]
            loss -= float(np.take_along_axis(of_words, labels[:, None], axis=-1).sum(dtype=np.float64))
            num_labels += len(labels)
        right = sum(a == b for pair in zip(examples.tags, predicted, strict=True) for a, b in zip(*pair, strict=True))
        return entity_scores(examples.tags, predicted) | {
            "accuracy": right / sum(map(len, predicted)),
            "loss": loss / max(num_labels, 1),
        }

    def _pieces(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        words = [[word or "?" for word in row or ("?",)] for row in rows[self._columns.tokens]]
        out = self._tokenizer(
            words,
            is_split_into_words=True,
            truncation=True,
            max_length=self._options.max_length,
            return_attention_mask=True,
        )
        first = [_first_pieces(out.word_ids(row)) for row in range(len(words))]
        return {name: out[name] for name in inputs_of(self._tokenizer)} | {WORDS: first}

    def _examples(self, split: str, rows: Rows) -> TokenExamples:
        table = self._tables[split]
        rows = by_length(table, rows)
        sequences = read_sequences(table, rows, [*inputs_of(self._tokenizer), WORDS])
        first = sequences.pop(WORDS)
        tags = [self._tags[split][row] for row in rows.tolist()]
        # [-1] in front of the tags is what a piece without a label finds.
        labels = [np.append(NO_LABEL, of_words)[pieces + 1] for of_words, pieces in zip(tags, first, strict=True)]
        names = [[self._label_names[tag] for tag in of_words] for of_words in tags]
        words = [pieces[pieces >= 0] for pieces in first]
        return TaggedExamples({**sequences, "labels": labels}, self._padding, names, words)

    def _label_counts(self, rows: Rows) -> tuple[int, ...]:
        """Of the tags that are learned from: words beyond `max_length` have none."""
        first = read_sequences(self._tables["train"], rows, [WORDS])[WORDS]
        of_rows = zip((self._tags["train"][row] for row in rows.tolist()), first, strict=True)
        tags = np.concatenate([of_words[pieces[pieces >= 0]] for of_words, pieces in of_rows])
        return tuple(np.bincount(tags, minlength=len(self._label_names)).tolist())

    def _cut_off(self, usable: Mapping[str, Rows]) -> list[str]:
        notes = []
        for split, table in self._tables.items():
            read = table.select_columns([WORDS, "length"])[:]
            first, full = read[WORDS], np.array(read["length"]) == self._options.max_length
            # The last word has a piece unless it was cut off; a word may have none at all, but hardly the last.
            cut = sum(
                max(first[row], default=-1) < len(self._tags[split][row]) - 1
                for row in usable[split].tolist()
                if full[row]
            )
            if cut:
                notes.append(
                    f"split {str(table.split)!r}: {cut} of {len(usable[split])} sentences {verb(cut, 'are')} longer "
                    f"than task.max_length ({self._options.max_length}); entities beyond it count as missed"
                )
        return notes


def _first_pieces(word_ids: Sequence[int | None]) -> list[int]:
    """For each word piece, the word that begins with it; -1 where none does."""
    return [
        -1 if word is None or (place and word_ids[place - 1] == word) else word for place, word in enumerate(word_ids)
    ]


def _words(table: "Dataset", column: str) -> list[Any]:
    """Words of each row."""
    key = "task.data.columns.tokens"
    require_column(table, column, key)
    feature = table.features[column]
    if getattr(getattr(feature, "feature", None), "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(
            f"{key}: {column!r} of split {str(table.split)!r} must hold a list of words in every row, "
            f"its type is {feature}; name another column"
        )
    return column_values(table, column, key)


def _reasons(words: Sequence[Any], tags: Sequence[Any]) -> dict[str, Rows]:
    """Why rows can't be used: each reason with a mask of [rows]."""
    return {
        "have no words": np.array([not row for row in words], bool),
        "have another number of tags than words": np.array(
            [len(row or ()) != len(of_row or ()) for row, of_row in zip(words, tags, strict=True)], bool
        ),
        "have a word without a tag": np.array([None in (of_row or ()) for of_row in tags], bool),
    }
