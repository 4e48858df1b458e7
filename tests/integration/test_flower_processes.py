"""Real Flower processes. Slow: each starts a SuperLink, Ray or SuperNodes on loopback."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from fedkd_flwr.flower.processes import ENDING
from fedkd_flwr.measure.summary import read_summary
from tests.conftest import SMALL, Run
from tests.flower.test_exchange import outcome, rows_of
from tests.integration.federation import BIN, ENVIRONMENT, federation, fedkd

pytestmark = pytest.mark.slow


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


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
    assert "no round had 2 good replies" in done.stderr
    assert "first reason" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_command_stops_the_run_and_leave_no_process(
    number: signal.Signals, conf: Path, tmp_path: Path
) -> None:
    marker = str(tmp_path / "out")
    command = [str(BIN / "fedkd"), "run", str(conf), "--output-dir", str(tmp_path / "out"), "--set", "num_rounds=5000"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT | {"MARKER": marker},
        # A shell without job control starts what runs in its background with SIGINT ignored, nohup with SIGHUP.
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in ENDING] and None,
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
    processes = Path("/proc").glob("[0-9]*")
    assert [p for p in processes if marker in _read(p / "cmdline") + _read(p / "environ")] == []


def _read(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def test_supernodes_on_loopback_agree_with_in_process_and_with_flowers_own_traffic(tmp_path: Path, run: Run) -> None:
    with federation(tmp_path, 2) as nodes:
        flower = nodes.wait(nodes.submit("num_clients=2"), 240)
    assert flower["status"] == "finished:completed", flower
    run_dir = nodes.run_dir()
    assert outcome(run_dir) == outcome(run("num_clients=2"))

    summary = read_summary(run_dir)
    assert summary is not None
    framing = sum(row["framing_bytes"] for row in rows_of(run_dir, "message"))
    traffic = flower["network-traffic"]
    measured = traffic["inbound-bytes"] + traffic["outbound-bytes"]
    assert summary["bytes"]["total"] + framing == pytest.approx(measured, rel=0.01)
