"""Soft labels on the wire, their mean, what is done to it, and which public examples are asked in which version."""

import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from fedkd_flwr.core.arrays import Array, Arrays, Spec, TensorSpec, require_finite
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.core.soft_labels import (
    Probabilities,
    Weighting,
    by_entropy_reduction,
    by_power,
    by_temperature,
    weights_of,
)

SOFT_LABELS = "soft_labels"
Form = Literal["float32", "float16", "int8", "top_k"]

# magic | format version | form | k | examples | classes
_HEADER = struct.Struct("<3sBBHII")
HEADER_BYTES = _HEADER.size
_MAGIC, _VERSION = b"FSL", 1
_FORMS: tuple[Form, ...] = ("float32", "float16", "int8", "top_k")
_FLOATS: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_LEVELS = 255
_TOLERANCE = 0.01  # of a row's sum: float16 rounds each of its numbers


class SoftLabelCodec:
    """Packs distributions over classes, as many as both ends know, one row for each example.

    Bytes, beyond a header of 15: float32 and float16 take 4 and 2 for each class; int8 takes 1, in steps of a 255th of
    the row's largest; top_k keeps the k likeliest, each with ceil(log2(classes)) bits for its number and, where k is
    more than 1, a byte for its size among them. What was left out or rounded is made up for by normalising.

    Args:
        num_examples: rows.
        num_classes: columns.
        form: how a row is written.
        top_k: of that form.
    """

    def __init__(self, num_examples: int, num_classes: int, form: Form, top_k: int = 1) -> None:
        self._shape = (num_examples, num_classes)
        self._form = form
        self._k = min(top_k, num_classes) if form == "top_k" else 0
        self._bits = max(1, (num_classes - 1).bit_length())
        self.spec: Spec = (TensorSpec(SOFT_LABELS, self._shape),)

    @property
    def most_bytes(self) -> int:
        """Length of every payload."""
        return self.payload_bytes

    @property
    def payload_bytes(self) -> int:
        """Of every payload, header included."""
        num_examples, num_classes = self._shape
        if self._form == "top_k":
            return HEADER_BYTES + self._index_bytes + (num_examples * self._k if self._k > 1 else 0)
        width = 1 if self._form == "int8" else _FLOATS[self._form].itemsize
        return HEADER_BYTES + num_examples * num_classes * width

    def initial_state(self) -> Arrays:
        """Nothing is kept."""
        return {}

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        """The payload.

        Raises:
            ValueError: if a number is not finite.
        """
        require_finite(update)
        rows = np.asarray(update[SOFT_LABELS], np.float64)
        assert rows.shape == self._shape, rows.shape
        header = _HEADER.pack(_MAGIC, _VERSION, _FORMS.index(self._form), self._k, *self._shape)
        return header + self._packed(rows), state

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        """Distributions, float32 [examples, classes].

        Raises:
            ValueError: if the payload is not one of these.
        """
        if len(payload) != self.payload_bytes:
            raise ValueError(f"soft labels must have {self.payload_bytes} bytes, got {len(payload)}")
        header = (_MAGIC, _VERSION, _FORMS.index(self._form), self._k, *self._shape)
        if (got := _HEADER.unpack_from(payload)) != header:
            raise ValueError(f"soft labels must begin with {header}, got {got}; both ends need the same experiment")
        with np.errstate(invalid="ignore", over="ignore"):
            rows = self._unpacked(payload[HEADER_BYTES:])
            sums = rows.sum(axis=1)
        if not np.isfinite(rows).all() or (rows < 0).any() or (sums <= 0).any():
            raise ValueError("soft labels must be probabilities: at least 0, and more than 0 together")
        if self._form in _FLOATS and (np.abs(sums - 1) > _TOLERANCE).any():
            raise ValueError("soft labels must be probabilities: together 1")
        return {SOFT_LABELS: np.asarray(rows / sums[:, None], np.float32)}, state

    @property
    def _index_bytes(self) -> int:
        return -(-self._shape[0] * self._k * self._bits // 8)

    def _packed(self, rows: NDArray[np.float64]) -> bytes:
        if self._form in _FLOATS:
            return rows.astype(_FLOATS[self._form]).tobytes()
        if self._form == "int8":
            return _stepped(rows).tobytes()
        likeliest = np.argsort(-rows, axis=1, kind="stable")[:, : self._k]
        bits = (likeliest[:, :, None] >> np.arange(self._bits)) & 1
        indices = np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()
        if self._k == 1:
            return indices
        return indices + _stepped(np.take_along_axis(rows, likeliest, axis=1)).tobytes()

    def _unpacked(self, data: bytes) -> NDArray[np.float64]:
        num_examples, num_classes = self._shape
        if self._form in _FLOATS:
            return np.frombuffer(data, _FLOATS[self._form]).reshape(self._shape).astype(np.float64)
        if self._form == "int8":
            return np.frombuffer(data, np.uint8).reshape(self._shape).astype(np.float64)
        count = num_examples * self._k * self._bits
        bits = np.unpackbits(np.frombuffer(data, np.uint8, self._index_bytes), bitorder="little", count=count)
        places = (bits.reshape(num_examples, self._k, self._bits).astype(np.int64) << np.arange(self._bits)).sum(axis=2)
        if (places >= num_classes).any():
            raise ValueError(f"a class must be below {num_classes}, got {int(places.max())}")
        sizes = np.ones(places.shape)
        if self._k > 1:
            sizes = np.frombuffer(data, np.uint8, offset=self._index_bytes).reshape(places.shape).astype(np.float64)
        rows = np.zeros(self._shape)
        np.put_along_axis(rows, places, sizes, axis=1)
        return rows


def _stepped(rows: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Each row in steps of a 255th of its largest number."""
    return np.asarray(np.rint(_LEVELS * rows / rows.max(axis=1, keepdims=True)), np.uint8)


class NoReduction(BaseModel, extra="forbid", frozen=True):
    """The mean as it is."""

    name: Literal["none"] = "none"

    def apply(self, probabilities: Probabilities) -> Probabilities:
        """The same."""
        return probabilities


class TemperatureReduction(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """See `by_temperature`."""

    name: Literal["temperature"] = "temperature"
    temperature: float = Field(0.5, gt=0)

    def apply(self, probabilities: Probabilities) -> Probabilities:
        """Sharper by a temperature below 1."""
        return by_temperature(probabilities, self.temperature)


class PowerReduction(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """See `by_power`."""

    name: Literal["power"] = "power"
    beta: float = Field(2.0, gt=0)

    def apply(self, probabilities: Probabilities) -> Probabilities:
        """Sharper by a power above 1."""
        return by_power(probabilities, self.beta)


class DsFlReduction(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """See `by_entropy_reduction`."""

    name: Literal["ds_fl"] = "ds_fl"
    temperature: float = Field(0.1, gt=0)

    def apply(self, probabilities: Probabilities) -> Probabilities:
        """As DS-FL has it."""
        return by_entropy_reduction(probabilities, self.temperature)


Reduction = Annotated[NoReduction | TemperatureReduction | PowerReduction | DsFlReduction, Field(discriminator="name")]


class SoftLabelMean:
    """The mean of what clients say of each example; see `weights_of`. One sum, whatever the number of clients."""

    def __init__(self, weighting: Weighting) -> None:
        self._weighting = weighting
        self._sums: NDArray[np.float64] | None = None
        self._weights: NDArray[np.float64] | None = None

    def begin(self, server_round: int) -> None:
        """Forget the round before."""
        self._sums = self._weights = None

    def add(self, upload: Arrays, num_examples: int, loss: float | None, client: str = "") -> None:
        """Add one client's."""
        rows = upload[SOFT_LABELS].astype(np.float64)
        weights = weights_of(rows, num_examples, self._weighting)
        weighted = rows * weights[:, None]
        self._sums = weighted if self._sums is None else self._sums + weighted
        self._weights = weights if self._weights is None else self._weights + weights

    def result(self) -> Arrays | None:
        """Distributions; None where nobody sent any."""
        if self._sums is None or self._weights is None:
            return None
        return {SOFT_LABELS: np.asarray(self._sums / self._weights[:, None], np.float32)}

    def state(self) -> Arrays:
        """Nothing is kept."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing to restore."""


class Schedule:
    """Which public examples are asked from one version to the next: all of them once before any is asked again.

    The order is drawn by the seed, so no position ever travels, and which are known follows from the version alone.

    Args:
        num_public: how many there are.
        num_asked: at a time, at most as many.
        seed: of the experiment.
    """

    def __init__(self, num_public: int, num_asked: int, seed: int) -> None:
        self._order: NDArray[np.int64] = np.random.default_rng(derive_seed(seed, "asked")).permutation(num_public)
        self._num_asked = num_asked

    def asked(self, version: int) -> Array:
        """Positions of what leads from this version to the next; the longest known where none is unknown."""
        places = np.arange(version * self._num_asked, (version + 1) * self._num_asked)
        return self._order[places % len(self._order)]

    def known(self, version: int) -> Array:
        """Positions of all that have a soft label in this version."""
        return self._order[: min(version * self._num_asked, len(self._order))]

    def new(self, seen: int, version: int) -> Array:
        """Positions of all that were labelled after version `seen`."""
        first = max(seen, version - -(-len(self._order) // self._num_asked))
        parts: Sequence[Array] = [self.asked(earlier) for earlier in range(first, version)]
        return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
