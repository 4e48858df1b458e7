"""Where the bits of one update go: one step for all tensors, and for each tensor the form that is worth most.

At a step, a component (a singular value with its two vectors, or a row) is sent if the error it takes away is worth its
bytes at the price that the step stands for. So the tensors share one threshold of energy for each byte, instead of one
share of energy for every matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedkd_flwr.compressors.payload import coded_shape
from fedkd_flwr.core.arrays import Array, TensorSpec
from fedkd_flwr.core.low_rank import PartialSvd, largest_of, matrix_shape, row_energies
from fedkd_flwr.core.rate_distortion import ERROR_PER_BYTE, quantised

Floats = NDArray[np.float64]

_CODE_BITS = 8.0  # of a rank, or of a dense tensor
_ROW_BITS = 1.0  # for naming the rows that are sent
_BISECTIONS = 13
_DIGITS = 14  # binary, of the largest integer; one less than may be written


class Candidate:
    """One tensor of an update, as far as it is decomposed.

    Args:
        tensor: a parameter.
        value: its update.
        seed: of the random projections.
    """

    def __init__(self, tensor: TensorSpec, value: Array, seed: int) -> None:
        self.tensor = tensor
        matrix = np.ascontiguousarray(value, np.float32).reshape(coded_shape(tensor))
        energies = row_energies(matrix)
        present = energies > 0
        # Rows that did not move at all are cheaper to leave out by name; an embedding has many.
        self.rows = None if present.all() else present
        self.matrix = matrix if self.rows is None else matrix[present]
        self.row_energies = energies[present]
        self.energy = float(energies.sum())
        self.svd: PartialSvd | None = None
        if matrix_shape(tensor.shape) is not None and min(self.matrix.shape) > 1:
            try:
                self.svd = PartialSvd(self.matrix, seed, self.energy)
            except np.linalg.LinAlgError:
                self.svd = None  # it travels dense

    @property
    def singular_values(self) -> Floats:
        """As many as are found."""
        return self.svd.singular_values if self.svd is not None else np.zeros(0)

    def grow(self) -> bool:
        """Find more singular values; say whether there are more now."""
        if self.svd is None or self.svd.complete:
            return False
        try:
            self.svd.grow()
        except np.linalg.LinAlgError:
            self.svd = None
        return True


@dataclass(frozen=True, slots=True)
class Allocation:
    """What to send at one step.

    Attributes:
        step: of all coded integers.
        ranks: for each candidate; 0 where it is not factored.
        rows: for each candidate, which of its rows are sent as they are; none where it is factored.
    """

    step: float
    ranks: NDArray[np.int64]
    rows: Sequence[NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class _Worth:
    """Every component that could be sent at one step: singular values of all candidates, then rows of all candidates.

    Attributes:
        step: of all coded integers.
        saved: squared error that each takes away.
        bits: that it takes.
        sent: whether that pays.
        short: candidates whose smallest known singular value is still worth sending.
    """

    step: float
    saved: Floats
    bits: Floats
    sent: NDArray[np.bool_]
    short: NDArray[np.bool_]

    def best_first(self) -> NDArray[np.int64]:
        """Those that are sent, by what they save for each bit."""
        sent = np.flatnonzero(self.sent)
        return sent[np.argsort(-self.saved[sent] / self.bits[sent], kind="stable")]

    def only(self, chosen: NDArray[np.int64]) -> "_Worth":
        """The same with only these sent."""
        sent = np.zeros_like(self.sent)
        sent[chosen] = True
        return replace(self, sent=sent)


class Allocator:
    """Allocations of one update at any step; everything about the tensors is laid out flat."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._energies = np.array([c.energy for c in candidates])
        self.total = float(self._energies.sum())
        self.largest = max((largest_of(c.matrix) for c in candidates), default=0.0)
        self._candidates = candidates
        self._refresh()

    def for_error(self, most_error: float) -> Allocation:
        """The largest step that leaves at most so much squared error, without what is not needed for that."""
        worth, _ = self._search(lambda tried: self.total - tried.saved[tried.sent].sum() > most_error)
        order = worth.best_first()
        needed = int(np.searchsorted(np.cumsum(worth.saved[order]), self.total - most_error)) + 1
        return self._allocation(worth.only(order[:needed]))

    def for_bytes(self, most_bytes: float) -> Allocation:
        """The smallest step at which all that is worth sending fits, or the next with what fits of it: the better."""
        fine, coarse = self._search(lambda tried: tried.bits[tried.sent].sum() <= 8.0 * most_bytes)
        order = fine.best_first()
        fitting = int(np.searchsorted(np.cumsum(fine.bits[order]), 8.0 * most_bytes, side="right"))
        return self._allocation(
            max(fine.only(order[:fitting]), coarse, key=lambda tried: tried.saved[tried.sent].sum())
        )

    def _search(self, is_coarse: Callable[[_Worth], bool]) -> tuple[_Worth, _Worth]:
        """Two steps side by side: the largest that is fine enough, and the next that is too coarse.

        Components of equal size enter together, so the one may send far more than the other: the caller drops the least
        of them. More of a spectrum is found where it turns out to matter.
        """
        while True:
            # Below the lowest step integers would need more digits than a coded tensor may have.
            low, high = self._scale * 2.0**-_DIGITS, self._scale * 8.0
            for _ in range(_BISECTIONS):
                middle = float(np.sqrt(low * high))
                low, high = (low, middle) if is_coarse(self._worth(middle)) else (middle, high)
            found = self._worth(low)
            if not self._grow(found):
                return found, self._worth(high)

    def _worth(self, step: float) -> _Worth:
        price = ERROR_PER_BYTE * step**2 / 8.0  # of a bit
        saved, bits = self._components(step)
        kept = saved > price * bits
        factored_gain = np.bincount(self._owner, np.where(kept, saved - price * bits, 0.0), self._energies.size)
        ranks = np.bincount(self._owner[kept], minlength=self._energies.size)
        row_saved, row_bits = self._rows(step)
        row_kept = row_saved > price * row_bits
        dense_gain = np.bincount(self._row_owner, np.where(row_kept, row_saved - price * row_bits, 0.0), ranks.size)
        dense = dense_gain > factored_gain + price * _CODE_BITS
        short = ~self._complete & (ranks == self._num_known) & (ranks > 0)
        sent = np.concatenate([kept & ~dense[self._owner], row_kept & dense[self._row_owner]])
        return _Worth(step, np.concatenate([saved, row_saved]), np.concatenate([bits, row_bits]), sent, short)

    def _allocation(self, worth: _Worth) -> Allocation:
        sent, rows_sent = np.split(worth.sent, [self._owner.size])
        ranks = np.bincount(self._owner[sent], minlength=self._energies.size)
        rows = np.split(rows_sent, self._row_ends)
        return Allocation(worth.step, ranks, rows)

    def _grow(self, found: _Worth) -> bool:
        """Find more of the spectra that were too short; say whether there is more now."""
        grown = [c.grow() for c, short in zip(self._candidates, found.short, strict=True) if short]
        if any(grown):
            self._refresh()
        return any(grown)

    def _refresh(self) -> None:
        """Lay out what is known of the spectra."""
        known = [c.singular_values for c in self._candidates]
        self._num_known = np.array([values.size for values in known], np.int64)
        self._complete = np.array([c.svd is None or c.svd.complete for c in self._candidates], np.bool_)
        self._owner = np.repeat(np.arange(len(known)), self._num_known)
        values = np.concatenate(known) if known else np.zeros(0)
        self._squares = np.square(values)
        self._scale = max(self.largest, float(values.max(initial=0.0)))
        shapes = np.array([c.matrix.shape for c in self._candidates], np.float64).reshape(-1, 2)
        self._sides = shapes[self._owner].T
        with np.errstate(divide="ignore"):
            self._spreads = np.log2(values) - 0.5 * np.log2(self._sides)  # of both factors' entries
        self._row_ends = np.cumsum([c.row_energies.size for c in self._candidates])[:-1]
        self._row_owner = np.repeat(np.arange(len(known)), [c.row_energies.size for c in self._candidates])
        energies = [c.row_energies for c in self._candidates]
        self._row_energies = np.concatenate(energies) if energies else np.zeros(0)
        self._row_sizes = shapes[self._row_owner, 1]
        self._row_spreads = 0.5 * np.log2(self._row_energies / self._row_sizes)

    def _components(self, step: float) -> tuple[Floats, Floats]:
        """Error taken away, and bits, of every known singular value."""
        bits, kept = quantised(self._spreads - np.log2(step))
        return self._squares * kept[0] * kept[1], self._sides[0] * bits[0] + self._sides[1] * bits[1] + _CODE_BITS

    def _rows(self, step: float) -> tuple[Floats, Floats]:
        bits, kept = quantised(self._row_spreads - np.log2(step))
        return self._row_energies * kept, self._row_sizes * bits + _ROW_BITS
