"""Flower's own processes on loopback, started and ended by a test."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, SMALL

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


class Federation:
    """A SuperLink, SuperNodes that keep their state below `directory`, and runs of the small experiment."""

    def __init__(self, directory: Path, num_nodes: int) -> None:
        self.directory = directory
        self._home = directory / "home"
        self._home.mkdir()
        self._port, *self._node_ports = free_ports(1 + 2 * num_nodes)
        self._environment = ENVIRONMENT | {"FLWR_HOME": str(self._home)}
        self._started: list[subprocess.Popen[bytes]] = []
        (self._home / "config.toml").write_text(
            f'[superlink.loop]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )

    def start_link(self) -> None:
        self._start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self._port))
        wait_for(self._port)

    def start_node(self, client: int) -> subprocess.Popen[bytes]:
        node = f'partition-id={client} state-dir="{self.directory / f"site{client}"}"'
        address, port = f"127.0.0.1:{self._port}", str(self._node_ports.pop())
        return self._start(
            *("flower-supernode", "--insecure", "--superlink", address, "--port", port, "--node-config", node)
        )

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self._home / f"{command[0]}-{len(self._started)}.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=self._home, env=self._environment, stdout=log, stderr=log)
        self._started.append(process)
        return process

    def submit(self, overrides: str) -> int:
        """Start a run of the small experiment; Flower's id of it."""
        settings = {"config-text": SMALL, "output-dir": str(self.directory / "out"), "set": overrides}
        config = self._home / "run.toml"
        config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        answer = self._ask("flwr", "run", str(ROOT), "loop", "-c", str(config), "--format", "json")
        return int(answer["run-id"])

    def wait(self, run_id: int, seconds: float) -> dict[str, Any]:
        """What Flower says of the run once it is finished, or when the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            run: dict[str, Any] = self._ask("flwr", "ls", "loop", "--run-id", str(run_id), "--format", "json")["runs"][
                0
            ]
            if run["status"].startswith("finished") or time.monotonic() > deadline:
                return run
            time.sleep(2)

    def run_dir(self) -> Path:
        return next((self.directory / "out" / "small").iterdir())

    def _ask(self, *command: str) -> dict[str, Any]:
        done = subprocess.run(
            command, cwd=self._home, env=self._environment, capture_output=True, text=True, timeout=60
        )
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return answer

    def stop(self) -> None:
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def federation(directory: Path, num_nodes: int) -> Iterator[Federation]:
    """A SuperLink with so many SuperNodes, for as long as the block lasts."""
    made = Federation(directory, num_nodes)
    try:
        made.start_link()
        for client in range(num_nodes):
            made.start_node(client)
        yield made
    finally:
        made.stop()


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
