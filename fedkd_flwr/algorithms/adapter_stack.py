"""Adapters of different ranks as one: stacked, so that their product is the mean of all products.

Wang et al., "FLoRA: Federated fine-tuning large language models with heterogeneous low-rank adaptations", NeurIPS 2024,
https://arxiv.org/abs/2409.05976. With B = [B_1 B_2 ...] and A = [p_1 A_1; p_2 A_2; ...] the product B A is
sum_k p_k B_k A_k, which the product of mean B and mean A is not.
"""

import struct
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from fedkd_flwr.algorithms.base import Length
from fedkd_flwr.core.arrays import Array, Arrays, RunningMean, Spec, TensorSpec, require_finite
from fedkd_flwr.core.modules import prefixed, without_prefix

A, B, HEAD = "a/", "b/", "head/"
Precision = Literal["float32", "float16"]
Weighting = Literal["uniform", "num_examples"]
Matrices = Mapping[str, tuple[int, int]]  # of adapted layers by name: rows and columns of their weights

# magic | format version | bytes of a number | rank
_HEADER = struct.Struct("<3sBBI")
HEADER_BYTES = _HEADER.size
_MAGIC, _VERSION = b"FLS", 1
_DTYPES: dict[Precision, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


class AdapterCodec:
    """Packs adapters of one rank, whichever it is, and an update of the head: number for number.

    Args:
        matrices: the adapted layers.
        head: tensors beside them.
        precision: of every number.
        max_rank: that is believed; the length must fit what a payload says, so it bounds nothing but sense.
    """

    def __init__(self, matrices: Matrices, head: Spec, precision: Precision, max_rank: int) -> None:
        self._matrices = matrices
        self._head = head
        self._dtype = _DTYPES[precision]
        self._max_rank = max_rank
        self.spec: Spec = self._spec(max_rank)

    @property
    def most_bytes(self) -> int:
        """Length of a payload of the largest rank."""
        return self.payload_bytes(self._max_rank)

    def payload_bytes(self, rank: int) -> int:
        """Of adapters of a rank, header included."""
        return HEADER_BYTES + sum(tensor.size for tensor in self._spec(rank)) * self._dtype.itemsize

    def initial_state(self) -> Arrays:
        """Nothing is kept."""
        return {}

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        """The payload.

        Raises:
            ValueError: if a number is not finite, also after it is rounded.
        """
        require_finite(update)
        rank = next(value.shape[0] for name, value in update.items() if name.startswith(A))
        with np.errstate(over="ignore"):
            packed = {t.name: np.asarray(update[t.name], self._dtype).reshape(t.shape) for t in self._spec(rank)}
        require_finite(packed)
        header = _HEADER.pack(_MAGIC, _VERSION, self._dtype.itemsize, rank)
        return header + b"".join(value.tobytes() for value in packed.values()), state

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        """Adapters and head, float32.

        Raises:
            ValueError: if the payload is not one of these.
        """
        if len(payload) < HEADER_BYTES:
            raise ValueError(f"adapters must have a header of {HEADER_BYTES} bytes, got {len(payload)}")
        *kind, rank = _HEADER.unpack_from(payload)
        if kind != [_MAGIC, _VERSION, self._dtype.itemsize] or not 1 <= rank <= self._max_rank:
            raise ValueError(f"adapters must be of format {_VERSION} and of a rank up to {self._max_rank}, got {rank}")
        if len(payload) != (expected := self.payload_bytes(rank)):
            raise ValueError(f"adapters of rank {rank} must have {expected} bytes, got {len(payload)}")
        update, offset = {}, HEADER_BYTES
        for tensor in self._spec(rank):
            values = np.frombuffer(payload, self._dtype, tensor.size, offset).astype(np.float32)
            if not np.isfinite(values).all():
                raise ValueError(f"{tensor.name!r} holds numbers that are not finite")
            update[tensor.name] = values.reshape(tensor.shape)
            offset += tensor.size * self._dtype.itemsize
        return update, state

    def _spec(self, rank: int) -> Spec:
        of_layers = [
            tensor
            for name, (rows, columns) in self._matrices.items()
            for tensor in (TensorSpec(A + name, (rank, columns)), TensorSpec(B + name, (rows, rank)))
        ]
        return (*of_layers, *(TensorSpec(HEAD + tensor.name, tensor.shape) for tensor in self._head))


class ProductLength(Length):
    """How long what an upload adds to the weights is: the 2-norm over (alpha / r) B A of all layers, and the head.

    The numbers of A and B themselves say little: A is as long as it was drawn, the longer the more ranks it has.

    Args:
        alpha: an adapter of rank r counts alpha / r.
    """

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def norm(self, upload: Arrays) -> float:
        """The norm, without any product of the size of a layer: ||B A||^2 = sum (B^T B) * (A A^T)."""
        squared = super().norm(without_prefix(HEAD, upload)) ** 2
        for name, value in without_prefix(A, upload).items():
            a, b = value.astype(np.float64), upload[B + name].astype(np.float64)
            squared += (self._alpha / len(a)) ** 2 * max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))
        return float(np.sqrt(squared))

    def scaled(self, upload: Arrays, factor: float) -> dict[str, Array]:
        """B and the head are shortened, A stays: so are their products."""
        moved = {name: value for name, value in upload.items() if not name.startswith(A)}
        return {**upload, **super().scaled(moved, factor)}


class AdapterStack:
    """Stacks the adapters of a round and averages the heads. It holds all adapters of the round at once.

    Args:
        alpha: an adapter of rank r counts alpha / r.
        weighting: how clients count: all alike, or by their examples.
    """

    def __init__(self, alpha: float, weighting: Weighting) -> None:
        self._alpha = alpha
        self._weighting = weighting
        self._uploads: list[tuple[Arrays, float]] = []
        self._heads = RunningMean()

    def begin(self, server_round: int) -> None:
        """Forget the round before."""
        self._uploads, self._heads = [], RunningMean()

    def add(self, upload: Arrays, num_examples: int, loss: float | None, client: str = "") -> None:
        """Take one client's."""
        weight = float(num_examples) if self._weighting == "num_examples" else 1.0
        self._heads.add(without_prefix(HEAD, upload), weight)
        self._uploads.append((upload, weight))

    def result(self) -> Arrays | None:
        """One adapter for each layer, of the sum of all ranks, with weights and scales in its A; and the mean head."""
        if not self._uploads:
            return None
        total = sum(weight for _, weight in self._uploads)
        stacked: dict[str, Array] = {}
        for name in self._uploads[0][0]:
            if name.startswith(A):
                parts = [
                    u[name].astype(np.float64) * (weight / total * self._alpha / len(u[name]))
                    for u, weight in self._uploads
                ]
                stacked[name] = np.concatenate(parts).astype(np.float32)
            elif name.startswith(B):
                stacked[name] = np.concatenate([upload[name] for upload, _ in self._uploads], axis=1)
        return {**stacked, **prefixed(HEAD, self._heads.result())}

    def state(self) -> Arrays:
        """Nothing is kept."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing to restore."""


def products(stacked: Arrays) -> dict[str, Array]:
    """What a stack adds to each layer's weights as a matrix, by the layer's name: B A, summed in float64."""
    return {
        name: np.asarray(stacked[B + name].astype(np.float64) @ value.astype(np.float64), np.float32)
        for name, value in without_prefix(A, stacked).items()
    }
