"""Simulation on a Ray cluster that is there already.

Flower joins the cluster that the environment names. Its virtual clients then run now on one host, now on another, so
what they remember and the code they run must lie where every host finds it under the same path. That is looked at
before anything is started: a client that does not find its state would begin again with its first teacher.
"""

import logging
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.errors import RunError

ADDRESS_VARIABLE = "RAY_ADDRESS"
_LOCAL = "local"  # Ray's own word for none
_PROBE_SECONDS = 60.0
_KNOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a simulation will run on.

    Attributes:
        address: of the cluster.
        num_nodes: Ray nodes that are alive.
        num_cpus: theirs together; one client runs on each.
    """

    address: str
    num_nodes: int
    num_cpus: float

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"on the Ray cluster at {self.address}: {self.num_nodes} nodes, {self.num_cpus:g} CPUs; clients move "
            "between them, and all of them find the output directory"
        )


def cluster_address() -> str:
    """Address of the cluster that a simulation will join; empty where it starts a Ray of its own."""
    address = os.environ.get(ADDRESS_VARIABLE, "").strip()
    return "" if address == _LOCAL else address


def joined_cluster(directory: Path) -> Cluster | None:
    """The cluster that a simulation will join, after a look at whether it can.

    Args:
        directory: where clients' states and the app will lie; made if it isn't there.

    Returns:
        None where a simulation starts a Ray of its own.

    Raises:
        ConfigError: if no cluster answers, or one of its nodes does not find the directory.
        RunError: if the directory can't be written.
    """
    address = cluster_address()
    if not address:
        return None
    marker, token = directory / f".shared-{secrets.token_hex(4)}", secrets.token_hex(16)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        marker.write_text(token, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{str(directory)!r} can't be written: {error.strerror}") from error
    try:
        found, num_cpus = _asked(address, marker, token)
    finally:
        marker.unlink(missing_ok=True)
    check_shared(found, directory)
    return Cluster(address, len(found), num_cpus)


def check_shared(found: Mapping[str, str], directory: Path) -> None:
    """Do nothing if every node finds the directory.

    Args:
        found: for each node, why it does not; empty where it does.
        directory: for the message.

    Raises:
        ConfigError: naming the first that does not.
    """
    for host, reason in found.items():
        if reason:
            raise ConfigError(
                f"output directory {str(directory)!r}: must be found by every node of the Ray cluster under this path, "
                f"because clients move between them; {host} does not ({reason}); give a shared one with --output-dir"
            )


def _asked(address: str, marker: Path, token: str) -> tuple[dict[str, str], float]:
    """What each node of the cluster says of a file, and all CPUs."""
    import ray  # seconds to import, and only simulations on a cluster need it here
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
    environment = {"env_vars": {"PYTHONPATH": path}}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a warning of what will change in Ray
    try:
        _knock(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
    except Exception as error:  # Ray raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{ADDRESS_VARIABLE}: no Ray cluster of this version answers at {address!r} ({reason}); start it, or unset "
            f"{ADDRESS_VARIABLE} to simulate on this machine alone"
        ) from None
    try:
        nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        names = {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes}
        look = ray.remote(num_cpus=0, max_retries=0)(reason_against)
        asked = {
            f"{name}, node {node_id[:8]}": look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
            ).remote(str(marker), token)
            for node_id, name in names.items()
        }
        found = {}
        for name, answer in asked.items():
            try:
                found[name] = ray.get(answer, timeout=_PROBE_SECONDS)
            except Exception as error:
                found[name] = f"it can't run this installation: {' '.join(str(error).split())[-200:]}"
        return found, float(sum(node["Resources"].get("CPU", 0) for node in nodes))
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Find out in seconds that nobody listens; Ray takes two minutes and prints."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():  # "auto" has none: Ray knows where it is
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def reason_against(marker: str, token: str) -> str:
    """Why a file that was written elsewhere is not to be found here; empty where it is."""
    try:
        return "" if Path(marker).read_text(encoding="utf-8") == token else "it finds another file there"
    except OSError as error:
        return error.strerror or type(error).__name__
