"""Real Flower processes. Slow: each starts a SuperLink, Ray or SuperNodes on loopback."""

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

import pytest

from fedkd_flwr.measure.summary import read_summary
from tests.conftest import ROOT, SMALL, Run
from tests.flower.test_exchange import outcome, rows_of

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def fedkd(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "fedkd"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def test_flwr_run_in_simulation_gives_the_in_process_bytes(conf: Path, tmp_path: Path, run: Run) -> None:
    done = fedkd("run", conf, "--output-dir", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run_dir = next((tmp_path / "out" / "small").iterdir())
    assert outcome(run_dir) == outcome(run())


def test_a_simulation_that_fails_is_exit_1_with_the_reason(conf: Path, tmp_path: Path) -> None:
    done = fedkd(
        *("run", conf, "--output-dir", tmp_path / "out", "--set", "algorithm.student_optimizer.learning_rate=1e30"),
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stdout
    assert "no round had 1 good replies" in done.stderr
    assert "first reason" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_termination_stop_the_run_and_leave_no_process(
    number: signal.Signals, conf: Path, tmp_path: Path
) -> None:
    command = [str(BIN / "fedkd"), "run", str(conf), "--output-dir", str(tmp_path / "out"), "--set", "num_rounds=5000"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        # A shell without job control starts what runs in its background with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob("small/*/ledger.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.5)
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    time.sleep(3)
    marker = str(tmp_path / "out")
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if marker in _read(p)]
    assert not left


def _read(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@contextmanager
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield started
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def test_supernodes_on_loopback_agree_with_in_process_and_with_flowers_own_traffic(tmp_path: Path, run: Run) -> None:
    home = tmp_path / "home"
    home.mkdir()
    ports = free_ports(3)
    environment = ENVIRONMENT | {"FLWR_HOME": str(home)}
    (home / "config.toml").write_text(f'[superlink.loop]\naddress = "127.0.0.1:{ports[0]}"\ninsecure = true\n')
    overrides = 'set = "num_clients=2"\n'
    text = json.dumps(SMALL)
    (home / "run.toml").write_text(f'config-text = {text}\noutput-dir = "{tmp_path / "out"}"\n{overrides}')

    def start(*command: str) -> subprocess.Popen[bytes]:
        with (home / f"{command[0]}-{len(started)}.log").open("wb") as log:
            return subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log)

    def ask(*command: str) -> dict[str, Any]:
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=60)
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return answer

    with processes() as started:
        started.append(start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(ports[0])))
        wait_for(ports[0])
        for client in range(2):
            node = f'partition-id={client} state-dir="{tmp_path / f"site{client}"}"'
            address = f"127.0.0.1:{ports[0]}"
            port = str(ports[client + 1])
            started.append(
                start(
                    *("flower-supernode", "--insecure", "--superlink", address, "--port", port, "--node-config", node)
                )
            )
        run_id = ask(*("flwr", "run", str(ROOT), "loop", "-c", str(home / "run.toml"), "--format", "json"))["run-id"]
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            flower = ask("flwr", "ls", "loop", "--run-id", str(run_id), "--format", "json")["runs"][0]
            if flower["status"].startswith("finished"):
                break
            time.sleep(2)
    assert flower["status"] == "finished:completed", flower
    run_dir = next((tmp_path / "out" / "small").iterdir())
    assert outcome(run_dir) == outcome(run("num_clients=2"))

    summary = read_summary(run_dir)
    assert summary is not None
    framing = sum(row["framing_bytes"] for row in rows_of(run_dir, "message"))
    traffic = flower["network-traffic"]
    measured = traffic["inbound-bytes"] + traffic["outbound-bytes"]
    assert summary["bytes"]["total"] + framing == pytest.approx(measured, rel=0.01)


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
