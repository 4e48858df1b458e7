"""Text as word pieces: a tokenizer, a table encoded once and kept on disk, batches padded to their longest row."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from torch import Tensor, nn

from fedkd_flwr.core.losses import NO_LABEL
from fedkd_flwr.core.protocols import Batch, Models, Outputs
from fedkd_flwr.disk import refuse_unwritable
from fedkd_flwr.tasks.base import TableTask
from fedkd_flwr.tasks.families import EXAMPLE_LENGTH, MadeUpTexts, require_readable
from fedkd_flwr.tasks.partition import Rows
from fedkd_flwr.tasks.source import absolute_if_local, reason_of
from fedkd_flwr.tasks.table import ClientRows
from fedkd_flwr.tasks.transformer import (
    TransformerOptions,
    Transformers,
    TransformerTaskOptions,
    save_transformer,
    vocabulary_of,
)

if TYPE_CHECKING:
    from datasets import Dataset

ENCODED_BYTES = 256 * 2**20  # of clients' word pieces that one process keeps
_WINDOW = 16  # batches among which rows are sorted by length: less padding, and still another order in every epoch
_ROWS_AT_ONCE = 1000
FORMAT = 1  # of encoded tables: raise it with any change to what a task encodes, or caches of older code are read

Encode = Callable[[Mapping[str, list[Any]]], Mapping[str, list[Any]]]


class TokenizerOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A tokenizer by hub id or folder. Text instead of a mapping is the source."""

    source: str = Field(min_length=1)
    revision: str | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _source_alone(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("source")
    @classmethod
    def _absolute(cls, source: str) -> str:
        return absolute_if_local(source)


class TextTaskOptions(TransformerTaskOptions):
    """Options of tasks whose models read text.

    Attributes:
        tokenizer: null takes the teacher's; needed where the teacher has random weights.
        max_length: word pieces of an example; what is longer is cut.
    """

    tokenizer: TokenizerOptions | None = None
    max_length: int = Field(128, ge=4, le=100_000)

    def load_tokenizer(self) -> Any:
        """The tokenizer that all models of the task share.

        Raises:
            ValueError: if there is none, or one of the models was pretrained with another.
        """
        chosen = self.tokenizer
        if chosen is None and self.teacher.source is not None:
            chosen = TokenizerOptions(source=self.teacher.source, revision=self.teacher.revision)
        if chosen is None:
            raise ValueError("task.tokenizer: required, because the teacher has no source; give a hub id or a folder")
        key = "task.tokenizer.source" if self.tokenizer else "task.teacher.source"
        tokenizer = _load_tokenizer(chosen.source, chosen.revision, key)
        if _is_blank(tokenizer):
            raise ValueError(f"{key}: {chosen.source!r} holds no tokenizer; name one in task.tokenizer")
        own = {"task.teacher": self.teacher} | {
            f"task.other_teachers.{n}.model": other.model for n, other in enumerate(self.other_teachers)
        }
        if isinstance(self.student, TransformerOptions):
            own["task.student"] = self.student
        for name, model in own.items():
            if model.source is not None and model.source != chosen.source:
                other = _load_tokenizer(model.source, model.revision, f"{name}.source")
                if not _is_blank(other) and other.get_vocab() != tokenizer.get_vocab():
                    raise ValueError(
                        f"{name}.source: {model.source!r} has other tokens than {chosen.source!r}, "
                        "so the two models can't read the same batch; use models with one vocabulary"
                    )
        if tokenizer.pad_token_id >= tokenizer.vocab_size:  # added to a vocabulary that had none
            sizes = [size for model in own.values() if (size := vocabulary_of(model)) is not None]
            _pad_within(tokenizer, min(sizes, default=len(tokenizer)))
        tokenizer.model_max_length = self.max_length
        return tokenizer


def _load_tokenizer(source: str, revision: str | None, key: str) -> Any:
    # Imported here: it takes seconds, and checking a configuration should not.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, use_fast=True, trust_remote_code=False)
    except Exception as error:  # the library's own, and those of the network and the disk
        refuse_unwritable(error)
        raise ValueError(
            f"{key}: no tokenizer can be loaded from {source!r} ({reason_of(error)}); "
            "check the id or folder, and the connection, or name another in task.tokenizer"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{key}: {source!r} has no fast tokenizer (tokenizer.json); name another in task.tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError(f"{key}: the tokenizer of {source!r} has no padding token; name another in task.tokenizer")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _is_blank(tokenizer: Any) -> bool:
    """Whether it knows special tokens only: what the library makes up for a folder that has weights alone."""
    return len(tokenizer) <= len(set(tokenizer.all_special_tokens))


def _pad_within(tokenizer: Any, size: int) -> None:
    """Let a tokenizer pad with a token below `size`, where its own is one that no model has a row for.

    Which one it is makes no difference, for the mask hides it. The token itself is removed, or a text that spells it
    out would still become its number.
    """
    from tokenizers import Tokenizer

    pad = tokenizer.pad_token_id
    candidates = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    chosen = next((other for other in candidates if other is not None and other < size), None)
    if pad < size or chosen is None:
        return
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["id"] != pad]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(rules | {"padding": None}))


