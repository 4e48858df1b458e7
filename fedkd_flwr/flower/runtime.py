"""An experiment brought to life, once for each process."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from fedkd_flwr.algorithms import Algorithm
from fedkd_flwr.algorithms.base import Wires
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.protocols import Task
from fedkd_flwr.core.snapshot import snapshot_bytes
from fedkd_flwr.experiment import Experiment, parse
from fedkd_flwr.flower.limits import Limits
from fedkd_flwr.flower.lineage import initial_lineage
from fedkd_flwr.flower.reference import snapshot_arrays


@dataclass(frozen=True, slots=True)
class Runtime:
    """What both ends build from the same experiment.

    Attributes:
        experiment: the validated configuration.
        task: data and models.
        algorithm: both halves.
        wires: the codec of each direction; None where nothing is exchanged.
        initial: version 0 of the shared arrays.
        lineage: of version 0.
    """

    experiment: Experiment
    task: Task
    algorithm: Algorithm
    wires: Wires | None
    initial: Arrays
    lineage: bytes

    @property
    def limits(self) -> Limits:
        """What a message of this experiment may hold."""
        decoder = self.wires.downlink.initial_state() if self.wires else {}
        return Limits(
            upload_bytes=self.wires.uplink.most_bytes if self.wires else 0,
            broadcast_bytes=self.wires.downlink.most_bytes if self.wires else 0,
            snapshot_bytes=snapshot_bytes(snapshot_arrays(self.initial, decoder)),
            scores=self.task.metrics,
            train=self.algorithm.train_metrics,
            seconds=self.experiment.server.round_timeout_seconds,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """One line each: what was left out of the data, what leaves a client beyond what the algorithm is named for."""
        return (*self.task.data_report().notes, *self.algorithm.notes)

    @property
    def leaves(self) -> str:
        """What leaves a client, in which form, and what stays with it: one sentence."""
        privacy, algorithm = self.experiment.privacy, self.algorithm
        codec = f" through {self.experiment.compressor.name}" if algorithm.exchanges == "updates" else ""
        noise = ", clipped and with noise" if privacy else ""
        tells = privacy is None or privacy.share_metrics
        scores = "scores and numbers of examples"
        stays = f"{algorithm.stays} and the data stay" if algorithm.stays else "the data stay"
        if algorithm.exchanges == "nothing":
            return f"{scores if tells else 'nothing'}, {algorithm.leaves}; {stays}"
        return f"{algorithm.leaves}{codec}{noise}, {'with' if tells else 'without'} {scores}; {stays}"


def runtime_of(experiment: Experiment, data_path: Path | None = None) -> Runtime:
    """Build the experiment, or give the one that this process has built already.

    Limits torch and BLAS to one thread: two busy processes with two threads each on two cores run a hundred times
    slower, and the number of threads decides the last bits of a sum.

    Args:
        experiment: to build.
        data_path: of a node with data of its own; None where the experiment's is divided.

    Raises:
        ConfigError: if it can't be built.
    """
    torch.set_num_threads(1)
    return _built(experiment.to_yaml(), data_path)


@lru_cache(maxsize=1)
def _built(text: str, data_path: Path | None) -> Runtime:
    threadpool_limits(1)
    experiment = parse(text)
    task = experiment.build_task(data_path)
    algorithm = experiment.build_algorithm(task)
    initial = algorithm.shared.initial()
    wires = algorithm.shared.wires(experiment.build_codec)
    threadpool_limits(1)  # once more, for libraries that were loaded meanwhile; it looks through all of them
    return Runtime(experiment, task, algorithm, wires, initial, initial_lineage(initial))
