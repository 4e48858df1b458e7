"""An intruder, a hostile node and a dead worker, each on real processes. Slow."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedkd_flwr.flower.private_superlink import can_tell_users_apart
from tests.conftest import SMALL, Run
from tests.flower.test_exchange import STUDENT, rows_of
from tests.integration.federation import (
    BIN,
    ENVIRONMENT,
    descendants,
    federation,
    fedkd,
    kill_all,
    running,
    wait_until,
)

pytestmark = pytest.mark.slow

INTRUDER = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False)
print("came in", ray.get(ray.remote(num_cpus=0)(lambda: 7).remote(), timeout=30))
"""
# Created after the user is another one: a socket belongs to whoever makes it.
STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
link = socket.socket()
link.connect(("127.0.0.1", int(sys.argv[1])))
link.sendall(b"GET /v1/health HTTP/1.0\\r\\n\\r\\n")
print(link.recv(100).split()[1].decode())
"""
# What a node's client sends: records whose list of names are three bytes that are none.
THREE_BYTES = """
import sys
if "flwr-clientapp" in sys.argv[0] or any("flwr-clientapp" in part for part in sys.orig_argv):
    from flwr.app import RecordDict
    honest = RecordDict.deflate
    def deflate(self):
        if "metrics" not in self:
            return honest(self)
        head = honest(self).partition(b"\\0")[0].split(b" ")
        return b" ".join([head[0], head[1], b"3"]) + b"\\0" + b"[1]"
    RecordDict.deflate = deflate
"""


@dataclass(frozen=True)
class Simulation:
    """A `fedkd run` that goes on.

    Attributes:
        process: the command.
        temporary: its directory for temporary files, in the command lines of its Ray.
        out: where results go.
    """

    process: subprocess.Popen[str]
    temporary: str
    out: Path

    def rounds(self) -> int:
        """Rounds that are closed."""
        return sum(len(rows_of(path.parent, "round")) for path in self.out.glob("*/*/ledger.jsonl"))

    def workers(self) -> list[int]:
        """Processes in which clients work."""
        [raylet] = running("raylet/raylet ", self.temporary)
        actors = running("ray::ClientAppActor")
        return [process for process in descendants(raylet) if process in actors]

    def address(self) -> str:
        """Of its Ray, as anybody on the network may find it."""
        found = re.search(r"--gcs-address=(\S+)", "".join(running("log_monitor.py", self.temporary).values()))
        return found[1] if found else ""


@contextmanager
def simulation(directory: Path, *overrides: str) -> Iterator[Simulation]:
    conf = directory / "small.yaml"
    conf.write_text(SMALL)
    out = directory / "out"
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as temporary:
        command = [str(BIN / "fedkd"), "run", str(conf), "--output-dir", str(out)]
        process = subprocess.Popen(
            [*command, *(part for override in overrides for part in ("--set", override))],
            cwd=directory,
            env=ENVIRONMENT | {"TMPDIR": temporary},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield Simulation(process, temporary, out)
        finally:
            process.terminate()
            process.wait(timeout=60)
        assert list(Path(temporary).iterdir()) == []  # its own Ray directory is gone


def test_an_intruder_with_the_address_of_ray_is_refused_and_the_run_completes(tmp_path: Path) -> None:
    with simulation(tmp_path, "num_rounds=40") as run:
        wait_until(run.address, "Ray's address")
        environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("RAY_")}
        intruder = subprocess.run(
            [sys.executable, "-c", INTRUDER, run.address()],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert intruder.returncode != 0
        assert "came in" not in intruder.stdout
        assert "InvalidAuthToken" in intruder.stderr + intruder.stdout
        assert run.process.poll() is None, "the run was over before the intruder came"
        if can_tell_users_apart() and os.getuid() == 0:
            [line] = running("fedkd_flwr.flower.private_superlink", "--port").values()
            found = re.search(r"--port (\d+)", line)
            assert found is not None
            stranger = subprocess.run([sys.executable, "-c", STRANGER, found[1]], capture_output=True, text=True)
            assert stranger.stdout.strip() == "403", stranger.stderr
        output, _ = run.process.communicate(timeout=600)
        assert run.process.returncode == 0, output


def test_a_node_whose_objects_can_not_be_read_costs_its_own_replies(tmp_path: Path) -> None:
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(THREE_BYTES)
    with federation(tmp_path, 2) as nodes:
        nodes.start_node("hostile", {"partition-id": 2}, settings={"PYTHONPATH": str(tmp_path / "patch")})
        flower = nodes.wait(nodes.submit("num_rounds=2 server.connect_timeout_seconds=400"), 900)
        assert flower["status"] == "finished:completed", flower
        trained, final = nodes.rows("round")[1:], nodes.rows("final")[0]
        assert [row["clients"] for row in (*trained, final)] == [["00000", "00001"]] * 3
        rejected = [item for row in (*trained, final) for item in row["rejected"]]
        assert trained[0]["rejected"]  # in later rounds it is asked only if it has said in time who it is
        for item in rejected:
            assert (item["client"], item["kind"]) == ("00002", "malformed")
            assert item["reason"].startswith("its reply can't be read: ")
        booked = [row for row in nodes.rows("message") if row["direction"] == "uplink" and row["node"] == "00002"]
        assert len(booked) == len(rejected)


def test_a_dead_worker_ends_the_run_with_the_remedy_which_gives_the_student_of_an_undisturbed_run(
    tmp_path: Path, run: Run
) -> None:
    with simulation(tmp_path, "num_rounds=12") as killed:
        wait_until(lambda: killed.rounds() > 2, "round 2", 480)
        kill_all(killed.workers()[:1])
        output, _ = killed.process.communicate(timeout=480)
        assert killed.process.returncode == 1, output
        [run_dir] = killed.out.glob("*/*")
        assert "a worker of the simulation died" in output
        assert f"fedkd resume {run_dir}" in output
        assert len(rows_of(run_dir, "round")) < 13
        assert rows_of(run_dir, "end")[-1]["status"] == "failed"
    done = fedkd("resume", run_dir, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (run_dir / STUDENT).read_bytes() == (run("num_rounds=12") / STUDENT).read_bytes()
