"""What clients' models say of each label on average: gathered, packed, averaged, and without one client's share.

Jeong et al., "Communication-efficient on-device machine learning: federated distillation and augmentation under non-IID
private data", 2018, https://arxiv.org/abs/1811.11479. There a label that a client does not have is a division by zero;
here it is marked as absent, weighs nothing, and is exact in every sum.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedkd_flwr.core.arrays import Array, Arrays, Spec, TensorSpec, require_finite

OUTPUTS, WEIGHTS, ROUND = "outputs", "weights", "round"

Precision = Literal["float16", "float32"]
Weighting = Literal["uniform", "counts"]

_DTYPES: dict[Precision, str] = {"float16": "<f2", "float32": "<f4"}
_LARGEST = 2**32
_MOST_VARINT_BYTES = 5
_TOLERANCE = 0.01  # of a row's sum: float16 rounds each of its numbers


class LabelOutputs:
    """Sums the outputs of a model for each label, during training.

    Args:
        num_labels: L.
    """

    def __init__(self, num_labels: int) -> None:
        self._sums = torch.zeros(num_labels, num_labels, dtype=torch.float64)
        self._counts = torch.zeros(num_labels, dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take a batch.

        Args:
            logits: [batch, L].
            labels: [batch], classes.
        """
        labels = labels.cpu()
        self._sums.index_add_(0, labels, logits.detach().softmax(dim=-1).double().cpu())
        self._counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))

    def means(self, weighting: Weighting) -> dict[str, Array]:
        """`outputs` [L, L], the mean softmax output of each label, zeros where there was none; `weights` [L]."""
        rows = (self._sums / self._counts.clamp(min=1)[:, None]).numpy().astype(np.float32)
        weights = self._counts if weighting == "counts" else self._counts.clamp(max=1)
        return {OUTPUTS: rows, WEIGHTS: weights.numpy().astype(np.float32)}


