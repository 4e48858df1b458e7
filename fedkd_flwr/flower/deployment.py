"""A whole deployment on loopback: SuperLink, SuperExec and SuperNodes with TLS and node authentication.

What `docs/deploy.md` does by hand on several machines, on one: the same certificates, keys and processes, in a
temporary home, for one run of an experiment. Certificates say who the server is and keys who the nodes are; who users
are Flower does not ask, so the SuperLink here serves one user of the machine, as that of a simulation does.
"""

import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fedkd_flwr.experiment import Experiment
from fedkd_flwr.flower import certificates
from fedkd_flwr.flower.certificates import make_certificates, make_node_key
from fedkd_flwr.flower.commands import Commands, add_connection, check_app, run_config, toml
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.private_superlink import CLOSED_DOORS, PRIVATE_SUPERLINK, can_tell_users_apart
from fedkd_flwr.flower.processes import LOOPBACK, NO_SETTINGS, Child, Children, free_ports
from fedkd_flwr.measure.ledger import LEDGER_FILE, Listener, read_rows

LOGS_DIR = "logs"
NODES_DIR = "nodes"
_CONNECTION = "demo"
_CERTIFICATE_DAYS = 30
_ONLINE_SECONDS = 120.0
_LOOK_SECONDS = 1.0
_SHARED_MACHINE_NOTE = (
    "this system does not tell whose a connection is, so other users of this machine could run apps of theirs in the "
    "demo, as you"
)

_log = logging.getLogger("fedkd")


@dataclass(frozen=True, slots=True)
class Deployed:
    """What a run on real processes cost.

    Attributes:
        ledger_bytes: what the run's ledger counted: its messages, and Flower's framing of them.
        flower_bytes: what Flower itself counted as network traffic.
        round_seconds: how long each round took, by the ledger.
    """

    ledger_bytes: int
    flower_bytes: int
    round_seconds: tuple[float, ...]

    @property
    def difference(self) -> float:
        """Ledger's bytes over Flower's, less 1."""
        return self.ledger_bytes / self.flower_bytes - 1 if self.flower_bytes else float("inf")

    def lines(self) -> list[str]:
        """What to say of it."""
        said = (
            f"bytes: {self.ledger_bytes} by the ledger (messages and framing), {self.flower_bytes} by Flower; "
            f"difference {100 * self.difference:+.2f} %"
        )
        if not self.round_seconds:
            return [said]
        mean = sum(self.round_seconds) / len(self.round_seconds)
        return [said, f"seconds per round: {mean:.1f} (first {self.round_seconds[0]:.1f})"]


def run_demo(experiment: Experiment, app_dir: Path, run_dir: Path, listener: Listener | None = None) -> Deployed:
    """Deploy on loopback, run an experiment there with one SuperNode for each of its clients, and take it all down.

    Args:
        experiment: what to run.
        app_dir: the Flower app: pyproject.toml, server_app.py, client_app.py.
        run_dir: where results go: <output>/<experiment name>/<run name>; what the nodes keep in `nodes` below it, what
            Flower's processes print in `logs`.
        listener: called with every row of the ledger as it is written.

    Raises:
        ConfigError: if `app_dir` is no app, or the run directory has another name than <experiment name>/<run name>.
        RunError: if a process ended too early, the nodes did not connect, or the run did not complete.
        KeyboardInterrupt: on Ctrl-C, after the run was stopped.
    """
    check_app(app_dir)
    config = run_config(experiment, app_dir, run_dir)
    (run_dir / LOGS_DIR).mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="fedkd-", ignore_cleanup_errors=True) as name, Children() as children:
        site = _Site(Path(name), run_dir, children)
        flower = site.start_server()
        site.start_nodes(flower, experiment.num_clients)
        site.wait_until_online(flower, experiment.num_clients)
        run_id = flower.submit(app_dir, config)
        status = flower.run_to_end(run_id, run_dir, listener, children.require_running)
    return _deployed(run_dir, status.get("network-traffic", {}))


