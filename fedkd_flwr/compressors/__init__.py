"""What an update weighs on the wire: one file for each compressor, one line for each here."""

from fedkd_flwr.compressors.base import CompressorOptions
from fedkd_flwr.compressors.identity import IdentityOptions
from fedkd_flwr.compressors.svd import SvdOptions

COMPRESSORS: dict[str, type[CompressorOptions]] = {
    "identity": IdentityOptions,
    "svd": SvdOptions,
}

__all__ = ["COMPRESSORS", "CompressorOptions"]