class LabelOutputsCodec:
    """Packs mean outputs: a bit for each label, then for each label that is there its weight and L - 1 numbers.

    The last number of a row follows from the others, because probabilities sum to 1. Weights, and the round, take one
    byte up to 127, two up to 16,383.

    Args:
        num_labels: L.
        precision: of a probability.
        with_round: whether the number of a round goes with them.
    """

    def __init__(self, num_labels: int, precision: Precision, *, with_round: bool) -> None:
        self._num_labels = num_labels
        self._dtype = np.dtype(_DTYPES[precision])
        spec = [TensorSpec(OUTPUTS, (num_labels, num_labels)), TensorSpec(WEIGHTS, (num_labels,))]
        self._with_round = with_round
        self.spec: Spec = tuple([*spec, TensorSpec(ROUND, (1,))] if with_round else spec)

    @property
    def most_bytes(self) -> int:
        """Length of the longest payload: every label is there, every count takes as many bytes as it may."""
        num_counts = self._num_labels + self._with_round
        of_bits = -(-self._num_labels // 8)
        of_rows = self._num_labels * (self._num_labels - 1) * self._dtype.itemsize
        return of_bits + _MOST_VARINT_BYTES * num_counts + of_rows

    def initial_state(self) -> Arrays:
        """Nothing is kept."""
        return {}

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        """The payload.

        Raises:
            ValueError: if a number is not finite.
        """
        require_finite(update)
        present = update[WEIGHTS] > 0
        parts = [varint(int(update[ROUND][0]))] if self._with_round else []
        parts.append(np.packbits(present, bitorder="little").tobytes())
        parts += [varint(int(weight)) for weight in update[WEIGHTS][present]]
        parts.append(update[OUTPUTS][present, :-1].astype(self._dtype).tobytes())
        return b"".join(parts), state

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        """What was packed, as float32.

        Raises:
            ValueError: if the payload is not one of these.
        """
        require_at_most(payload, self.most_bytes)
        reader = Reader(payload)
        found = self.read(reader)
        reader.end()
        return found, state

    def read(self, reader: "Reader") -> dict[str, Array]:
        """What was packed, from where a reader stands; see `decode`."""
        found: dict[str, Array] = {ROUND: np.array([reader.varint()], np.float32)} if self._with_round else {}
        bits = np.frombuffer(reader.take(-(-self._num_labels // 8)), np.uint8)
        present = np.unpackbits(bits, bitorder="little").astype(bool)
        if present[self._num_labels :].any():
            raise ValueError("a label beyond the last is marked as present")
        present = present[: self._num_labels]
        weights = np.zeros(self._num_labels, np.float32)
        weights[present] = [reader.varint() for _ in range(int(present.sum()))]
        if (weights[present] < 1).any():
            raise ValueError("a label that is present must weigh at least 1, got 0")
        num_bytes = int(present.sum()) * (self._num_labels - 1) * self._dtype.itemsize
        numbers = np.frombuffer(reader.take(num_bytes), self._dtype).astype(np.float32)
        given = numbers.reshape(-1, self._num_labels - 1)
        sums = given.sum(axis=1)
        if not np.isfinite(given).all() or (given < 0).any() or (sums > 1 + _TOLERANCE).any():
            raise ValueError("outputs must be probabilities: at least 0, together at most 1")
        rows = np.zeros((self._num_labels, self._num_labels), np.float32)
        rows[present, :-1] = given / np.maximum(sums, 1)[:, None]
        rows[present, -1] = np.maximum(1 - sums, 0)
        return {OUTPUTS: rows, WEIGHTS: weights} | found

    def as_decoded(self, update: Arrays) -> Arrays:
        """What the other end makes of it."""
        return self.decode(self.encode(update, {}, progress=0.0, seed=0)[0], {})[0]


class LabelOutputsMean:
    """The weighted mean of what clients say of each label, of those that have it.

    Args:
        weighting: what the weights of a client are.
        num_epochs: that it trains in a round: it says something of each of its examples as often.
    """

    def __init__(self, weighting: Weighting = "uniform", num_epochs: int = 1) -> None:
        self._weighting = weighting
        self._num_epochs = num_epochs
        self._sums: Array | None = None
        self._weights: Array | None = None

    def begin(self, server_round: int) -> None:
        """Forget the round before."""
        self._sums = self._weights = None

    def add(self, upload: Arrays, num_examples: int, loss: float | None, client: str = "") -> None:
        """Add one client's outputs.

        Raises:
            ValueError: if it weighs more than its examples do.
        """
        weights = upload[WEIGHTS].astype(np.float64)
        if self._weighting == "uniform" and (weights > 1).any():
            raise ValueError(f"a label must weigh 1 where all clients count alike, got {weights.max():.0f}")
        if self._weighting == "counts" and weights.sum() > (most := num_examples * self._num_epochs):
            raise ValueError(
                f"labels of {num_examples} examples weigh at most {most} together, got {weights.sum():.0f}"
            )
        weighted = upload[OUTPUTS].astype(np.float64) * weights[:, None]
        self._sums = weighted if self._sums is None else self._sums + weighted
        self._weights = weights if self._weights is None else self._weights + weights

    def result(self) -> Arrays | None:
        """`outputs` and `weights` over all clients; a label that none of them has is all zeros."""
        if self._sums is None or self._weights is None:
            return None
        rows = self._sums / np.maximum(self._weights, 1)[:, None]
        return {OUTPUTS: rows.astype(np.float32), WEIGHTS: self._weights.astype(np.float32)}

    def state(self) -> Arrays:
        """Nothing is kept."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing to restore."""


def without(means: Arrays, own: Arrays | None) -> tuple[Array, Array]:
    """The mean of the others: of what all say, without one client's share.

    Args:
        means: `outputs` [L, L] and `weights` [L] of all.
        own: the same of the client, as the server decoded it; None where it is not among them.

    Returns:
        Rows [L, L] of probabilities, and a mask [L] of the labels that somebody else has.
    """
    rows, weights = (means[name].astype(np.float64) for name in (OUTPUTS, WEIGHTS))
    sums = rows * weights[:, None]
    if own is not None:
        sums = sums - own[OUTPUTS].astype(np.float64) * own[WEIGHTS][:, None]
        weights = weights - own[WEIGHTS]
    others = weights > 0.5
    left = np.clip(sums / np.maximum(weights, 1)[:, None], 0, None)
    total = left.sum(axis=1)
    others &= total > 0
    left = left / np.where(total > 0, total, 1)[:, None]
    return np.where(others[:, None], left, 0).astype(np.float32), others


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    if not 0 <= value < _LARGEST:
        raise ValueError(f"a count must be in [0, {_LARGEST - 1}], got {value}")
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def require_at_most(payload: bytes, most_bytes: int) -> None:
    """Refuse a payload that no encoder wrote, before any of it is read.

    Raises:
        ValueError: if it is longer than that.
    """
    if len(payload) > most_bytes:
        raise ValueError(f"payload must have at most {most_bytes} bytes, got {len(payload)}")


class Reader:
    """Takes a payload apart, never beyond its end: every method raises ValueError where it would."""

    def __init__(self, payload: bytes) -> None:
        self._payload, self._at = payload, 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if self._at + count > len(self._payload):
            raise ValueError(f"payload ends too early: {len(self._payload)} bytes")
        self._at += count
        return self._payload[self._at - count : self._at]

    def varint(self) -> int:
        """The next count; see `varint`."""
        value = 0
        for place in range(_MOST_VARINT_BYTES):
            [byte] = self.take(1)
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                if value >= _LARGEST:
                    break
                return value
        raise ValueError("a count has too many bytes")

    def end(self) -> None:
        """Make sure that nothing is left."""
        if self._at != len(self._payload):
            raise ValueError(f"payload has {len(self._payload) - self._at} bytes too many")
