"""Faults that only real processes have. Slow."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import SMALL, Run
from tests.flower.test_exchange import STUDENT, rows_of
from tests.integration.federation import BIN, ENVIRONMENT, descendants, federation, fedkd, kill_all, wait_until

pytestmark = pytest.mark.slow


def rounds_in(out: Path) -> int:
    """Rounds that the one run there has closed."""
    return sum(len(rows_of(path.parent, "round")) for path in out.glob("small/*/ledger.jsonl"))


def test_a_supernode_that_is_killed_and_started_again_takes_part_again(tmp_path: Path) -> None:
    with federation(tmp_path, 2) as nodes:
        victim = nodes.start_node("site2", {"partition-id": 2})
        # Round 2 goes on without it; the next one waits until it is back, however long a loaded machine takes.
        options = "min_available=3 round_timeout_seconds=60 connect_timeout_seconds=240"
        overrides = " ".join(f"server.{option}" for option in options.split())
        run_id = nodes.submit(f"num_clients=3 num_rounds=4 {overrides}")
        wait_until(lambda: victim.at_work(2), "work of round 2")
        victim.kill()
        nodes.start_node("site2", {"partition-id": 2})  # under a new node id, with the same disk
        flower = nodes.wait(run_id, 600)
    assert flower["status"] == "finished:completed", flower
    run_dir, everyone = nodes.run_dir(), ["00000", "00001", "00002"]
    rounds, final = rows_of(run_dir, "round"), rows_of(run_dir, "final")[0]
    assert [row["clients"] for row in rounds[1:]] == [everyone, everyone[:2], everyone, everyone]
    assert {item["kind"] for row in rounds for item in row["rejected"]} <= {"error", "silent", "late"}
    assert final["clients"] == everyone
    assert not [row for row in rows_of(run_dir, "event") if "restarts from version 0" in row["event"]]


def test_a_simulation_killed_with_all_its_processes_resumes_to_the_same_student(tmp_path: Path, run: Run) -> None:
    conf = tmp_path / "small.yaml"
    conf.write_text(SMALL)
    out = tmp_path / "out"
    command = [str(BIN / "fedkd"), "run", str(conf), "--output-dir", str(out), "--set", "num_rounds=8"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT)
    wait_until(lambda: rounds_in(out) >= 4, "round 3")
    kill_all([*descendants(process.pid), process.pid])
    process.wait()
    run_dir = next((out / "small").iterdir())
    assert not rows_of(run_dir, "end")
    done = fedkd("resume", run_dir, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["round"] for row in rows_of(run_dir, "round")] == list(range(9))
    assert (run_dir / STUDENT).read_bytes() == (run("num_rounds=8") / STUDENT).read_bytes()
