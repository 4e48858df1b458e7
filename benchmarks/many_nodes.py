"""What grows with the number of nodes on one SuperLink: seconds of a round, memory, files.

python benchmarks/many_nodes.py [--nodes N]... [--rounds N] [--set KEY=VALUE]... [--output DIR]

A real SuperLink with its database and a real SuperExec, in process isolation, on loopback without TLS. The nodes are
threads of this process: each has its own registration, heartbeats, polling every three seconds and transfers, as a
SuperNode does, through Flower's own client of the Fleet API, and answers with the real client app; but it starts no
process for a message, so what remains is what the server's side costs. Clients train one after another, as there is
one app in one process; their seconds are reported apart. Prints a table and writes many_nodes.json.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supernode.fleet_http_connection import http_request_response

import client_app
from fedkd_flwr.experiment import Experiment, load
from fedkd_flwr.flower.commands import Commands, add_connection, run_config
from fedkd_flwr.flower.local_grid import task_identity
from fedkd_flwr.flower.processes import LOOPBACK, Child, Children, free_ports
from fedkd_flwr.measure.ledger import LEDGER_FILE, read_rows

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf" / "digits_fedkd.yaml"
# A small model and one epoch, so that the server's side is what is measured.
SMALL = (
    "num_rounds=4",
    "task.partition={name: iid}",
    "task.teacher={num_layers: 2, hidden_size: 16, num_heads: 2, intermediate_size: 16}",
    "task.student={num_layers: 1, hidden_size: 16, num_heads: 2, intermediate_size: 16}",
    "algorithm.local={num_epochs: 1, batch_size: 128}",
    "compressor={name: transform_coding}",
    "server.connect_timeout_seconds=300",
)
POLL_SECONDS = 3.0  # Flower's SuperNode waits so long between looks
MEGABYTE = 1e6
IDLE_SECONDS = 15.0


class Node(threading.Thread):
    """One node: connects, looks for messages, answers them."""

    one_at_a_time = threading.Lock()  # the models of a process are scratch space for whichever client is at work

    def __init__(self, address: str, number: int, config: Mapping[str, Any], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._address, self._number, self._config, self._stop_event = address, number, dict(config), stop
        self.app_seconds = 0.0

    def run(self) -> None:
        """Until told to stop."""
        with http_request_response(self._address, insecure=True) as connection:
            node_id, receive, send, _, _, pull_object, push_object, confirm = connection
            node_config: dict[str, bool | float | int | str] = {"partition-id": self._number}
            while not self._stop_event.is_set():
                received = receive()
                if received is None:
                    self._stop_event.wait(POLL_SECONDS)
                    continue
                header, tree = received
                run_id = header.metadata.run_id
                message = pull_and_inflate_object_from_tree(
                    tree, partial(pull_object, run_id), partial(confirm, run_id), return_type=Message
                )
                message.metadata.__dict__["_message_id"] = tree.object_id
                with self.one_at_a_time:
                    started = time.perf_counter()
                    context = Context(run_id, node_id, node_config, RecordDict(), self._config)
                    reply = client_app.app(message, context)
                    seconds = time.perf_counter() - started
                    self.app_seconds += seconds
                reply.metadata.__dict__["_message_id"] = reply.object_id
                with no_object_id_recompute():
                    wanted, session = send(reply, get_object_tree(reply), seconds)
                    push_objects(
                        get_all_nested_objects(reply), partial(push_object, run_id, session), object_ids_to_push=wanted
                    )


@contextmanager
def server(home: Path) -> Iterator[tuple[Children, Child, str]]:
    """SuperLink and SuperExec."""
    [port] = free_ports(1)
    address = f"{LOOPBACK}:{port}"
    secret = home / "secret"
    secret.write_text("of this benchmark", encoding="utf-8")
    with Children() as children:
        superlink = children.start(
            "SuperLink",
            (
                *("flower-superlink", "--insecure", "--host", LOOPBACK, "--port", str(port)),
                *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
                *("--database", str(home / "state.db"), "--disable-runtime-dependency-installation"),
            ),
            home,
            home / "superlink.log",
        )
        children.wait_for_port(superlink, port)
        superexec = ("flower-superexec", "--insecure", "--runtime-api-address", address)
        children.start(
            "SuperExec", (*superexec, "--superexec-auth-secret-file", str(secret)), home, home / "superexec.log"
        )
        yield children, superlink, address


def peak_memory(pid: int) -> float:
    """Megabytes of memory that a process had at most."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / MEGABYTE
    return 0.0


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serverapp_pid(run_dir: Path) -> int | None:
    """The process that serves the run: it holds the lock of the run's directory."""
    lock = run_dir / "lock"
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if any(link.resolve() == lock for link in (entry / "fd").iterdir()):
                    return int(entry.name)
            except OSError:
                continue
    return None