def require_vocabulary(model_name: str, model: torch.nn.Module, tokenizer: Any) -> None:
    """Check that a model knows every token.

    Raises:
        ValueError: if the tokenizer has more.
    """
    config = model.config
    assert not isinstance(config, Tensor | nn.Module)
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int) and (unknown := [t for t, number in tokenizer.get_vocab().items() if number >= size]):
        raise ValueError(
            f"task.{model_name}: the tokenizer has {len(tokenizer)} tokens, the model {size}, and {unknown[0]!r} is "
            "not among them; set config.vocab_size of a model without source, else name the tokenizer that it was made "
            "with in task.tokenizer, or give it more rows (resize_token_embeddings) and save it"
        )


def encoded(table: "Dataset", tokenizer: Any, settings: Mapping[str, Any], encode: Encode) -> "Dataset":
    """A table's rows as numbers, computed once, kept in the library's cache and mapped into memory.

    Args:
        table: a split.
        tokenizer: part of the cache's key, together with the table and `settings`.
        settings: whatever else decides the result of `encode`, as plain values.
        encode: from columns of some rows to new columns of as many rows.
    """
    # A fingerprint of our own: the library's would follow a tokenizer's settings for padding, which calls change.
    pieces = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    rules = [table._fingerprint, *(json.dumps(part) for part in (FORMAT, pieces, inputs_of(tokenizer)))]
    rules.append(json.dumps(settings, sort_keys=True))
    key = hashlib.sha256("\n".join(rules).encode()).hexdigest()[:32]
    return table.map(
        encode, batched=True, batch_size=_ROWS_AT_ONCE, remove_columns=table.column_names, new_fingerprint=key
    )


def inputs_of(tokenizer: Any) -> list[str]:
    """What a tokenizer makes of a text, for models that take it.

    The mask is always among it, so call the tokenizer with `return_attention_mask=True`: a batch is padded, and without
    a mask padding would count in a model and in the losses on tokens.
    """
    known = {"attention_mask", *tokenizer.model_input_names}
    return [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in known]


class TokenExamples:
    """Rows of word pieces in memory, in the order given, padded batch by batch to the longest row of the batch.

    Args:
        sequences: for each model input, one array of [tokens] for each example. "labels" among them are labels of
            tokens.
        padding: what fills up each of them.
        labels: [examples], where an example has one label.
    """

    def __init__(
        self,
        sequences: Mapping[str, Sequence[Rows]],
        padding: Mapping[str, int],
        labels: Tensor | None = None,
    ) -> None:
        self._sequences = {name: list(rows) for name, rows in sequences.items()}
        self._padding = {"attention_mask": 0, "token_type_ids": 0, "labels": NO_LABEL} | dict(padding)
        self._labels = labels
        self._lengths = np.array([len(row) for row in next(iter(self._sequences.values()))], np.int64)
        self.num_bytes = sum(row.nbytes for rows in self._sequences.values() for row in rows)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._lengths)

    @cached_property
    def _in_order(self) -> Rows:
        return np.arange(len(self), dtype=np.int64)

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """All examples once, in batches; shuffled by `seed`, in order when it is None.

        Shuffled batches hold rows of like length: rows are drawn at random into windows of some batches, sorted by
        length within a window, and the batches of a window are shuffled again.
        """
        rng = None if seed is None else np.random.default_rng(seed % 2**63)
        order = self._in_order if rng is None else rng.permutation(len(self))
        span = batch_size * _WINDOW if rng is not None else max(len(self), 1)
        for start in range(0, len(order), span):
            window = order[start : start + span]
            if rng is not None:
                window = window[np.argsort(self._lengths[window], kind="stable")]
            batches = [window[first : first + batch_size] for first in range(0, len(window), batch_size)]
            for place in range(len(batches)) if rng is None else rng.permutation(len(batches)):
                yield self._batch(batches[place])

    def _batch(self, rows: Rows) -> Batch:
        longest = int(self._lengths[rows].max())
        batch: dict[str, Tensor] = {}
        for name, sequence in self._sequences.items():
            padded = np.full((len(rows), longest), self._padding[name], np.int64)
            for place, row in enumerate(rows):
                padded[place, : len(sequence[row])] = sequence[row]
            batch[name] = torch.from_numpy(padded)
        if self._labels is not None:
            batch["labels"] = self._labels[torch.from_numpy(rows)]
        return batch


