"""News and impressions: tables with lists in their columns, or the files of MIND; articles are numbers from here on.

Wu et al., "MIND: a large-scale dataset for news recommendation", ACL 2020,
https://aclanthology.org/2020.acl-main.331.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

from fedkd_flwr.tasks.impressions import Articles, Ragged
from fedkd_flwr.tasks.partition import Rows
from fedkd_flwr.tasks.source import DataSource, RowNames, column_values, require_column, require_text
from fedkd_flwr.tasks.split_names import found_in
from fedkd_flwr.tasks.table import left_out, verb
from fedkd_flwr.tasks.text import encoded, inputs_of

if TYPE_CHECKING:
    from datasets import Dataset

# MIND's files have no header.
_MIND_NEWS = (
    "news_id",
    "category",
    "subcategory",
    "title",
    "abstract",
    "url",
    "title_entities",
    "abstract_entities",
)
_MIND_BEHAVIORS = ("impression_id", "user_id", "time", "history", "impressions")

_REASONS = (
    "have no candidates",
    "have another number of labels than candidates",
    "have a label other than 0 and 1",
    "have no click",
    "have clicks only",
    "name an article that no news file has",
)
_USABLE = len(_REASONS)
_LABELS = {"0": 0, "0.0": 0, "False": 0, "1": 1, "1.0": 1, "True": 1}


class NewsColumns(BaseModel, extra="forbid", frozen=True):
    """What the columns are called.

    Attributes:
        news_id: of the news, names an article.
        title: of the news.
        abstract: of the news; read only where the task asks for it.
        history: of the impressions: ids of what the user read before, the newest last; a list, or a text of ids with
            blanks between them.
        candidates: of the impressions: ids of what was shown, likewise.
        labels: of the impressions: 1 for each candidate that was clicked, 0 for the others, likewise.
        impressions: candidates with their labels as MIND has them, "N3-1 N4-0"; read where there is no column of
            candidates.
    """

    news_id: str = Field("news_id", min_length=1)
    title: str = Field("title", min_length=1)
    abstract: str = Field("abstract", min_length=1)
    history: str = Field("history", min_length=1)
    candidates: str = Field("candidates", min_length=1)
    labels: str = Field("labels", min_length=1)
    impressions: str = Field("impressions", min_length=1)


class NewsData(DataSource):
    """A folder or a data set of the Hub with tables of news and of impressions.

    Files are Parquet, CSV or JSON; what ends in .tsv is MIND's own, without header and quotes.

    Attributes:
        news_files: the articles; of those with one id, the first is read.
        train_file: impressions to train on; `train_split` may take a part of them, such as "train[:10%]".
        test_file: impressions for the server's score; likewise `test_split`.
        columns: their names.
    """

    news_files: tuple[str, ...] = Field(("news.parquet",), min_length=1)
    train_file: str = Field("train.parquet", min_length=1)
    test_file: str = Field("test.parquet", min_length=1)
    columns: NewsColumns = NewsColumns()

    @model_validator(mode="after")
    def _files_differ(self) -> Self:
        if os.path.isfile(self.source):
            raise ValueError(
                f"source must be the folder or the data set that holds {self.news_files[0]!r}, {self.train_file!r} and "
                f"{self.test_file!r}, got the file {self.source!r}; name files in news_files, train_file and test_file"
            )
        if self.train_file == self.test_file:
            raise ValueError(f"test_file must differ from train_file, got {self.test_file!r} for both")
        return self

    def load(self) -> "tuple[Dataset, Dataset]":
        """Impressions to train on and to score on.

        Raises:
            ValueError: if there is no such file, or it can't be read.
        """
        train = self._table("train_file", self.train_file, "train", self.train_split, _MIND_BEHAVIORS)
        return train, self.load_test()

    def load_test(self) -> "Dataset":
        """Impressions to score on; see `load`."""
        return self._table("test_file", self.test_file, "test", self.test_split, _MIND_BEHAVIORS)

    def load_train(self) -> "tuple[Dataset, Dataset | None]":
        """Impressions to train on, and those to score on where there is their file; see `load`."""
        train = self._table("train_file", self.train_file, "train", self.train_split, _MIND_BEHAVIORS)
        return train, self.load_test() if os.path.isfile(os.path.join(self.source, self.test_file)) else None

    def load_news(self) -> "list[Dataset]":
        """The articles, a table for each file.

        Raises:
            ValueError: if there is no such file, or it can't be read.
        """
        return [self._table("news_files", file, "news", "news", _MIND_NEWS) for file in self.news_files]

    def _table(self, key: str, file: str, name: str, split: str, columns_of_mind: Sequence[str]) -> "Dataset":
        there = os.path.join(self.source, file)
        if os.path.isdir(self.source) and not glob.has_magic(file) and not os.path.isfile(there):
            raise ValueError(
                f"task.data.{key}: {self.source!r} holds no file {file!r} but {found_in(self.source)}; name one by "
                "its path within that folder"
            )
        names = columns_of_mind if ".tsv" in Path(file.lower()).suffixes else None
        table: Dataset = self.read(split, file=(name, file), names=names)
        return table


class News(NamedTuple):
    """All articles; `numbers` says which one an id names, `notes` what is odd about some."""

    articles: Articles
    numbers: dict[str, int]
    notes: tuple[str, ...]


def read_news(data: NewsData, tokenizer: Any, max_length: int, *, use_abstract: bool) -> News:
    """Encode the articles.

    Args:
        data: where they are.
        tokenizer: cuts them into pieces.
        max_length: pieces of an article.
        use_abstract: whether the abstract follows the title.

    Raises:
        ValueError: if a file can't be read, or lacks a column of texts.
    """
    from datasets import concatenate_datasets

    columns = data.columns
    texts = [columns.title, columns.abstract] if use_abstract else [columns.title]
    names = [name for name in inputs_of(tokenizer) if name != "attention_mask"]  # rows' lengths say as much
    # A model must have something to read of an article without words, and not every tokenizer adds marks to it.
    nothing = tokenizer.pad_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id

    def encode(rows: Mapping[str, list[Any]]) -> Mapping[str, list[Any]]:
        out = tokenizer(
            *([text or "" for text in rows[name]] for name in texts), truncation=True, max_length=max_length
        )
        pieces = {name: list(out[name]) for name in names}
        for row in (row for row, ids in enumerate(pieces["input_ids"]) if not ids):
            for name in names:
                pieces[name][row] = [nothing if name == "input_ids" else 0]
        return pieces

    ids: list[str | None] = []
    untitled: list[str | None] = []
    tables = []
    rules = {"task": "news", "texts": texts, "max_length": max_length}
    for table in data.load_news():
        for name, key in zip(texts, ("title", "abstract"), strict=False):
            require_text(table, name, f"task.data.columns.{key}")
        mine = [_name(value) for value in column_values(table, columns.news_id, "task.data.columns.news_id")]
        titles = column_values(table, columns.title, "task.data.columns.title")
        untitled += [name for name, title in zip(mine, titles, strict=True) if not (title and title.strip())]
        ids += mine
        tables.append(encoded(table, tokenizer, rules, encode))
    together = concatenate_datasets(tables)
    # Backwards, so that the first of those with one id stays.
    numbers = {name: number for number, name in reversed(list(enumerate(ids))) if name is not None}
    note = (
        f"news: {len(untitled)} of {len(ids)} articles {verb(len(untitled), 'have')} no title (the first is "
        f"{next(iter(untitled), None)!r}); read without it"
    )
    articles = Articles({name: Ragged.read(together, name) for name in names}, int(tokenizer.pad_token_id))
    return News(articles, numbers, (note,) if untitled else ())


class Impressions(NamedTuple):
    """A split with articles as numbers.

    `table` has the columns history, candidates and labels, lists of whole numbers; `usable` are its rows that can be
    used, `notes` says why others can't.
    """

    table: "Dataset"
    usable: Rows
    notes: tuple[str, ...]


def read_impressions(
    table: "Dataset", columns: NewsColumns, numbers: Mapping[str, int], max_history: int
) -> Impressions:
    """Replace ids by numbers; computed once and kept in the library's cache, as word pieces are.

    Args:
        table: a split.
        columns: their names.
        numbers: of the articles, by id.
        max_history: newest articles of a history that are kept.

    Raises:
        ValueError: if a column is missing, or no row can be used.
    """
    from datasets import Features, Sequence, Value

    require_column(table, columns.history, "task.data.columns.history")
    shown = _shown(table, columns)

    def index(rows: Mapping[str, list[Any]]) -> Mapping[str, list[Any]]:
        histories = [
            [numbers.get(name, -1) for name in _names(value)[-max_history:]] for value in rows[columns.history]
        ]
        names, labels = zip(*shown(rows), strict=True)
        candidates = [[numbers.get(name, -1) for name in row] for row in names]
        reasons = [_reason(*row) for row in zip(histories, candidates, labels, strict=True)]
        return {"history": histories, "candidates": candidates, "labels": list(labels), "reason": reasons}

    rules = json.dumps({"task": "impressions", "columns": columns.model_dump(), "max_history": max_history})
    key = hashlib.sha256("\n".join([table._fingerprint, rules, *numbers]).encode())
    key.update(np.fromiter(numbers.values(), np.int64).tobytes())
    lists = {
        name: Sequence(Value(kind))
        for name, kind in (("history", "int32"), ("candidates", "int32"), ("labels", "int8"))
    }
    indexed = table.map(
        index,
        batched=True,
        remove_columns=table.column_names,
        features=Features(lists | {"reason": Value("int8")}),
        new_fingerprint=key.hexdigest()[:32],
    )
    reasons = np.array(column_values(indexed, "reason", ""), np.int64)
    masks = {reason: reasons == code for code, reason in enumerate(_REASONS)}
    usable, notes = left_out(str(table.split), masks, len(table), RowNames(table))
    return Impressions(indexed, usable, notes)


def _shown(
    table: "Dataset", columns: NewsColumns
) -> Callable[[Mapping[str, list[Any]]], Iterable[tuple[list[str], list[int]]]]:
    """What reads the ids and the labels of candidates from some rows of this table."""
    if columns.candidates not in table.column_names and columns.impressions in table.column_names:
        return lambda rows: map(_labelled, rows[columns.impressions])
    if columns.candidates not in table.column_names:
        raise ValueError(
            f"task.data.columns.candidates: split {str(table.split)!r} has no column {columns.candidates!r}, and no "
            f"column {columns.impressions!r} of MIND's impressions; columns: {', '.join(table.column_names)}"
        )
    require_column(table, columns.labels, "task.data.columns.labels")
    return lambda rows: (
        (_names(names), [_LABELS.get(label, -1) for label in _names(labels)])
        for names, labels in zip(rows[columns.candidates], rows[columns.labels], strict=True)
    )


def _labelled(value: Any) -> tuple[list[str], list[int]]:
    """Ids and labels of "N3-1 N4-0"; fewer labels than ids where some have none, as in MIND's own test split."""
    parts = [shown.rpartition("-") for shown in _names(value)]
    names = [name if dash else rest for name, dash, rest in parts]
    return names, [_LABELS.get(rest, -1) for _, dash, rest in parts if dash]


def _names(value: Any) -> list[str]:
    """A list, or a text with blanks between its items, as texts; none where there is nothing."""
    if value is None:
        return []
    items = value if isinstance(value, list) else str(value).split()
    return [str(item) for item in items]


def _name(value: Any) -> str | None:
    """An id as a text: where one file has numbers, another may have texts of them."""
    return None if value is None or value == "" else str(value)


def _reason(history: Sequence[int], candidates: Sequence[int], labels: Sequence[int]) -> int:
    """The place in `_REASONS` of why an impression can't be used, or `_USABLE`."""
    problems = (
        not candidates,
        len(labels) != len(candidates),
        -1 in labels,
        1 not in labels,
        0 not in labels,
        -1 in history or -1 in candidates,
    )
    return problems.index(True) if True in problems else _USABLE
