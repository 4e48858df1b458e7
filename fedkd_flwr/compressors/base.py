"""What every compressor's options share, and what those that lose something have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import BaseModel

from fedkd_flwr.compressors.payload import Dense, Part, Parts, Zero, most_bytes, pack, to_arrays, unpack
from fedkd_flwr.core.arrays import Array, Arrays, Spec, TensorSpec, require_finite
from fedkd_flwr.core.modules import prefixed, without_prefix
from fedkd_flwr.core.protocols import Codec, Direction

ErrorFeedback = Literal["auto", "both", "uplink", "downlink", "none"]

RESIDUAL = "residual/"


class CompressorOptions(BaseModel, ABC, extra="forbid", frozen=True, allow_inf_nan=False):
    """Options of one compressor, `name` first. They build the codec for any list of tensors."""

    name: str

    @abstractmethod
    def build(self, spec: Spec) -> Codec:
        """The codec of payloads with the tensors of `spec`."""

    def build_for(self, spec: Spec, direction: Direction, *, uplink_feedback: bool) -> Codec:
        """The codec of one direction.

        Args:
            spec: the tensors of a payload.
            direction: "uplink" or "downlink".
            uplink_feedback: whether what an uplink payload lost is worth sending later, if the options don't say.
        """
        return self.build(spec)

    def objection_to_noise(self) -> str:
        """What in these options does not go with noise on every number of an update; empty where nothing does."""
        return ""


class LossyOptions(CompressorOptions):
    """Options of a compressor that loses something.

    Attributes:
        error_feedback: in which direction the encoder adds to an update what its payloads have lost so far (Seide et
            al. 2014; Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847). "auto": both; but only the downlink
            where the aggregator is a robust rule, because a median of updates that each hold an older rest is the
            median of nothing that anybody computed; and where updates have noise, of which most is lost and would be
            sent with the next.
    """

    error_feedback: ErrorFeedback = "auto"

    @abstractmethod
    def build(self, spec: Spec) -> "LossyCodec":
        """The codec without error feedback."""

    def build_for(self, spec: Spec, direction: Direction, *, uplink_feedback: bool) -> Codec:
        """The codec of one direction, with error feedback where it is asked for."""
        both = ("both", "auto") if uplink_feedback or direction == "downlink" else ("both",)
        codec = self.build(spec)
        return WithErrorFeedback(codec) if self.error_feedback in (direction, *both) else codec

    def objection_to_noise(self) -> str:
        """Feedback on the uplink: noise is of full rank, so what a payload loses is noise, and would be sent again."""
        if self.error_feedback in ("both", "uplink"):
            return (
                "error_feedback must be auto, downlink or none, because most of what a payload loses is noise; "
                f"got {self.error_feedback}"
            )
        return ""


@dataclass(frozen=True, slots=True)
class Compressed:
    """An encoded update.

    Attributes:
        payload: for the wire.
        decoded: what the other end makes of it.
        state: of the encoder, after it.
    """

    payload: bytes
    decoded: Arrays
    state: Arrays = field(default_factory=dict)


class LossyCodec(ABC):
    """A codec of parts. Subclasses say which part stands for each tensor."""

    codec_id: int

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @property
    def most_bytes(self) -> int:
        """Length of the longest payload: that of the update at float32."""
        return most_bytes(self.spec)

    def initial_state(self) -> Arrays:
        """Nothing is kept, unless a subclass does."""
        return {}

    @abstractmethod
    def compress(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> Compressed:
        """Encode an update.

        Raises:
            ValueError: if the update holds a NaN or an infinity.
        """

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        """Payload and next state of the sending end; see `compress`."""
        found = self.compress(update, state, progress=progress, seed=seed)
        return found.payload, found.state

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        """The update that the parts stand for."""
        return to_arrays(self.spec, unpack(payload, self.spec, self.codec_id)), state

    def packed(self, parts: Parts, state: Arrays | None = None) -> Compressed:
        """The payload of some parts, with what `decode` will make of it."""
        payload = pack(self.spec, parts, self.codec_id)
        return Compressed(payload, to_arrays(self.spec, unpack(payload, self.spec, self.codec_id)), state or {})

    def raw(self, update: Arrays) -> Parts:
        """Every tensor as it is."""
        return Parts({tensor.name: exact(tensor, update[tensor.name]) for tensor in self.spec})


class WithErrorFeedback:
    """Adds what was lost so far to each update. What is lost now is kept for the next.

    Only parameters: buffers are statistics, of which nothing is lost. The residual is a displacement, so it can wait
    for any number of rounds and be added at a later version.
    """

    def __init__(self, codec: LossyCodec) -> None:
        self._codec = codec
        self.spec = codec.spec
        self._names = [tensor.name for tensor in codec.spec if tensor.kind == "parameter"]

    @property
    def most_bytes(self) -> int:
        """Length of the longest payload, whatever the residual."""
        return self._codec.most_bytes

    def initial_state(self) -> Arrays:
        """No residual: it takes no room, on disk or on the wire, before there is one."""
        return self._codec.initial_state()

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        """Encode update + residual.

        Raises:
            ValueError: if the update, or its sum with the residual, holds a NaN or an infinity.
        """
        require_finite(update)
        lost = without_prefix(RESIDUAL, state)
        whole: dict[str, Array] = dict(update)
        with np.errstate(over="ignore"):
            for name in lost:
                whole[name] = np.asarray(update[name] + lost[name])
        rest = {name: value for name, value in state.items() if not name.startswith(RESIDUAL)}
        found = self._codec.compress(whole, rest, progress=progress, seed=seed)
        residual = {name: np.asarray(whole[name] - found.decoded[name], np.float32) for name in self._names}
        return found.payload, {**found.state, **prefixed(RESIDUAL, residual)}

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        """The update that the parts stand for."""
        return self._codec.decode(payload, state)


def exact(tensor: TensorSpec, value: Array) -> Part:
    """A tensor as it is: dense float32, or nothing where it is all zeros."""
    return Dense(value) if value.any() else Zero()
