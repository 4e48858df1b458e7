"""What an update weighs on the wire: one file for each compressor, one line for each here."""

from fedkd_flwr.compressors.base import CompressorOptions
from fedkd_flwr.compressors.ef21 import Ef21Options
from fedkd_flwr.compressors.identity import IdentityOptions
from fedkd_flwr.compressors.powersgd import PowerSgdOptions
from fedkd_flwr.compressors.quantize import QuantizeOptions
from fedkd_flwr.compressors.svd import SvdOptions
from fedkd_flwr.compressors.top_k import TopKOptions
from fedkd_flwr.compressors.transform_coding import TransformCodingOptions

COMPRESSORS: dict[str, type[CompressorOptions]] = {
    "transform_coding": TransformCodingOptions,
    "identity": IdentityOptions,
    "svd": SvdOptions,
    "quantize": QuantizeOptions,
    "top_k": TopKOptions,
    "powersgd": PowerSgdOptions,
    "ef21": Ef21Options,
}

__all__ = ["COMPRESSORS", "CompressorOptions"]
