"""Every value of the update at fewer bits, and nothing else: 2, 3.9 or 7.5 times smaller than float32."""

from typing import Literal

from fedkd_flwr.compressors.base import Compressed, LossyCodec, LossyOptions, exact
from fedkd_flwr.compressors.numbers import Precision
from fedkd_flwr.compressors.payload import Dense, Part, Parts
from fedkd_flwr.core.arrays import Arrays, Spec, require_finite

CODEC_ID = 3


class QuantizeOptions(LossyOptions):
    """`precision`: of every value. Integers share a scale in blocks of 64."""

    name: Literal["quantize"] = "quantize"
    precision: Precision = "int8"

    def build(self, spec: Spec) -> "QuantizeCodec":
        """The codec of payloads with the tensors of `spec`."""
        return QuantizeCodec(spec, self.precision)


class QuantizeCodec(LossyCodec):
    """Dense at a fixed width. Buffers stay float32."""

    codec_id = CODEC_ID

    def __init__(self, spec: Spec, precision: Precision) -> None:
        super().__init__(spec)
        self._precision = precision

    def compress(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> Compressed:
        """All values, rounded.

        Raises:
            ValueError: if the update holds a NaN or an infinity.
        """
        require_finite(update)
        parts: dict[str, Part] = {}
        for tensor in self.spec:
            part = exact(tensor, update[tensor.name])
            narrow = isinstance(part, Dense) and tensor.kind == "parameter"
            parts[tensor.name] = Dense(update[tensor.name], self._precision) if narrow else part
        return self.packed(Parts(parts))
