"""Faults of nodes and server in one federation with TLS and node authentication, on real processes. Slow.

One run goes through all of them, because every round of real processes takes its time; each test looks at what one
fault left in the ledger.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedkd_flwr.flower.certificates import CA_CERTIFICATE, make_certificates
from fedkd_flwr.measure.ledger import Row
from tests.flower.test_exchange import rows_of
from tests.integration.federation import Federation, Started, wait_until
from tests.tasks import image_data

pytestmark = pytest.mark.slow

STEADY, SLOW, KILLED, WIPED = CLIENTS = "steady", "slow", "killed", "wiped"
BROKEN, UNREGISTERED, MISLED = "broken", "unregistered", "misled"

# A SuperNode that was killed is missed after 60 s at most: two heartbeats. A round begins when all clients are back.
EXPERIMENT = """
name: sites
seed: 1
num_clients: 4
num_rounds: 4
task:
  name: image_classification
  data: {source: SERVER}
  label_names: [red, green, blue]
  image_size: 8
  channels: 1
  partition: {name: own}
  teacher: {num_channels: [2], kernel_size: 3, hidden_size: 4}
  student: {num_channels: [2], kernel_size: 3, hidden_size: 4}
algorithm: {name: fedkd, hidden: false, attention: false, local: {num_epochs: 1}}
server: {min_available: 4, connect_timeout_seconds: 240, round_timeout_seconds: 75}
"""


@dataclass(frozen=True)
class Aftermath:
    """What is left when the run is over.

    Attributes:
        run_dir: of the run.
        flower: what Flower says of it.
        statuses: of nodes, while it went on, by the name of their key.
        unregistered: the node with an unknown key.
        misled: the node that trusts another authority.
        refusal: the killed node, started again before it was missed.
        broken_id: Flower's id of the node with broken data.
    """

    run_dir: Path
    flower: dict[str, Any]
    statuses: dict[str, str]
    unregistered: Started
    misled: Started
    refusal: Started
    broken_id: int

    def rows(self, kind: str) -> list[Row]:
        return rows_of(self.run_dir, kind)

    def round(self, number: int) -> Row:
        return self.rows("round")[number]

    def rejected(self, client: str) -> list[tuple[int, str, str]]:
        """Round, kind and reason of every reply of a client that did not count."""
        rows = [(row["round"], item) for row in [*self.rows("round"), *self.rows("final")] for item in row["rejected"]]
        return [(number, item["kind"], item["reason"]) for number, item in rows if item["client"] == client]

    def events(self, client: str) -> list[str]:
        return [row["event"] for row in self.rows("event") if row["client"] == client]


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    nodes = Federation(tmp_path_factory.mktemp("federation"), secure=True)
    try:
        yield run_through_faults(nodes)
    finally:
        nodes.stop()


def run_through_faults(nodes: Federation) -> Aftermath:
    directory = nodes.directory
    write_data(directory)
    link = nodes.start_link()
    nodes.start_exec()
    for name in (*CLIENTS, BROKEN, MISLED):
        nodes.make_key(name)
    nodes.make_key(UNREGISTERED, registered=False)
    processes = {name: start(nodes, name) for name in (*CLIENTS, BROKEN)}
    run_id = nodes.submit("", EXPERIMENT.replace("SERVER", str(directory / "server")))

    wait_until(lambda: nodes.closed(1), "round 1")
    with at_a_standstill(nodes.state_dir(SLOW)):
        victim = processes[KILLED]
        wait_until(lambda: victim.at_work(2), "work of round 2")
        victim.kill()
        refusal = start_until_admitted(nodes, KILLED)
        unregistered = start(nodes, UNREGISTERED)
        make_certificates(directory / "other authority", ["127.0.0.1"], days=1)
        misled = start(nodes, MISLED, authority=directory / "other authority" / CA_CERTIFICATE)
        wait_until(lambda: unregistered.process.poll() is not None, "refusal of an unknown key")
        wait_until(lambda: misled.process.poll() is not None, "refusal of an unknown authority")
        wait_until(lambda: nodes.closed(2), "round 2")
    shutil.rmtree(nodes.state_dir(WIPED))

    wait_until(lambda: processes[STEADY].at_work(3), "work of round 3")
    statuses = nodes.node_statuses()
    link.kill()
    nodes.start_link()
    flower = nodes.wait(run_id, 400)
    broken_id = next(node_id for node_id, name in nodes.registered.items() if name == BROKEN)
    return Aftermath(nodes.run_dir(), flower, statuses, unregistered, misled, refusal, broken_id)


def write_data(directory: Path) -> None:
    image_data.write(directory / "server", "test", image_data.rows(12, first=500))
    for number, name in enumerate((*CLIENTS, UNREGISTERED, MISLED)):
        image_data.write(directory / f"data of {name}", "train", image_data.rows(20, first=100 * number))
    (directory / f"data of {BROKEN}").mkdir()
    (directory / f"data of {BROKEN}" / "train.parquet").write_bytes(b"no parquet")


def start(nodes: Federation, name: str, authority: Path | None = None) -> Started:
    config = {"name": name, "data-path": str(nodes.directory / f"data of {name}")}
    return nodes.start_node(name, config, key=name, authority=authority)


def start_until_admitted(nodes: Federation, name: str) -> Started:
    """Start a SuperNode that was killed, once at once and again when it is missed; the first, which is turned away.

    A supervisor would try more often. One that is admitted within a second of being missed may be missed by nobody:
    the round then waits for its reply until the timeout.
    """
    refusal = start(nodes, name)
    wait_until(lambda: refusal.process.poll() is not None, "refusal of a node that is not missed yet")
    wait_until(lambda: nodes.node_statuses()[name] == "offline", "end of a killed node's heartbeats")
    admitted = start(nodes, name)
    wait_until(lambda: admitted.says("SuperNode ID"), "admission of a node that came back")
    return refusal


@contextmanager
def at_a_standstill(state_dir: Path) -> Iterator[None]:
    """Let the client that keeps its state there write nothing, as on a disk that hangs, while the block lasts."""
    with next(state_dir.glob("*/*/lock")).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def turned_away(node: Started) -> bool:
    """Whether a SuperNode has ended because it was not let in."""
    return node.process.returncode == 1 and node.says("Exit Code: 305")


def test_the_run_completes_and_no_round_is_skipped(aftermath: Aftermath) -> None:
    assert aftermath.flower["status"] == "finished:completed", aftermath.flower
    assert [row["round"] for row in aftermath.rows("round")] == [0, 1, 2, 3, 4]
    assert not any(row["skipped"] for row in aftermath.rows("round"))
    assert aftermath.round(1)["clients"] == sorted(CLIENTS)
    assert aftermath.rows("final")[0]["clients"] == sorted(CLIENTS)


def test_a_supernode_killed_at_work_is_turned_away_until_it_is_missed_and_goes_on_with_what_it_kept(
    aftermath: Aftermath,
) -> None:
    assert {(number, kind) for number, kind, _ in aftermath.rejected(KILLED)} <= {
        (2, "error"),
        (2, "silent"),
        (3, "late"),
    }
    assert KILLED not in aftermath.round(2)["clients"]
    assert KILLED in aftermath.round(3)["clients"]
    assert not aftermath.events(KILLED), "it kept its state"
    assert turned_away(aftermath.refusal)


def test_a_slow_node_costs_its_reply_and_comes_back_when_it_has_answered(aftermath: Aftermath) -> None:
    assert [(number, kind) for number, kind, _ in aftermath.rejected(SLOW)] == [(2, "silent"), (3, "late")]
    assert aftermath.round(2)["clients"] == [STEADY, WIPED]
    assert SLOW in aftermath.round(3)["clients"]


def test_a_node_whose_state_was_deleted_says_so_and_gets_the_student_anew(aftermath: Aftermath) -> None:
    reason = "StateError: has no codec state after its reply of round 2, which the server counted"
    assert aftermath.rejected(WIPED) == [(3, "error", reason)]
    assert aftermath.events(WIPED) == ["lost its state after round 2: its private model restarts from version 0"]
    assert WIPED in aftermath.round(4)["clients"]


def test_no_reply_is_lost_with_a_superlink_that_is_killed_and_started_again(aftermath: Aftermath) -> None:
    assert aftermath.round(3)["clients"] == [KILLED, SLOW, STEADY]
    assert not aftermath.rejected(STEADY)
    assert aftermath.round(4)["clients"] == sorted(CLIENTS)


def test_a_node_that_is_not_registered_is_turned_away(aftermath: Aftermath) -> None:
    assert turned_away(aftermath.unregistered)
    assert "stranger" not in aftermath.statuses


def test_a_node_that_trusts_another_authority_never_connects(aftermath: Aftermath) -> None:
    assert turned_away(aftermath.misled) and aftermath.misled.says("CERTIFICATE_VERIFY_FAILED")
    assert aftermath.statuses[MISLED] == "registered"  # and never online
    assert aftermath.statuses[STEADY] == "online"


def test_a_node_with_broken_data_is_refused_with_the_reason(aftermath: Aftermath) -> None:
    assert aftermath.statuses[BROKEN] == "online"
    [event] = aftermath.events("-")
    assert event.startswith(f"not taken in (node {aftermath.broken_id}): ConfigError: data-path: ")
    assert "Parquet magic bytes not found" in event


def test_nobody_else_is_ever_heard(aftermath: Aftermath) -> None:
    assert {row["node"] for row in aftermath.rows("message")} == {*CLIENTS, "-"}
    assert {row["purpose"] for row in aftermath.rows("message") if row["node"] == "-"} == {"hello"}
