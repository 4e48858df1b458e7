"""Where a task's tables come from: a data set of the Hugging Face Hub, or local files, by one call of `datasets`.

Parquet, CSV, JSON and folders of images are read alike. The library keeps an Arrow copy in its cache, maps it into
memory and reads single rows, so a process holds no more than it asks for.
"""

import json
import logging
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from pydantic import BaseModel, Field, field_validator, model_validator

from fedkd_flwr.disk import refuse_unwritable
from fedkd_flwr.tasks.split_names import ALLOWED, found_in

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_MAX_REASON = 300


class DataFileError(ValueError):
    """A file of a data set that can't be read; the message names it by its path within the data set."""


def absolute_if_local(source: str) -> str:
    """What exists on this machine by its absolute path: the processes of a run start in another directory."""
    local = os.path.expanduser(source)
    return os.path.abspath(local) if os.path.exists(local) else source


def reason_of(error: BaseException) -> str:
    """Why loading failed, in one line that is not too long."""
    cause = error.__cause__ or error
    return " ".join(f"{type(cause).__name__}: {cause}".split()).removesuffix(".")[:_MAX_REASON]


class DataSource(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A data set with a split to train on and one to test on. Text instead of a mapping is the source.

    Attributes:
        source: a folder, a file, or the id of a data set of the Hugging Face Hub. What exists here is made absolute;
            every machine needs it at that place.
        config: one of the data set's configurations, where it has several.
        revision: commit, branch or tag of a data set of the Hub.
        train_split: its training examples, such as "train" or "train[:80%]"; a single file is all "train".
        test_split: the server's test examples; a slice of the same split must not overlap with that of `train_split`.
    """

    source: str = Field(min_length=1)
    config: str | None = Field(None, min_length=1)
    revision: str | None = Field(None, min_length=1)
    train_split: str = Field("train", min_length=1)
    test_split: str = Field("test", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _source_alone(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("source")
    @classmethod
    def _absolute(cls, source: str) -> str:
        return absolute_if_local(source)

    @model_validator(mode="after")
    def _splits_differ(self) -> Self:
        if self.train_split == self.test_split:
            raise ValueError(f"test_split must differ from train_split, got {self.test_split!r} for both")
        return self

    def at(self, path: Path) -> Self:
        """The same data by another source: a folder or a file of this machine."""
        return self.model_copy(update={"source": str(path), "config": None, "revision": None})

    def load(self) -> "tuple[Dataset, Dataset]":
        """The training split and the test split.

        Raises:
            ValueError: if there is no such data, it can't be read, or a split is empty.
        """
        train, test = self.read([self.train_split, self.test_split])
        require_disjoint(train, self.train_split, self.test_split)
        return train, test

    def load_test(self) -> "Dataset":
        """The test split alone; see `load`."""
        table: Dataset = self.read(self.test_split)
        return table

    def load_train(self) -> "tuple[Dataset, Dataset | None]":
        """The training split, and the test split where there is one; see `load`."""
        train: Dataset = self.read(self.train_split)
        return (train, None) if _lacks(train, self.test_split) else self.load()

    def read(self, split: str | list[str], *, file: tuple[str, str] | None = None, names: Any = None) -> Any:
        """Splits of this source; see `readers.load`.

        Args:
            split: one or several.
            file: the name of a split and the only file of it; None takes those that the library finds.
            names: of the columns of delimited files without a header.

        Raises:
            ValueError: if there is no such data, or it can't be read.
        """
        local = os.path.exists(self.source)
        if not local and not _HUB_ID.fullmatch(self.source):
            raise ValueError(
                f"task.data.source: there is no folder or file {self.source!r}; "
                "set it to one, best by an absolute path, or to the id of a data set of the Hugging Face Hub"
            )
        # Imported here: it takes seconds, and checking a configuration should not.
        import datasets

        from fedkd_flwr.tasks import readers

        path, files = self.source, None if file is None else dict([file])
        if os.path.isfile(path):
            path, files = os.path.split(path)  # type: ignore[assignment]
        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # a README need not be a data card
        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what they log is raised, too
        try:
            return readers.load(path, self.config, revision=self.revision, split=split, data_files=files, names=names)
        except Exception as error:  # the library's own, and those of the network, the disk and every file format
            refuse_unwritable(error)
            raise ValueError(f"task.data.source: {self._failure(error, local=local)}") from error

    def _failure(self, error: Exception, *, local: bool) -> str:
        told: BaseException | None = error
        while told is not None:
            if isinstance(told, DataFileError):
                return f"{self.source!r} can't be loaded: {told}"
            told = told.__cause__
        reason = reason_of(error)
        if local and "Unknown split" in reason and os.path.isdir(self.source):
            return (
                f"{self.source!r} can't be loaded ({reason}); it holds {found_in(self.source)}; files and folders are "
                f"splits by their names: {ALLOWED}; set train_split and test_split to those that are there"
            )
        if local:
            return (
                f"{self.source!r} can't be loaded ({reason}); "
                "it must hold Parquet, CSV, JSON or image files, their endings in small letters, and have both "
                "train_split and test_split"
            )
        return (
            f"{self.source!r} is no folder or file here, and can't be loaded from the Hugging Face Hub ({reason}); "
            "check source, config, revision, splits and the connection"
        )


@dataclass(slots=True)
class Reading:
    """What was seen while files were read; kept with the copy, as the description of a data set.

    Attributes:
        rows: of each split, its files in order, each with its number of rows.
        columns: of each split.
        notes: one line each.
        classes: of each split, columns whose numbers have other class names in its files than in those of the first;
            no names where its own files don't agree.
    """

    rows: dict[str, list[tuple[str, int]]]
    columns: dict[str, list[str]]
    notes: list[str]
    classes: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, table: "Dataset") -> "Reading | None":
        """That of the files that a table comes from; None of a table that was made otherwise."""
        try:
            value = json.loads(table.info.description or "")
            return cls(value["rows"], value["columns"], value["notes"], value["classes"])
        except (ValueError, KeyError, TypeError):
            return None

    def text(self) -> str:
        """It as the library keeps it."""
        return json.dumps(asdict(self))

    def place(self, table: "Dataset", row: int) -> str:
        """A row of a split as an error names it: by its file and its number there, from 0."""
        from datasets import ReadInstruction

        sizes = {name: info.num_examples for name, info in (table.info.splits or {}).items()}
        for part in ReadInstruction.from_spec(str(table.split)).to_absolute(sizes):
            if row >= part.to - part.from_:
                row -= part.to - part.from_
                continue
            row += part.from_
            for file, num_rows in self.rows[part.splitname]:
                if row < num_rows:
                    return f"row {row} of {file!r}"
                row -= num_rows
        return f"row {row}"


class RowNames:
    """What the rows of a split are called in errors and notes.

    Args:
        table: the split, as it was loaded.
    """

    def __init__(self, table: "Dataset") -> None:
        self.table = table

    def __call__(self, row: int) -> str:
        """Of one row."""
        reading = Reading.of(self.table)
        return f"row {row}" if reading is None else reading.place(self.table, row)

    @property
    def notes(self) -> tuple[str, ...]:
        """What looked like an accident in the files of the split, one line each."""
        reading = Reading.of(self.table)
        if reading is None:
            return ()
        files = [name for name, _ in reading.rows.get(str(self.table.split).partition("[")[0], [])]
        return tuple(note for note in reading.notes if any(note.startswith(f"file {file!r}") for file in files))


def _lacks(table: "Dataset", split: str) -> bool:
    """Whether the data set that a table comes from does not have a split, or one that it is a slice of."""
    from datasets import ReadInstruction

    sizes = {name: info.num_examples for name, info in (table.info.splits or {}).items()}
    try:
        ReadInstruction.from_spec(split).to_absolute(sizes)
    except ValueError:
        return True
    return False


def require_disjoint(table: "Dataset", train_split: str, test_split: str) -> None:
    """Check that no row is both to train on and to test on.

    Args:
        table: of either, as `datasets` loaded it.
        train_split: such as "train[:80%]".
        test_split: likewise.

    Raises:
        ValueError: if slices of one split overlap.
    """
    from datasets import ReadInstruction

    sizes = {name: split.num_examples for name, split in (table.info.splits or {}).items()}
    if not sizes:
        return
    train, test = (ReadInstruction.from_spec(spec).to_absolute(sizes) for spec in (train_split, test_split))
    for a in train:
        for b in test:
            if a.splitname == b.splitname and max(a.from_, b.from_) < min(a.to, b.to):
                raise ValueError(
                    f"task.data.test_split: {test_split!r} and train_split {train_split!r} share rows of split "
                    f"{a.splitname!r}; give slices that don't overlap, such as train[:80%] and train[80%:]"
                )


def require_column(table: "Dataset", column: str, key: str) -> None:
    """Check that a split has a column.

    Args:
        table: a split.
        column: its name.
        key: the option that names the column.

    Raises:
        ValueError: if it does not; the message lists the columns that are there.
    """
    if column not in table.column_names:
        raise ValueError(
            f"{key}: split {str(table.split)!r} has no column {column!r}; columns: {', '.join(table.column_names)}"
        )


def column_values(table: "Dataset", column: str, key: str) -> list[Any]:
    """All values of a column; see `require_column`."""
    require_column(table, column, key)
    return cast(list[Any], table.select_columns([column])[:][column])


def require_text(table: "Dataset", column: str, key: str) -> None:
    """Check that a split has a column of texts; see `require_column`."""
    require_column(table, column, key)
    feature = table.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(
            f"{key}: {column!r} of split {str(table.split)!r} holds no texts but {feature}; store texts, or name "
            "another"
        )
