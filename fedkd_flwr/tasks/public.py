"""Public examples: what every node has, so that models can be compared by what they say of it.

They are rows of a task's own training split, which no client has then, or of another table. Their labels are not read.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import BaseModel, Field, field_validator, model_validator

from fedkd_flwr.core.protocols import Examples
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.tasks.partition import Rows
from fedkd_flwr.tasks.source import DataSource, absolute_if_local, require_column

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 256


class HeldOutOptions(BaseModel, extra="forbid", frozen=True):
    """Rows of the training split. Attributes: `num_examples`, drawn by the seed; no client has them."""

    num_examples: int = Field(ge=1)


class PublicOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Where public examples come from.

    Attributes:
        num_examples: how many, drawn by the seed; null takes all of a source.
        source: a folder, a file, or the id of a data set of the Hugging Face Hub, the same on every node; null takes
            them out of the task's training split, and no client has them then.
        config: one of the data set's configurations, where it has several.
        revision: commit, branch or tag of a data set of the Hub.
        split: of the source.
    """

    num_examples: int | None = Field(None, ge=1)
    source: str | None = Field(None, min_length=1)
    config: str | None = Field(None, min_length=1)
    revision: str | None = Field(None, min_length=1)
    split: str = Field("train", min_length=1)

    @field_validator("source")
    @classmethod
    def _absolute(cls, source: str | None) -> str | None:
        return source and absolute_if_local(source)

    @model_validator(mode="after")
    def _number_or_source(self) -> Self:
        if self.source is None and self.num_examples is None:
            raise ValueError("needs source, or num_examples to be taken out of the training split")
        fields = type(self).model_fields
        given = [name for name in fields if name != "num_examples" and getattr(self, name) != fields[name].default]
        if self.source is None and given:
            raise ValueError(f"{given[0]} needs source: without one the examples are of the task's training split")
        return self

    def read(self) -> "Dataset":
        """The source's table; see `DataSource.read`."""
        source = DataSource.model_validate(
            {"source": self.source, "config": self.config, "revision": self.revision, "train_split": self.split}
            | ({"test_split": "train"} if self.split == "test" else {})
        )
        try:
            table: Dataset = source.read(self.split)
        except ValueError as error:
            raise ValueError(str(error).replace("task.data.", "task.public.")) from error
        return table


class PublicImageOptions(PublicOptions):
    """Public images. Attributes: `image`, their column; null takes the only one of type Image."""

    image: str | None = Field(None, min_length=1)

    def load(self) -> "Dataset":
        """The source's table."""
        return self.read()


class PublicTextOptions(PublicOptions):
    """Public texts.

    Attributes:
        text: their column, of texts or of lists of words, as data sets for the tagging of words have them; null takes
            the name of the task's own.
        text_pair: that of the second text where examples are pairs; likewise.
    """

    text: str | None = Field(None, min_length=1)
    text_pair: str | None = Field(None, min_length=1)

    def load(self, text: str, text_pair: str | None) -> "Dataset":
        """The source's texts, in columns called as the task's own are.

        Raises:
            ValueError: if a column is not there.
        """
        table = self.read()
        wanted = {self.text or text: text}
        if text_pair is not None:
            wanted[self.text_pair or text_pair] = text_pair
        for key, column in zip(("text", "text_pair"), wanted, strict=False):
            require_column(table, column, f"task.public.{key}")
        kept = _joined(table.select_columns(list(wanted)))
        renamed = {column: name for column, name in wanted.items() if column != name}
        return kept.rename_columns(renamed) if renamed else kept


def _joined(table: "Dataset") -> "Dataset":
    """Texts instead of lists of words."""
    lists = [name for name, feature in table.features.items() if _dtype(getattr(feature, "feature", None)) == "string"]
    if not lists:
        return table
    from datasets import Features, Value

    features = Features({name: Value("string") if name in lists else table.features[name] for name in table.features})
    return table.map(lambda rows: {name: _texts(rows[name]) for name in lists}, batched=True, features=features)


def _texts(rows: Sequence[Sequence[str | None] | None]) -> list[str | None]:
    return [None if words is None else " ".join(word or "" for word in words) for words in rows]


def _dtype(feature: object) -> str:
    return str(getattr(feature, "dtype", "")).removeprefix("large_")


class PublicRows:
    """Some rows of a table as public examples; see `PublicExamples`.

    Args:
        rows: in their order.
        read: from rows, and the labels that they are to have, to examples in that order.
    """

    def __init__(self, rows: Rows, read: Callable[[Rows, Rows], Examples]) -> None:
        self._rows = rows
        self._read = read

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._rows)

    def select(self, positions: Sequence[int]) -> Examples:
        """Those at some positions, which are their labels."""
        places = np.asarray(positions, np.int64)
        return self._read(self._rows[places], places)

    def digest(self) -> bytes:
        """Of what models would see of all of them, 32 bytes."""
        state = hashlib.sha256()
        for batch in self.select(range(len(self))).batches(_BATCH):
            for name in sorted(batch):
                values: Any = batch[name].contiguous().numpy()
                state.update(f"{name}:{values.dtype.str}:{values.shape}\n".encode() + values.tobytes())
        return state.digest()


def public_notes(notes: Sequence[str]) -> tuple[str, ...]:
    """Notes on a table of public examples, told apart from those on the task's own."""
    return tuple(f"public examples: {note}" for note in notes)


def held_out(rows: Rows, num_examples: int | None, seed: int) -> tuple[Rows, Rows]:
    """Draw public rows from usable ones.

    Args:
        rows: usable.
        num_examples: how many.
        seed: of the experiment.

    Returns:
        The public rows, and the others.

    Raises:
        ValueError: if there are not as many.
    """
    number = num_examples or 0
    if number > len(rows):
        raise ValueError(
            f"task.public.num_examples must be at most {len(rows)}, the rows that can be used, got {number}"
        )
    order = np.random.default_rng(derive_seed(seed, "public")).permutation(len(rows))
    return np.sort(rows[order[:number]]), np.sort(rows[order[number:]])