def folder_size(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def measure(experiment: Experiment) -> dict[str, Any]:
    """One run with as many nodes as the experiment has clients."""
    with tempfile.TemporaryDirectory() as name, task_identity():
        home = Path(name).resolve()
        run_dir = home / "results" / experiment.name / "run"
        config = run_config(experiment, ROOT, run_dir)
        (home / "user").mkdir()
        with server(home) as (children, superlink, address):
            add_connection(home / "user", "bench", address, None)
            stop = threading.Event()
            nodes = [Node(address, number, config, stop) for number in range(experiment.num_clients)]
            for node in nodes:
                node.start()
            memory = {"superlink": 0.0, "serverapp": 0.0}

            def look() -> None:
                children.require_running()
                memory["superlink"] = peak_memory(superlink.process.pid)
                if pid := serverapp_pid(run_dir):
                    memory["serverapp"] = peak_memory(pid)

            flower = Commands(home / "user", "bench")
            while flower.num_online() < experiment.num_clients:
                time.sleep(1)
            busy, started = cpu_seconds(superlink.process.pid), time.monotonic()
            time.sleep(IDLE_SECONDS)
            idle_share = (cpu_seconds(superlink.process.pid) - busy) / (time.monotonic() - started)
            busy = cpu_seconds(superlink.process.pid)
            flower.run_to_end(flower.submit(ROOT, config), run_dir, None, look)
            busy = cpu_seconds(superlink.process.pid) - busy
            stop.set()
            for node in nodes:
                node.join(10)
            database = sum(path.stat().st_size for path in home.glob("state.db*"))
        rows = list(read_rows(run_dir / LEDGER_FILE))
        times = [row["elapsed_seconds"] for row in rows if row["kind"] == "round"]
        rounds = [after - before for before, after in pairwise(times)]
        return {
            "num_nodes": experiment.num_clients,
            "first_round_seconds": rounds[0],
            "round_seconds": mean(rounds[1:]),
            "app_seconds": sum(node.app_seconds for node in nodes) / (experiment.num_rounds + 2),
            "greeting_seconds": times[0],
            "superlink_idle_share": idle_share,
            "superlink_cpu_seconds": busy / (experiment.num_rounds + 2),
            "superlink_megabytes": memory["superlink"],
            "serverapp_megabytes": memory["serverapp"],
            "database_bytes": database,
            "ledger_bytes": (run_dir / LEDGER_FILE).stat().st_size,
            "checkpoint_bytes": folder_size(run_dir / "checkpoints"),
            "wire_bytes": sum(row["wire_bytes"] for row in rows if row["kind"] == "message"),
        }


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, action="append", help="how many; several may be given")
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    results = []
    for count in options.nodes or (5, 10, 25, 50):
        found = measure(load(CONF, [*SMALL, f"num_clients={count}", *options.set]))
        results.append(found)
        print(json.dumps(found), flush=True)
        (options.output / "many_nodes.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
