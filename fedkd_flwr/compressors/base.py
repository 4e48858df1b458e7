"""What every compressor's options share."""

from abc import ABC, abstractmethod

from pydantic import BaseModel

from fedkd_flwr.core.arrays import Spec
from fedkd_flwr.core.protocols import Codec


class CompressorOptions(BaseModel, ABC, extra="forbid", frozen=True, allow_inf_nan=False):
    """Options of one compressor, `name` first. They build the codec for any list of tensors."""

    name: str

    @abstractmethod
    def build(self, spec: Spec) -> Codec:
        """The codec of payloads with the tensors of `spec`."""
