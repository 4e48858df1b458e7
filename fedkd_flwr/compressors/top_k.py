"""The largest values of the update, wherever they are.

Sparsification with memory: Stich et al. 2018, https://arxiv.org/abs/1809.07599. Values travel as float16, positions as
entropy-coded distances: about 16 + log2(e / fraction) bits for each value.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from fedkd_flwr.compressors.base import Compressed, LossyCodec, LossyOptions, exact
from fedkd_flwr.compressors.payload import Part, Parts, Sparse, Zero, pack
from fedkd_flwr.core.arrays import Arrays, Spec, require_finite

CODEC_ID = 4


class TopKOptions(LossyOptions):
    """`fraction`: of all parameters that is sent, in (0, 1]."""

    name: Literal["top_k"] = "top_k"
    fraction: float = Field(0.01, gt=0, le=1)

    def build(self, spec: Spec) -> "TopKCodec":
        """The codec of payloads with the tensors of `spec`."""
        return TopKCodec(spec, self.fraction)


class TopKCodec(LossyCodec):
    """One threshold over all parameters. Buffers travel whole."""

    codec_id = CODEC_ID

    def __init__(self, spec: Spec, fraction: float) -> None:
        super().__init__(spec)
        self._fraction = fraction

    def compress(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> Compressed:
        """The values of largest magnitude; of equal ones, all or none.

        Raises:
            ValueError: if the update holds a NaN or an infinity.
        """
        require_finite(update)
        sizes = {t.name: np.abs(update[t.name]) for t in self.spec if t.kind == "parameter"}
        flat = np.concatenate([size.reshape(-1) for size in sizes.values()]) if sizes else np.zeros(0)
        kept = max(1, round(self._fraction * flat.size))
        threshold = np.partition(flat, -kept)[-kept] if flat.size else 0.0
        parts: dict[str, Part] = {}
        for tensor in self.spec:
            value = update[tensor.name]
            if tensor.kind == "buffer":
                parts[tensor.name] = exact(tensor, value)
                continue
            chosen = ((sizes[tensor.name] >= threshold) & (sizes[tensor.name] > 0)).reshape(-1)
            parts[tensor.name] = Sparse(value.reshape(-1)[chosen], chosen) if chosen.any() else Zero()
        chosen_only, whole = Parts(parts), self.raw(update)
        longer = len(pack(self.spec, chosen_only, self.codec_id)) > len(pack(self.spec, whole, self.codec_id))
        return self.packed(whole if longer else chosen_only)