class _Site:
    """The hosts of the demo, all of them this one.

    Args:
        home: private directory; every host has its own below it.
        run_dir: for logs and for what nodes keep.
        children: where processes are started.
    """

    def __init__(self, home: Path, run_dir: Path, children: Children) -> None:
        self._run_dir = run_dir
        self._children = children
        self._home = home
        self._keys = home / "keys"
        self._ca = self._keys / certificates.CA_CERTIFICATE
        [self._port] = free_ports(1)
        self._address = f"{LOOPBACK}:{self._port}"

    def start_server(self) -> Commands:
        """SuperLink and SuperExec; the commands that reach them."""
        if not (private := can_tell_users_apart()):
            _log.warning("note: %s", _SHARED_MACHINE_NOTE)
        make_certificates(self._keys, ["localhost", LOOPBACK], _CERTIFICATE_DAYS)
        home = self._directory("server")
        secret = ("--superexec-auth-secret-file", str(self._keys / certificates.SECRET))
        superlink = self._start(
            "superlink",
            home,
            *(PRIVATE_SUPERLINK if private else ("flower-superlink",)),
            *("--host", LOOPBACK, "--port", str(self._port)),
            *("--ssl-ca-certfile", str(self._ca)),
            *("--ssl-certfile", str(self._keys / certificates.SERVER_CERTIFICATE)),
            *("--ssl-keyfile", str(self._keys / certificates.SERVER_KEY)),
            *("--enable-supernode-auth", "--isolation", "process", *secret),
            *("--database", str(home / "state.db"), "--disable-runtime-dependency-installation"),
            settings=CLOSED_DOORS,
        )
        self._children.wait_for_port(superlink, self._port)
        self._start(
            "superexec",
            home,
            *("flower-superexec", "--runtime-api-address", self._address),
            *("--root-certificates", str(self._ca), *secret),
        )
        user = self._directory("user")
        add_connection(user, _CONNECTION, self._address, self._ca)
        return Commands(user, _CONNECTION)

    def start_nodes(self, flower: Commands, count: int) -> None:
        """Register so many keys, and only then start the nodes that have them: an unknown key is turned away."""
        keys = [f"{client:05d}" for client in range(count)]  # the names that clients have in one process
        for key in keys:
            flower.register(make_node_key(self._keys / f"node-{key}"), key)
        for client, (key, port) in enumerate(zip(keys, free_ports(count), strict=True)):
            home = self._directory(f"node-{key}")
            state_dir = self._run_dir / NODES_DIR / key
            state_dir.mkdir(mode=0o700, parents=True)
            node: dict[str, int | str] = {"partition-id": client, "client-id": key, "state-dir": str(state_dir)}
            file = home / "node.toml"
            file.write_text("".join(f"{name} = {toml(value)}\n" for name, value in node.items()), encoding="utf-8")
            self._start(
                f"node-{key}",
                home,
                *("flower-supernode", "--superlink", self._address, "--root-certificates", str(self._ca)),
                *("--auth-supernode-private-key", str(self._keys / f"node-{key}")),
                *("--host", LOOPBACK, "--port", str(port), "--node-config", str(file)),
            )

    def wait_until_online(self, flower: Commands, count: int) -> None:
        """Return once so many nodes are connected."""
        deadline = time.monotonic() + _ONLINE_SECONDS
        while (online := flower.num_online()) < count:
            self._children.require_running()
            if time.monotonic() > deadline:
                logs = self._run_dir / LOGS_DIR
                raise RunError(f"{online} of {count} nodes connected in {_ONLINE_SECONDS:g} s; logs: {logs}")
            time.sleep(_LOOK_SECONDS)

    def _directory(self, name: str) -> Path:
        directory = self._home / name
        directory.mkdir(mode=0o700)
        return directory

    def _start(self, name: str, home: Path, *command: str, settings: Mapping[str, str] = NO_SETTINGS) -> Child:
        return self._children.start(name, command, home, self._run_dir / LOGS_DIR / f"{name}.log", settings)


def _deployed(run_dir: Path, traffic: dict[str, int]) -> Deployed:
    rows = list(read_rows(run_dir / LEDGER_FILE))
    counted = sum(row["wire_bytes"] + row["framing_bytes"] for row in rows if row["kind"] == "message")
    times = [row["elapsed_seconds"] for row in rows if row["kind"] == "round"]  # from round 0, when all are met
    return Deployed(
        counted,
        int(traffic.get("inbound-bytes", 0)) + int(traffic.get("outbound-bytes", 0)),
        tuple(after - before for before, after in pairwise(times)),
    )
