"""Flower's own processes on loopback, started and ended by a test."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd_flwr.flower.certificates import (
    CA_CERTIFICATE,
    SECRET,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    make_certificates,
    make_node_key,
)
from fedkd_flwr.flower.commands import add_connection
from fedkd_flwr.flower.processes import NO_SETTINGS
from fedkd_flwr.measure.ledger import Row
from tests.conftest import ROOT, SMALL
from tests.flower.test_exchange import rows_of

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
}


def fedkd(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "fedkd"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@dataclass(frozen=True)
class Started:
    """A process of Flower's, and what it prints."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def says(self, text: str) -> bool:
        return text in self.log.read_text(errors="replace")

    def at_work(self, server_round: int) -> bool:
        """Whether it is a SuperNode that has begun with its work of a round, in a process of its own."""
        begun = self.log.read_text(errors="replace").partition(f"ROUND {server_round}]")[2]
        return "Start `flwr-clientapp` process" in begun

    def kill(self) -> None:
        """End it, and what it has started, without a warning."""
        kill_all([self.pid, *descendants(self.pid)])
        self.process.wait()


class Federation:
    """A SuperLink, SuperNodes that keep their state below `directory`, and runs of an experiment.

    Args:
        directory: for everything.
        secure: with TLS, node authentication, a database, and a SuperExec of its own, as on several hosts.
    """

    def __init__(self, directory: Path, *, secure: bool = False) -> None:
        self.directory = directory
        self.keys = directory / "keys"
        self._secure = secure
        self._home = directory / "home"
        self._home.mkdir()
        [self._port] = free_ports(1)
        self._address = f"127.0.0.1:{self._port}"
        self._environment = ENVIRONMENT | {"FLWR_HOME": str(self._home)}
        self._started: list[Started] = []
        self.registered: dict[int, str] = {}  # names of keys, by Flower's id of the node
        if secure:
            make_certificates(self.keys, ["127.0.0.1"], days=1)
        add_connection(self._home, "loop", self._address, self.keys / CA_CERTIFICATE if secure else None)

    def start_link(self) -> Started:
        secure = (
            *("--ssl-ca-certfile", self.keys / CA_CERTIFICATE),
            *("--ssl-certfile", self.keys / SERVER_CERTIFICATE, "--ssl-keyfile", self.keys / SERVER_KEY),
            *("--enable-supernode-auth", "--isolation", "process", "--superexec-auth-secret-file", self.keys / SECRET),
            *("--database", self._home / "state.db"),
        )
        options = secure if self._secure else ("--insecure",)
        link = self._start("flower-superlink", "--host", "127.0.0.1", "--port", self._port, *options)
        wait_for(self._port)
        return link

    def start_exec(self) -> Started:
        trusted = ("--root-certificates", self.keys / CA_CERTIFICATE)
        secret = ("--superexec-auth-secret-file", self.keys / SECRET)
        return self._start("flower-superexec", "--runtime-api-address", self._address, *trusted, *secret)

    def make_key(self, name: str, *, registered: bool = True) -> None:
        public = make_node_key(self.keys / name)
        if registered:
            answer = self._ask("flwr", "supernode", "register", str(public), "loop", "--name", name)
            self.registered[int(answer["node-id"])] = name

    def start_node(
        self,
        name: str,
        config: Mapping[str, int | str],
        *,
        key: str | None = None,
        authority: Path | None = None,
        settings: Mapping[str, str] = NO_SETTINGS,
    ) -> Started:
        """A SuperNode.

        Args:
            name: of the directory of its state.
            config: what else it is configured with.
            key: of those made, to authenticate itself with.
            authority: what it trusts; the one that signed the SuperLink's certificate by default.
            settings: environment variables beyond those of all.
        """
        entries = {"state-dir": str(self.state_dir(name)), **config}
        node = " ".join(f"{entry}={json.dumps(value)}" for entry, value in entries.items())
        trusted = ("--root-certificates", authority or self.keys / CA_CERTIFICATE)
        allowed = (*trusted, "--auth-supernode-private-key", self.keys / str(key))
        [port] = free_ports(1)
        return self._start(
            *("flower-supernode", "--superlink", self._address, "--port", port, "--node-config", node),
            *(allowed if self._secure else ("--insecure",)),
            settings=settings,
        )

    def state_dir(self, name: str) -> Path:
        return self.directory / name

    def _start(self, *command: object, settings: Mapping[str, str] = NO_SETTINGS) -> Started:
        log = self._home / f"{command[0]}-{len(self._started)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self._home,
                env=self._environment | dict(settings),
                stdout=output,
                stderr=output,
            )
        started = Started(process, log)
        self._started.append(started)
        return started

    def submit(self, overrides: str, experiment: str = SMALL) -> int:
        """Start a run; Flower's id of it."""
        settings = {"config-text": experiment, "output-dir": str(self.directory / "out"), "set": overrides}
        config = self._home / "run.toml"
        config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        answer = self._ask("flwr", "run", str(ROOT), "loop", "-c", str(config))
        return int(answer["run-id"])

    def wait(self, run_id: int, seconds: float) -> dict[str, Any]:
        """What Flower says of the run once it is finished, or when the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            run: dict[str, Any] = self._ask("flwr", "ls", "loop", "--run-id", str(run_id))["runs"][0]
            if run["status"].startswith("finished") or time.monotonic() > deadline:
                return run
            time.sleep(2)

    def node_statuses(self) -> dict[str, str]:
        """What Flower says of each node that it knows, by the name that its key was registered under."""
        nodes = self._ask("flwr", "supernode", "ls", "loop", "--verbose")["nodes"]
        return {self.registered.get(int(node["node-id"]), "stranger"): node["status"] for node in nodes}

    def run_dir(self) -> Path:
        return next((self.directory / "out").glob("*/*"))

    def rows(self, kind: str) -> list[Row]:
        """Rows that the ledger of the one run has by now."""
        return [row for path in self.directory.glob("out/*/*/ledger.jsonl") for row in rows_of(path.parent, kind)]

    def closed(self, server_round: int) -> bool:
        return any(row["round"] == server_round for row in self.rows("round"))

    def _ask(self, *command: str) -> dict[str, Any]:
        done = subprocess.run(
            [*command, "--format", "json"],
            cwd=self._home,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "{" in done.stdout, done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return answer

    def stop(self) -> None:
        for started in reversed(self._started):
            started.process.terminate()
        for started in self._started:
            try:
                started.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                started.kill()


@contextmanager
def federation(directory: Path, num_nodes: int) -> Iterator[Federation]:
    """A SuperLink with so many SuperNodes, for as long as the block lasts."""
    made = Federation(directory)
    try:
        made.start_link()
        for client in range(num_nodes):
            made.start_node(f"site{client}", {"partition-id": client})
        yield made
    finally:
        made.stop()


def running(*words: str) -> dict[int, str]:
    """Command lines with all these words, by process."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words):
            found[int(file.parent.name)] = line
    return found


def wait_until(condition: Callable[[], object], what: str, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.2)


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have, youngest generation last."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for process in found:
        found += parents.get(process, [])
    return found[1:]


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port}")
