"""Articles and impressions in memory, and the batches that are made of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedkd_flwr.core.protocols import Batch
from fedkd_flwr.tasks.partition import Rows

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of whole numbers, each of any length.

    Attributes:
        values: of all rows, one after another.
        offsets: [rows + 1], where each row begins and the last one ends.
    """

    values: Rows
    offsets: Rows

    @classmethod
    def read(cls, table: "Dataset", column: str) -> "Ragged":
        """A column of lists."""
        lists = table.select_columns([column]).with_format("arrow")[:].column(column).combine_chunks()
        offsets = lists.offsets.to_numpy().astype(np.int64)
        return cls(lists.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0])

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Rows:
        """One row: [length]."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> Rows:
        """[rows]."""
        return np.diff(self.offsets)

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return self.values.nbytes + self.offsets.nbytes

    def where(self, mask: Rows) -> "Ragged":
        """As many rows, of the values that a mask of [values] keeps."""
        kept = np.concatenate([[0], np.cumsum(mask)])
        return Ragged(self.values[mask], kept[self.offsets])

    def padded(self, rows: Rows, fill: int) -> Rows:
        """Some rows, filled up to the longest of them: [rows, tokens], at least one column."""
        starts, lengths = self.offsets[rows], self.lengths[rows]
        filled = np.full((len(rows), max(1, int(lengths.max(initial=0)))), fill, np.int64)
        real = np.arange(filled.shape[1]) < lengths[:, None]
        filled[real] = self.values[(starts[:, None] + np.arange(filled.shape[1]))[real]]
        return filled


class Articles:
    """The words of every article as word pieces.

    Args:
        inputs: word pieces, and what else the tokenizer makes of them, by the model's name for it.
        pad: number of the piece that fills up.
    """

    def __init__(self, inputs: Mapping[str, Ragged], pad: int) -> None:
        self._inputs = dict(inputs)
        self._padding = {"input_ids": pad}

    def __len__(self) -> int:
        """Number of articles."""
        return len(self._inputs["input_ids"])

    def by_length(self, articles: Rows) -> Rows:
        """The same articles, the shortest first."""
        ordered: Rows = articles[np.argsort(self._inputs["input_ids"].lengths[articles], kind="stable")]
        return ordered

    def batch(self, articles: Rows) -> dict[str, Tensor]:
        """Word pieces of some articles with their mask, each [articles, tokens]."""
        batch = {name: rows.padded(articles, self._padding.get(name, 0)) for name, rows in self._inputs.items()}
        lengths = self._inputs["input_ids"].lengths[articles]
        batch["attention_mask"] = (np.arange(batch["input_ids"].shape[1]) < lengths[:, None]).astype(np.int64)
        return {name: torch.from_numpy(values) for name, values in batch.items()}


class ImpressionExamples:
    """Impressions in memory; an example to learn from is one click with articles that were shown and not clicked.

    Args:
        articles: of all impressions, shared by all examples.
        histories: for each impression, what the user read.
        candidates: likewise what was shown.
        labels: likewise 1 for each candidate that was clicked, else 0; every impression has both.
        npratio: articles without a click in an example.
    """

    def __init__(self, articles: Articles, histories: Ragged, candidates: Ragged, labels: Ragged, npratio: int) -> None:
        self.articles, self.histories, self.candidates, self.labels = articles, histories, candidates, labels
        clicked = labels.values == 1
        self._clicked = candidates.values[clicked]
        self._impressions = np.repeat(np.arange(len(labels)), labels.lengths)[clicked]
        self._others = candidates.where(~clicked)
        self._npratio = npratio
        held = (histories, candidates, labels, self._others)
        self.num_bytes = sum(rows.num_bytes for rows in held) + self._clicked.nbytes + self._impressions.nbytes

    def __len__(self) -> int:
        """Number of clicks."""
        return len(self._clicked)

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """Every click once, in batches as `NewsRecommender` takes them, with the place of the click as its label.

        The seed decides the order, which other articles stand beside a click, and its place among them; with None the
        order stays and the rest is drawn alike every time.
        """
        rng = np.random.default_rng(0 if seed is None else seed % 2**63)
        order = np.arange(len(self)) if seed is None else rng.permutation(len(self))
        for start in range(0, len(order), batch_size):
            yield self._batch(order[start : start + batch_size], rng)

    def _batch(self, chosen: Rows, rng: np.random.Generator) -> Batch:
        places = rng.integers(0, self._npratio + 1, len(chosen))
        shown = np.empty((len(chosen), self._npratio + 1), np.int64)
        for row, (click, place) in enumerate(zip(chosen, places, strict=True)):
            # Where fewer were shown, each comes again before one comes a third time.
            others = np.resize(rng.permutation(self._others[self._impressions[click]]), self._npratio)
            shown[row] = np.insert(others, place, self._clicked[click])
        read = self.histories.padded(self._impressions[chosen], -1)
        real = read >= 0
        # An article that several users read is encoded once.
        distinct, indices = np.unique(np.concatenate([shown.ravel(), read[real]]), return_inverse=True)
        history = np.zeros_like(read)
        history[real] = indices[shown.size :]
        return {
            # First what has an axis of examples: who wants to know how many a batch has looks at the first.
            "candidates": torch.from_numpy(indices[: shown.size].reshape(shown.shape)),
            "labels": torch.from_numpy(places),
            "history": torch.from_numpy(history),
            "history_mask": torch.from_numpy(real.astype(np.int64)),
            **self.articles.batch(distinct),
        }
