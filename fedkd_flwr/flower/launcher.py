"""`flwr run` in simulation, without its traps.

A SuperLink of its own on a free loopback port, with its own home and a neutral working directory, so that neither an
old SuperLink's environment nor a module that happens to lie in the current directory takes part; as many SuperNodes as
the experiment has clients, one CPU each; no installation of dependencies at run time; and the real outcome. Nobody else
on the machine or the network can run anything in its SuperLink or its Ray.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedkd_flwr.experiment import Experiment
from fedkd_flwr.flower.cluster import cluster_address
from fedkd_flwr.flower.commands import Commands, add_connection, check_app, run_config
from fedkd_flwr.flower.private_ray import private_ray
from fedkd_flwr.flower.private_superlink import CLOSED_DOORS, PRIVATE_SUPERLINK, can_tell_users_apart
from fedkd_flwr.flower.processes import LOOPBACK, NO_SETTINGS, Children, free_ports
from fedkd_flwr.measure.ledger import Listener

SHARED_MACHINE_NOTE = (
    "this system does not tell whose a connection is, so other users of this machine could run apps of theirs in the "
    "simulation, as you; where there are any, use --in-process"
)
_CONNECTION = "fedkd"

_log = logging.getLogger("fedkd")


def launch(
    experiment: Experiment,
    app_dir: Path,
    run_dir: Path,
    listener: Listener | None = None,
    *,
    resume: bool = False,
    force: bool = False,
) -> Path:
    """Run an experiment with `flwr run` in simulation and wait for its end.

    Args:
        experiment: what to run.
        app_dir: the Flower app: pyproject.toml, server_app.py, client_app.py.
        run_dir: where results go: <output>/<experiment name>/<run name>.
        listener: called with every row of the ledger as it is written.
        resume: go on with the run that is there.
        force: even with another number of rounds.

    Returns:
        The run directory.

    Raises:
        ConfigError: if `app_dir` is no app, or the run directory has another name than <experiment name>/<run name>.
        RunError: if the run did not complete; with the reason.
        KeyboardInterrupt: on Ctrl-C, after the run was stopped.
    """
    if not (private := can_tell_users_apart()):
        _log.warning("note: %s", SHARED_MACHINE_NOTE)
    check_app(app_dir)
    config = run_config(experiment, app_dir, run_dir, resume=resume, force=force)
    federation = f"num-supernodes={experiment.num_clients} client-resources-num-cpus=1"
    # Flower unpacks the app in its home, and the hosts of a cluster must find it there as they find the results.
    shared = run_dir.parent if cluster_address() else None
    with (
        tempfile.TemporaryDirectory(prefix="fedkd-", dir=shared, ignore_cleanup_errors=True) as name,
        _environment_of_ray(Path(name)) as settings,
        Children() as children,
    ):
        home = Path(name)
        [port] = free_ports(1)
        superlink = (
            *(PRIVATE_SUPERLINK if private else ("flower-superlink",)),
            *("--insecure", "--simulation", "--isolation", "subprocess"),
            *("--host", LOOPBACK, "--port", str(port), "--disable-runtime-dependency-installation"),
        )
        started = children.start("SuperLink", superlink, home, home / "superlink.log", {**CLOSED_DOORS, **settings})
        children.wait_for_port(started, port)
        add_connection(home, _CONNECTION, f"{LOOPBACK}:{port}", None)
        flower = Commands(home, _CONNECTION)
        run_id = flower.submit(app_dir, config, "--federation-config", federation)
        flower.run_to_end(run_id, run_dir, listener, children.require_running)
    return run_dir


@contextmanager
def _environment_of_ray(home: Path) -> Iterator[Mapping[str, str]]:
    """What makes a simulation's own Ray private; a cluster that is joined has a token of its own, or none."""
    if cluster_address():
        yield NO_SETTINGS
    else:
        with private_ray(home) as settings:
            yield settings