def read_sequences(table: "Dataset", rows: Rows, columns: Sequence[str]) -> dict[str, list[Rows]]:
    """Some rows of an encoded table as arrays."""
    read = table.select(rows.tolist()).select_columns(list(columns))[:] if len(rows) else {}
    return {name: [np.array(row, np.int32) for row in read.get(name, ())] for name in columns}


def by_length(table: "Dataset", rows: Rows) -> Rows:
    """The same rows, the shortest first: a score pads less, and does not depend on the order."""
    lengths = np.array(table.select(rows.tolist())["length"][:], np.int64) if len(rows) else np.zeros(0, np.int64)
    sorted_rows: Rows = rows[np.argsort(lengths, kind="stable")]
    return sorted_rows


class TextTask(TableTask):
    """What the text tasks share: models, encoded splits, data of clients.

    Args:
        options: of the task.
        head: the library's class for its models.
        tables: "train" and "test".
        usable_test: rows of the test split that can be used.
        rows: of the clients.
        label_names: of the classes.
        weights: [classes], see `Outputs.class_weights`.

    Raises:
        ValueError: if the tokenizer can't be loaded.
    """

    _labels_tokens = False

    def __init__(
        self,
        options: TextTaskOptions,
        head: str,
        tables: "Mapping[str, Dataset]",
        usable_test: Rows,
        rows: ClientRows,
        label_names: Sequence[str],
        weights: Tensor | None,
    ) -> None:
        super().__init__(options, rows, usable_test, ENCODED_BYTES)
        self._options = options
        self._label_names = tuple(label_names)
        self._tokenizer = options.load_tokenizer()
        pad = int(self._tokenizer.pad_token_id)
        self._padding = {"input_ids": pad}
        self._made_up = MadeUpTexts(self._tokenizer, inputs_of(self._tokenizer))
        self._tables = {name: self._encoded(table) for name, table in tables.items()}
        settings = {"pad_token_id": pad, "eos_token_id": self._made_up.end}
        self._models = Transformers(options, head, self._label_names, settings, weights)

    def build_models(self, seed: int) -> Models:
        """Teacher and student as the options say; heads that no checkpoint has are drawn from `seed`."""
        models = self._models.build(seed)
        others = {f"other_teachers.{n}.model": model for n, model in enumerate(models.other_teachers)}
        for name, model in {"teacher": models.teacher, "student": models.student, **others}.items():
            require_vocabulary(name, model, self._tokenizer)
            require_readable(f"task.{name}", model, self._read, self._made_up, self._options.max_length)
        return models

    def example_batch(self) -> Batch:
        """A text of few word pieces."""
        batch = self._made_up.batch(min(EXAMPLE_LENGTH, self._options.max_length))
        return {**batch, "labels": self._labels_of(batch)}

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        """Run a model on word pieces of shape [batch, tokens]."""
        return self._models.forward(model, batch, hidden_states=hidden_states, attentions=attentions)

    def export(self, model: nn.Module, directory: Path) -> None:
        """Write a directory that `from_pretrained` and `pipeline` load."""
        save_transformer(model, directory, self._tokenizer)

    def _labels_of(self, batch: Batch) -> Tensor:
        """Labels of the right shape, all of the first class: [texts], in a task of tokens [texts, word pieces]."""
        shape = batch["input_ids"].shape
        return torch.zeros(shape if self._labels_tokens else shape[:1], dtype=torch.int64)

    def _read(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits of made-up texts.

        Raises:
            ValueError: if they are not of this task's classes.
        """
        labels = self._labels_of(batch)
        logits = self.forward(model, {**batch, "labels": labels}, hidden_states=False, attentions=False).logits
        if logits.shape != (expected := (*labels.shape, len(self._label_names))):
            raise ValueError(f"its outputs are {list(logits.shape)} instead of {list(expected)}")
        return logits

    @abstractmethod
    def _pieces(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Word pieces of some rows of a table, as columns."""

    def _encoded(self, table: "Dataset") -> "Dataset":
        options = self._options
        columns = options.data.columns.model_dump()
        rules = {"task": options.name, "max_length": options.max_length, "data": columns}
        return encoded(table, self._tokenizer, rules, self._with_length)

    def _with_length(self, rows: Mapping[str, list[Any]]) -> Mapping[str, list[Any]]:
        pieces = self._pieces(rows)
        return pieces | {"length": [len(ids) for ids in pieces["input_ids"]]}
