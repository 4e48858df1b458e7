"""Error feedback by an estimate that both ends keep: only what is new about an update is coded.

Richtarik, Sokolov and Fatkhullin, "EF21", 2021, https://arxiv.org/abs/2106.05203. Both ends hold an estimate of the
sender's update; the payload codes update - estimate, and the moved estimate is what the receiver takes. It serves where
every client takes part in every round and its updates change slowly. The server holds one estimate for each client.
"""

from typing import Literal

import numpy as np

from fedkd_flwr.compressors.payload import PayloadError
from fedkd_flwr.compressors.transform_coding import TransformCodec, TransformOptions
from fedkd_flwr.core.arrays import Array, Arrays, Spec, require_finite
from fedkd_flwr.core.modules import prefixed, without_prefix

CODEC_ID = 6
_ESTIMATE = "estimate/"


class Ef21Options(TransformOptions):
    """Energies and bytes are those of the difference."""

    name: Literal["ef21"] = "ef21"

    def objection_to_noise(self) -> str:
        """The estimate would follow the noise."""
        return "name must not be ef21, which feeds what a payload loses, noise here, into the next"

    def build(self, spec: Spec) -> "Ef21Codec":
        """The codec of payloads with the tensors of `spec`."""
        return Ef21Codec(self.transform(spec))


class Ef21Codec:
    """Moves the estimate by the coded difference, on both ends alike. Buffers travel as they are."""

    def __init__(self, codec: TransformCodec) -> None:
        codec.codec_id = CODEC_ID
        self._codec = codec
        self.spec = codec.spec

    @property
    def most_bytes(self) -> int:
        """Length of the longest payload: that of the difference at float32."""
        return self._codec.most_bytes

    def initial_state(self) -> Arrays:
        """The estimate of an update before the first: zero."""
        zeros: dict[str, Array] = {t.name: np.zeros(t.shape, np.float32) for t in self.spec if t.kind == "parameter"}
        return prefixed(_ESTIMATE, zeros)

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        """Code the difference to the estimate.

        Raises:
            ValueError: if the update, or the difference, holds a NaN or an infinity.
        """
        require_finite(update)
        estimate = without_prefix(_ESTIMATE, state)
        with np.errstate(over="ignore"):
            news = {n: np.asarray(v - estimate[n]) if n in estimate else v for n, v in update.items()}
        found = self._codec.compress(news, {}, progress=progress, seed=seed)
        return found.payload, self._moved(estimate, found.decoded)

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        """The estimate after the payload, which stands for the update.

        Raises:
            PayloadError: if the payload can't be read, or the estimate would not be finite.
        """
        news, _ = self._codec.decode(payload, {})
        with np.errstate(over="ignore"):
            after = self._moved(without_prefix(_ESTIMATE, state), news)
        if not all(np.isfinite(value).all() for value in after.values()):
            raise PayloadError("the payload moves the estimate out of float32")
        return {**news, **{name: value.copy() for name, value in without_prefix(_ESTIMATE, after).items()}}, after

    def _moved(self, estimate: Arrays, news: Arrays) -> Arrays:
        return prefixed(_ESTIMATE, {name: np.asarray(value + news[name]) for name, value in estimate.items()})
