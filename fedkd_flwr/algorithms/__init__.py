"""What a client optimises: one file for each algorithm with both halves, one line for each here."""

from fedkd_flwr.algorithms.base import Algorithm, AlgorithmOptions, Baseline
from fedkd_flwr.algorithms.fd import FdOptions
from fedkd_flwr.algorithms.fedavg import FedAvgOptions
from fedkd_flwr.algorithms.fedkd import FedKDOptions
from fedkd_flwr.algorithms.fedkd_paper import FedKDPaperOptions
from fedkd_flwr.algorithms.fedprox import FedProxOptions
from fedkd_flwr.algorithms.flora import FloraOptions
from fedkd_flwr.algorithms.frd import FrdOptions, MixFrdOptions
from fedkd_flwr.algorithms.local_only import LocalOnlyOptions
from fedkd_flwr.algorithms.lora_avg import LoraAvgOptions
from fedkd_flwr.algorithms.lora_kd import LoraKDOptions
from fedkd_flwr.algorithms.mixfld import Mix2FldOptions, MixFldOptions

ALGORITHMS: dict[str, type[AlgorithmOptions]] = {
    "fd": FdOptions,
    "fedavg": FedAvgOptions,
    "fedkd": FedKDOptions,
    "fedkd_paper": FedKDPaperOptions,
    "fedprox": FedProxOptions,
    "flora": FloraOptions,
    "frd": FrdOptions,
    "mixfrd": MixFrdOptions,
    "local_only": LocalOnlyOptions,
    "mix2fld": Mix2FldOptions,
    "mixfld": MixFldOptions,
    "lora_avg": LoraAvgOptions,
    "lora_kd": LoraKDOptions,
}

__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmOptions", "Baseline"]
