"""`fedkd deploy --demo`: TLS, node authentication and real processes. Slow."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedkd_flwr.flower.checkpoint import Checkpoints
from tests.conftest import SMALL, Run
from tests.flower.test_exchange import outcome
from tests.integration.federation import BIN, ENVIRONMENT, fedkd

pytestmark = pytest.mark.slow

NUM_NODES = 3
PRIVATE = {"ca.key", "server.key", "superexec.secret", *(f"node-{client:05d}" for client in range(NUM_NODES))}


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@contextmanager
def demo(conf: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """The demo in a process, its temporary files in `tmp` beside the configuration, its results in `the out`."""
    temporary = conf.parent / "tmp"
    temporary.mkdir()
    command = [str(BIN / "fedkd"), "deploy", "--demo", conf.name, "--nodes", str(NUM_NODES)]
    command += ["--output-dir", "the out", *(item for override in overrides for item in ("--set", override))]
    process = subprocess.Popen(
        command,
        cwd=conf.parent,
        env=ENVIRONMENT | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # it takes down what it started
        process.communicate()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert condition()


def left_over(directory: Path) -> list[str]:
    """Processes that name the directory in their command line or environment, and files of the demo's home."""
    found = [
        _read(path / "cmdline")
        for path in Path("/proc").glob("[0-9]*")
        if any(str(directory) in _read(path / of) for of in ("cmdline", "environ"))
    ]
    lines = [line for line in found if "pytest" not in line]
    return lines + [str(path) for path in (directory / "tmp").iterdir()]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def test_the_demo_gives_the_in_process_student_and_flowers_own_bytes_and_leaves_nothing(
    conf: Path, tmp_path: Path, run: Run
) -> None:
    with demo(conf, "num_rounds=2") as process:

        def private() -> dict[str, int]:
            return {
                path.name: path.stat().st_mode & 0o077
                for path in (tmp_path / "tmp").glob("fedkd-*/keys/*")
                if path.name in PRIVATE
            }

        wait_until(lambda: private().keys() == PRIVATE, process)
        assert set(private().values()) == {0}
        printed, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    run_dir = next((tmp_path / "the out" / "small").iterdir())
    assert outcome(run_dir) == outcome(run("num_rounds=2"))
    newest = Checkpoints(run_dir, 1).latest()
    assert newest is not None
    assert len({seat["owner"] for seat in newest.parts["roster"].facts["seats"]} - {""}) == NUM_NODES, "keys own names"
    difference = next(line for line in printed.splitlines() if line.startswith("bytes: "))
    assert abs(float(difference.split()[-2])) < 1
    assert (run_dir / "report.html").is_file()
    assert str(run_dir) in printed
    assert not left_over(tmp_path)


def test_ctrl_c_takes_the_deployment_down(conf: Path, tmp_path: Path) -> None:
    with demo(conf, "num_rounds=5000") as process:
        wait_until(lambda: bool(list(tmp_path.glob("the out/small/*/ledger.jsonl"))), process)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == 130
    assert not left_over(tmp_path)


def test_a_run_that_fails_is_exit_1_with_the_reason(conf: Path, tmp_path: Path) -> None:
    done = fedkd(
        *("deploy", "--demo", conf, "--nodes", 2, "--output-dir", tmp_path / "out"),
        *("--set", "algorithm.student_optimizer.learning_rate=1e30", "--set", "num_rounds=1"),
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stdout
    assert "no round had 2 good replies" in done.stderr
