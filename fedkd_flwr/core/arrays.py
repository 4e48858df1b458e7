"""Named arrays: what a model is once it leaves torch, and the arithmetic of updates.

Arrays are float32 masters. Every function returns new arrays and leaves its arguments as they were.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and role of one exchanged tensor.

    Attributes:
        name: the parameter's or buffer's name in its module.
        shape: its shape.
        kind: "parameter" (trainable) or "buffer" (floating and persistent, such as a BatchNorm mean).
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["parameter", "buffer"] = "parameter"

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


Spec = tuple[TensorSpec, ...]

_PIECE = 16384
_SMALL_SQUARE = 1e-25  # of float32: terms far below it are lost
FLOAT_BYTES = 4  # of a number in a float32 master


def spec_digest(spec: Spec) -> bytes:
    """Eight bytes that change with any name, shape, kind or order in `spec`."""
    text = "\n".join(f"{t.name}:{','.join(map(str, t.shape))}:{t.kind}" for t in spec)
    return hashlib.sha256(text.encode()).digest()[:8]


def num_elements(spec: Spec) -> int:
    """Elements in all tensors of `spec`."""
    return sum(tensor.size for tensor in spec)


def digest(arrays: Arrays) -> bytes:
    """SHA-256 over names, dtypes, shapes and bytes, in name order."""
    state = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        state.update(f"{name}:{value.dtype.str}:{np.shape(arrays[name])}\n".encode())
        state.update(value.tobytes())
    return state.digest()


def difference(local: Arrays, reference: Arrays, spec: Spec) -> dict[str, Array]:
    """The update: local minus reference, float32, for the tensors of `spec`."""
    return {
        t.name: np.asarray(np.asarray(local[t.name], np.float32) - np.asarray(reference[t.name], np.float32))
        for t in spec  # asarray once more: a difference of scalars is not an array
    }


def apply_update(reference: Arrays, update: Arrays) -> dict[str, Array]:
    """Reference plus update; tensors without an update are carried over.

    A BatchNorm variance is clamped at 0: averaged displacements can leave it a rounding error below.
    """
    moved = dict(reference)
    for name, change in update.items():
        value = np.asarray(reference[name] + change)
        moved[name] = np.maximum(value, np.float32(0)) if name.endswith("running_var") else value
    return moved


def squared_norm(value: Array) -> float:
    """Sum of squares: pieces in the array's own type, their sum in float64, good to about 1e-6 of it."""
    flat = np.ascontiguousarray(value).reshape(-1)
    with np.errstate(over="ignore"):
        total = sum(float(np.dot(piece, piece)) for piece in np.split(flat, range(_PIECE, flat.size, _PIECE)))
    if _SMALL_SQUARE < total < np.inf or flat.size == 0:
        return total
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))  # slower, and neither over- nor underflows


def require_finite(update: Arrays) -> None:
    """Refuse an update that must not be sent.

    Raises:
        ValueError: if an array holds a NaN or an infinity; the message names it.
    """
    for name, value in update.items():
        if not np.isfinite(value).all():
            raise ValueError(f"the update of {name!r} is not finite; lower the learning rate or clip the gradient")


class RunningMean:
    """Weighted mean of named arrays, one at a time: sum_i w_i x_i / sum_i w_i in float64.

    Holds one sum however many items are added, so a server's memory does not grow with its clients. The result depends
    on the order of addition only by float64 rounding; add in a fixed order where bytes must repeat.
    """

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._weight = 0.0

    def add(self, arrays: Arrays, weight: float) -> None:
        """Add one item.

        Raises:
            ValueError: if the weight is not a positive finite number, or names or shapes differ from the first item's.
        """
        if not (np.isfinite(weight) and weight > 0):
            raise ValueError(f"a weight must be a positive finite number, got {weight}")
        if self._weight > 0:
            if arrays.keys() != self._sums.keys():
                differing = sorted(arrays.keys() ^ self._sums.keys())
                raise ValueError(f"all items need the same arrays; differing: {differing}")
            if differing := [name for name, value in arrays.items() if value.shape != self._sums[name].shape]:
                raise ValueError(f"all items need the same shapes; differing: {differing}")
        for name, value in arrays.items():
            term = np.asarray(value.astype(np.float64) * weight)
            if name in self._sums:
                self._sums[name] += term
            else:
                self._sums[name] = term
        self._weight += weight

    def result(self) -> dict[str, Array]:
        """The mean so far, float32.

        Raises:
            ValueError: if nothing was added.
        """
        if self._weight == 0.0:
            raise ValueError("the mean of no items is undefined; add at least one")
        return {name: np.asarray(value / self._weight, np.float32) for name, value in self._sums.items()}


def weighted_mean(items: Iterable[tuple[Arrays, float]]) -> dict[str, Array]:
    """Mean of `(arrays, weight)` pairs; see `RunningMean`."""
    mean = RunningMean()
    for arrays, weight in items:
        mean.add(arrays, weight)
    return mean.result()
