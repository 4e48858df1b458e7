"""Words with one tag each, entities in IOB2: any data set of the Hub or local files, any Hugging Face model.

A tag belongs to a word, a model reads word pieces: the first piece of a word carries its tag. Later pieces of a word
and special tokens carry no label and are left out of the cross-entropy and of the KL divergence. The terms of hidden
states and of attention compare every real token, those among them, because both models see them; only padding is left
out of all.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import nn

from fedkd_flwr.core.losses import NO_LABEL
from fedkd_flwr.core.predictions import Predictions
from fedkd_flwr.core.protocols import DataReport, Examples
from fedkd_flwr.tasks.partition import IidPartition, Rows, TablePartition, client_notes
from fedkd_flwr.tasks.scores import entity_scores, entity_spans, predict
from fedkd_flwr.tasks.source import DataSource, column_values, require_column
from fedkd_flwr.tasks.table import ClassWeights, ClientRows, class_weights, left_out, load_tables
from fedkd_flwr.tasks.text import TextTask, TextTaskOptions, TokenExamples, by_length, inputs_of, read_sequences

if TYPE_CHECKING:
    from datasets import Dataset

OUTSIDE = "O"
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
        label_names: the tags in order, in IOB2 and with "O"; null takes those that the data names or has.
        class_weights: how much each tag counts in the task loss: "balanced" by the training split's counts, one number
            for each tag, or null for all alike.
        partition: how the training split is divided. A partition by label goes by the type of entity that a sentence
            has most of; sentences without entities are a class of their own.
        client_test_fraction: share of its training rows that a client keeps for its own score, in (0, 1), unless a
            natural partition gives it rows of the test split.
    """

    name: Literal["token_classification"] = "token_classification"
    data: TokenData
    label_names: tuple[str, ...] | None = Field(None, min_length=2)
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

    def __init__(self, options: TokenClassificationOptions, num_clients: int, seed: int) -> None:
        self._columns = columns = options.data.columns
        tables = dict(zip(("train", "test"), load_tables(options.data, options.partition), strict=True))
        usable: dict[str, Rows] = {}
        notes: list[str] = []
        tags: dict[str, list[list[Any] | None]] = {}
        for split, table in tables.items():
            words = _words(table, columns.tokens)
            tags[split] = _tag_texts(table, columns.tags)
            usable[split], noted = left_out(str(table.split), _reasons(words, tags[split]), len(table))
            notes.extend(noted)
        names = options.label_names or _tag_names(tags["train"], usable["train"])
        _require_iob2(names)
        if len(names) < 2:
            raise ValueError(f"task.data.columns.tags: {columns.tags!r} has no entities; name another column")
        self._tags = {
            split: _indices(tags[split], usable[split], names, columns.tags, str(table.split))
            for split, table in tables.items()
        }
        kinds = sorted({name.partition("-")[2] for name in names} - {""})
        entities = _entity_counts(self._tags["train"], names, kinds)
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
        super().__init__(options, "AutoModelForTokenClassification", tables, usable["test"], rows, names, weights)
        self._example_labels = torch.zeros((1, 2), dtype=torch.int64)
        counts = tuple(tuple(int(n) for n in entities[mine].sum(axis=0)) for mine in rows.train)
        self._report = DataReport(tuple(kinds), counts, (*notes, *self._cut_off(usable), *client_notes(counts)))

    def data_report(self) -> DataReport:
        """Entities of each type on each client, and what was left out or cut off."""
        return self._report

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
                    f"split {str(table.split)!r}: {cut} of {len(usable[split])} sentences are longer than "
                    f"task.max_length ({self._options.max_length}); entities beyond it count as missed"
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


def _tag_texts(table: "Dataset", column: str) -> list[list[Any] | None]:
    """Tags of each row, by the names that the table gives to numbers where it does."""
    values = column_values(table, column, "task.data.columns.tags")
    feature = table.features[column]
    inner = getattr(feature, "feature", None)
    if inner is None or isinstance(inner, dict) or hasattr(inner, "feature"):  # no lists, or lists of what is no tag
        raise ValueError(
            f"task.data.columns.tags: {column!r} of split {str(table.split)!r} must hold a list of tags in every row, "
            f"its type is {feature}; name another column"
        )
    if (names := getattr(inner, "names", None)) is None:
        return values
    named = dict(enumerate(names))
    return [None if row is None else [named.get(tag, tag) for tag in row] for row in values]


def _reasons(words: Sequence[Any], tags: Sequence[Any]) -> dict[str, Rows]:
    """Why rows can't be used: each reason with a mask of [rows]."""
    return {
        "have no words": np.array([not row for row in words], bool),
        "have another number of tags than words": np.array(
            [len(row or ()) != len(of_row or ()) for row, of_row in zip(words, tags, strict=True)], bool
        ),
        "have a word without a tag": np.array([None in (of_row or ()) for of_row in tags], bool),
    }


def _tag_names(tags: Sequence[Any], usable: Rows) -> tuple[str, ...]:
    """The tags that occur: "O" first, then by type, B- before I-; numbers can't be told apart without names."""
    present = {tag for row in usable.tolist() for tag in tags[row]}
    if numbers := [tag for tag in present if not isinstance(tag, str)]:
        raise ValueError(
            f"task.label_names: required, because the tags are numbers such as {numbers[0]}; name them in order, "
            "as O, B-PER, I-PER"
        )
    kinds = sorted({tag.partition("-")[2] for tag in present} - {""})
    pairs = [f"{prefix}-{kind}" for kind in kinds for prefix in "BI"]
    return (OUTSIDE, *pairs, *sorted(present - {OUTSIDE, *pairs}))


def _require_iob2(names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"task.label_names: names {twice[0]!r} twice; give each tag once")
    wrong = [name for name in names if name != OUTSIDE and (name[:2] not in ("B-", "I-") or len(name) < 3)]
    if wrong or OUTSIDE not in names:
        got = repr(wrong[0]) if wrong else "no 'O'"
        raise ValueError(
            f"task.label_names: tags must be 'O', 'B-...' and 'I-...' (IOB2), got {got}; name another column, or "
            "set label_names"
        )


def _indices(tags: Sequence[Any], usable: Rows, names: Sequence[str], column: str, split: str) -> list[Rows]:
    """Tags of each row as numbers, [words]; empty for a row that can't be used."""
    numbers: dict[Any, int] = {name: label for label, name in enumerate(names)}
    found = [np.zeros(0, np.int64)] * len(tags)
    for row in usable.tolist():
        known = [numbers.get(tag, tag) if isinstance(tag, str) else tag for tag in tags[row]]
        for tag in known:
            if not isinstance(tag, int) or not 0 <= tag < len(names):
                raise ValueError(
                    f"task.data.columns.tags: {column!r} has {tag!r} in row {row} of split {split!r}, which is none "
                    f"of {', '.join(names)}; set task.label_names, or correct the row"
                )
        found[row] = np.array(known, np.int64)
    return found


def _entity_counts(tags: Sequence[Rows], names: Sequence[str], kinds: Sequence[str]) -> Rows:
    """Entities of each type in each row: [rows, types]."""
    counts = np.zeros((len(tags), len(kinds)), np.int64)
    for row, of_words in enumerate(tags):
        for _, _, kind in entity_spans([names[tag] for tag in of_words]):
            counts[row, kinds.index(kind)] += 1
    return counts
