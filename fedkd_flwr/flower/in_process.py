"""A run in this process: the same apps on a `LocalGrid`."""

from collections.abc import Sequence
from pathlib import Path

from fedkd_flwr.experiment import Experiment
from fedkd_flwr.flower.local_grid import ClientFunction, LocalGrid, UserConfig, task_identity
from fedkd_flwr.flower.server import serve
from fedkd_flwr.flower.settings import ServerSettings
from fedkd_flwr.measure.ledger import Listener


def run_in_process(
    experiment: Experiment,
    client_app: ClientFunction,
    run_dir: Path,
    listener: Listener | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    nodes: Sequence[UserConfig] | None = None,
) -> Path:
    """Run an experiment with as many in-process nodes as it has clients.

    Args:
        experiment: what to run.
        client_app: what a node runs.
        run_dir: where results go, client states in `state` below it.
        listener: called with every row of the ledger.
        resume: go on with the run that is there.
        force: even with another number of rounds.
        nodes: configuration of each; by default each has one of the task's partitions.

    Returns:
        The run directory.
    """
    run_config = {"config-text": experiment.to_yaml(), "state-dir": str(run_dir / "state")}
    num_clients = experiment.num_clients
    if nodes is None:
        nodes = [{"partition-id": client, "num-partitions": num_clients} for client in range(num_clients)]
    with task_identity():
        settings = ServerSettings(experiment, run_dir, resume, force)
        return serve(LocalGrid(client_app, nodes, run_config), settings, listener)
