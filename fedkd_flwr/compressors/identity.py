"""No compression: every tensor dense, float32. The yardstick of the others."""

from typing import Literal

from fedkd_flwr.compressors.base import CompressorOptions
from fedkd_flwr.compressors.payload import Dense, Parts, most_bytes, pack, to_arrays, unpack
from fedkd_flwr.core.arrays import Arrays, Spec, require_finite

CODEC_ID = 0


class IdentityOptions(CompressorOptions):
    """The identity compressor has no options."""

    name: Literal["identity"] = "identity"

    def build(self, spec: Spec) -> "IdentityCodec":
        """The codec of payloads with the tensors of `spec`."""
        return IdentityCodec(spec)


class IdentityCodec:
    """Sends what it is given, bit for bit."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @property
    def most_bytes(self) -> int:
        """Length of every payload."""
        return most_bytes(self.spec)

    def initial_state(self) -> Arrays:
        """Neither end keeps anything."""
        return {}

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        """All values of every tensor.

        Raises:
            ValueError: if the update holds a NaN or an infinity.
        """
        require_finite(update)
        parts = Parts({tensor.name: Dense(update[tensor.name]) for tensor in self.spec})
        return pack(self.spec, parts, CODEC_ID), state

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        """The update, bit for bit."""
        return to_arrays(self.spec, unpack(payload, self.spec, CODEC_ID)), state
